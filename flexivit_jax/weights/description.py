"""What a file with weights holds, and what its arrays do not say, as lines for a reader."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from flexivit_jax import trees, weights
from flexivit_jax.models import FlexiViT, Model, TextTower, TwoTowers, vit_part
from flexivit_jax.models.grid import common_divisors
from flexivit_jax.tables import aligned
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import registry, stated

_SHOWN = 5  # names of classes


def _few(names: list[str]) -> str:
  return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def listing() -> list[str]:
  """Returns a line for each published checkpoint, under a heading; the address ends in one more of its names."""
  files = dict.fromkeys(
    (p.name, p.timm, p.expected.get("num_classes", ""), p.url) for p in registry.PUBLISHED.values()
  )
  rows = [("name", "in timm", "classes", "address"), *files]
  cells = [[str(cell) for cell in row] for row in rows]
  return aligned(cells, "<<><", least=(23, 27))


def describe(
  model: FlexiViT, params: Params, record: Json, assumed: str | None = None
) -> list[str]:
  """Returns a line for each thing to know; see `describe_whole`."""
  head = f"{model.num_classes} classes" if model.num_classes else "no head"
  size = f"width {model.width}, depth {model.depth}, mlp {model.mlp_dim}, {model.num_heads} heads"
  patch, grid = (_by(record[key]) for key in ("native_patch_size", "native_grid"))
  rows = {
    "format": record["format"],
    "source": f"{record['source']['file']}, {record['source']['format']}",
    "architecture": f"{size}, pool {model.pool_type}, {head}",
    "parameters": f"{trees.count(params):,}",
    "native size": f"kernel {patch} pixels, position grid {grid}",
    "activation": f"gelu {model.gelu}, LayerNorm eps {model.layer_norm_eps:g}",
    "position": record["position"],
    "resized by": f"kernel {model.kernel_operator}, grid {model.grid_operator}",
    "image": _image(record.get("image_size") or record.get("image_shape")),
    "input": _input(record),
    "prepared": _prepared(record, assumed),
  }
  if names := record.get("class_names"):
    rows["classes"] = _names(names, model.num_classes)
  if names := weights.not_finite(params):
    rows["not finite"] = f"{len(names)} arrays: {_few(names)}; every other command refuses them"
  if "url" in record:
    rows["fetched from"] = record["url"]
  if "flexified_from" in record:
    rows["flexified"] = f"kernel {_by(model.patch_size)} pixels, grid {_by(model.posemb_size)}"
  return _rows(rows) + [f"note: {note}" for note in record["notes"]]


def describe_whole(
  model: Model, params: Params, record: Json, assumed: str | None = None
) -> list[str]:
  """Returns the lines for any model.

  Args:
    model, params, record: as `tasks.load` returns them.
    assumed: how images are prepared if no file says it; default as `weights.preparation` has it.
  """
  if isinstance(model, FlexiViT):
    return describe(model, params, record, assumed)
  if isinstance(model, TwoTowers):
    return describe_towers(model, params, record)
  part = vit_part(model)
  assert part is not None  # `tasks.load` gives no others
  parts: Any = getattr(model, "parts")  # noqa: B009  # not of every `Model`
  lines = describe(
    parts[part], params[part], {k: v for k, v in record.items() if k != "class_names"}, assumed
  )
  notes = [line for line in lines if line.startswith("note: ")]
  own = {k: v for k, v in record["model"].items() if k not in (*parts, "name", "num_classes")}
  rest = {name: tree for name, tree in params.items() if name not in parts}
  rows = {
    "model": f"{record['model']['name']}, {model.num_classes} classes; above is its {part}",
    "fields": ", ".join(f"{k} {v}" for k, v in own.items()),
    "own arrays": f"{trees.count(rest):,} parameters in {', '.join(rest)}",
  }
  if names := record.get("class_names"):
    rows["classes"] = _names(names, model.num_classes)
  if "text" in parts:
    rows |= _text_tower(parts["text"], params["text"])
    rows["tokenizer"] = _tokenizer(record.get("text"))
  return [*(line for line in lines if line not in notes), *_rows(rows), *notes]


def describe_towers(model: TwoTowers, params: Params, record: Json) -> list[str]:
  """Returns the lines of `describe` for the image tower, and those of the text tower."""
  image, text = model.parts["image"], model.parts["text"]
  lines = describe(image, params["image"], record)
  notes = [line for line in lines if line.startswith("note: ")]
  bias = f", bias {params['b'][0]:.4g}" if "b" in params else ""
  rows = _text_tower(text, params["text"]) | {
    "products": f"scale {np.exp(params['t'][0]):.4g}{bias}",
    "tokenizer": _tokenizer(record.get("text")),
  }
  return [*(line for line in lines if line not in notes), *_rows(rows), *notes]


def _text_tower(text: TextTower, params: Params) -> Json:
  head = f", projection to {text.num_classes}" if text.num_classes else ", no projection"
  size = f"width {text.width}, depth {text.depth}, mlp {text.mlp_dim}, {text.num_heads} heads"
  causal = ", causal" if text.causal else ""
  return {
    "text tower": f"kind {text.kind}, {size}",
    "texts": f"{text.vocab_size} tokens, {text.max_length} positions, pool {text.pool_type}{causal}{head}",
    "parameters": f"{trees.count(params):,}",
    "activation": f"gelu {text.gelu}, LayerNorm eps {text.layer_norm_eps:g}",
  }


def _tokenizer(text: Json | None) -> str:
  if text is None:
    return "none: texts cannot be encoded, tokens can"
  end = "" if text.get("end") is None else f", ends with {text['end']}"
  lower = ", lower case" if text.get("lower") else ""
  return f"{text['length']} tokens a text{end}, pads with {text['pad']}{lower}"


def _rows(rows: Json) -> list[str]:
  return aligned([(name, str(value)) for name, value in rows.items()], "<", gap=" ", least=(13,))


def _image(size: list[int] | None) -> str:
  if size is None:
    return "any size; for FlexiViT usually 240x240"
  sizes = ", ".join(map(str, common_divisors((size[0], size[1]))))
  return f"{_by(size[:2])}; seqhw that divide it: {sizes}"


def _input(record: Json) -> str:
  """With which mean and std pixels enter, and what says so."""
  stats = record.get("input") or record.get("folded_input")
  if not isinstance(stats, dict):
    return "pixels in [-1, 1]"
  values = f"mean {_commas(stats['mean'])}, std {_commas(stats['std'])}"
  ground = stats.get("from", "folded in")
  if record["format"] != record["source"]["format"]:  # written by us
    return f"pixels in [-1, 1]; folded in: {values} ({ground})"
  if ground == "assumed":
    return f"assumed {values}; give --mean and --std if the model was trained with others"
  return f"{values} ({ground})"


def _prepared(record: Json, assumed: str | None) -> str:
  """How an image becomes what the model gets, and which file says so."""
  images = stated.of_record(record) if "images" in record else None
  if images is not None:
    return images.words()
  if record.get("pp"):
    return f"{record['pp']} (evaluation of the run)"
  return f"{assumed or weights.preparation(record)} (assumed: no file says it)"


def _names(names: list[str], classes: int) -> str:
  if len(names) != classes:
    return f"{len(names)} names of other classes than the model's {classes}: not used"
  more = f", ... ({len(names)} in all)" if len(names) > _SHOWN else ""
  return ", ".join(names[:_SHOWN]) + more


def _commas(values: list[float]) -> str:
  """One number for all channels, or all of them."""
  same = len(set(values)) == 1
  return ",".join(f"{value:.5g}" for value in (values[:1] if same else values))


def _by(size: Sequence[int]) -> str:
  return "x".join(map(str, size))
