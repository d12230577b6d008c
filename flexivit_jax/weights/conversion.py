"""Weights in any format that `load` reads, written as big_vision's .npz or for another framework.

The certificate beside it holds the logits of the source and of what was written on the same images. An .npz is read
back and compared at several patch sizes; the source runs as it was published, its input normalised with its own mean
and standard deviation. A folder for timm or transformers is compared at its one size, in that framework where it is
installed. Of a file with two towers both are written; the certificate then holds embeddings and similarities.
"""

import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax import errors, weights
from flexivit_jax.models import FlexiViT, OwlViT, Segmenter, TwoTowers, vit_part
from flexivit_jax.models.grid import common_divisors
from flexivit_jax.sizes import SeqHw, Size, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import certificate, optional, segmenter
from flexivit_jax.weights.export import frameworks


class Framework(NamedTuple):
  """Writes a model's folder, and runs it on normalised pixels (and tokens) where the package is installed.

  Without a package (None) what is written is read back and runs here.
  """

  save: Callable[..., None]
  run: Callable[..., Any] | None
  package: str | None


FRAMEWORKS = {
  "timm": Framework(weights.save_timm, frameworks.timm_logits, "timm"),
  "transformers": Framework(
    weights.save_transformers, frameworks.transformers_logits, "transformers"
  ),
}
OF_TOWERS = {
  "transformers": Framework(
    weights.save_towers, frameworks.transformers_embeddings, "transformers"
  ),
}
OF_SEGMENTER = {"segmenter": Framework(weights.save_segmenter, None, None)}
FORMATS = ("big_vision", *FRAMEWORKS, *OF_SEGMENTER)
Model = Any  # a FlexiViT, TwoTowers, a Segmenter, or an OwlViT
Row = certificate.AnyRow


def convert_to(
  framework: str,
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  seqhw: SeqHw | None = None,
  image_size: int | None = None,
  verify: bool = True,
  image_only: bool = False,
  **options: Any,
) -> tuple[list[Row], str]:
  """Writes a folder for another framework, and returns the certificate's row and what it was compared in.

  Args:
    framework: a name in `FRAMEWORKS` or `OF_SEGMENTER`.
    source: what `weights.load` takes.
    out: a folder that is not there yet.
    seqhw: tokens per side, or (per column, per row); None: the kernel and the positions as they are stored.
    image_size: pixels a side; by default the model's own, or 240.
    verify: compare; without it there is no certificate.
    image_only: of two towers, the image tower alone. timm has no text towers, so it gets that in any case.
    **options: as in `weights.load`.

  Raises:
    UserError: see `weights.load`, `weights.save_timm`, `weights.save_transformers` and `weights.save_towers`; or
      outputs that differ, and then nothing is left behind.
  """
  image_only = image_only or framework not in (*OF_TOWERS, *OF_SEGMENTER)
  model, params, record = _load(source, image_only, **{"dtype": "float32", **options})
  save, execute, package = _framework(framework, model, source)
  weights.print_notes(record)
  hw = certificate.image_hw(record, image_size)
  vit, channels = _image_tower(model, params)
  if seqhw is None:
    (ph, pw), (gh, gw) = vit.patch_size, vit.posemb_size
    hw = ph * gh, pw * gw
  save(out, model, params, record, image_hw=hw, seqhw=seqhw)
  if not verify:
    return [], ""
  try:
    image, tokens = certificate.images(hw, channels), _texts(model)
    size = seqhw or _square(vit.grid(hw).grid_hw)
    installed = package and optional.version(package)
    compared = installed or (
      "flexivit_jax" if package is None else "flexivit_jax, for it is not installed"
    )
    if not installed or execute is None:
      written = out if package else out / segmenter.CHECKPOINT
      target = _run(*_load(written, image_only)[:2], image, tokens, None)
    else:
      target = execute(out, image) if tokens is None else execute(out, image, tokens)
    row = certificate.row_of(size, _run(model, params, image, tokens, seqhw), target)
    if not row.is_close:
      raise errors.UserError(
        f"The written model differs by {row.difference:.1e}, more than {row.limit:.1e}; nothing is"
        " written. Please report this."
      )
  except Exception:
    shutil.rmtree(out)
    raise
  certificate.write(out, source, [row], record | {"compared_in": compared}, hw)
  return [row], compared


def _framework(name: str, model: Model, source: pathlib.Path) -> Framework:
  """Raises a UserError where the framework has no such model."""
  kinds = FRAMEWORKS
  if isinstance(model, OwlViT):
    raise errors.UserError(
      f"--to={name}: {source} holds a detector, which is written as an .npz (no --to); --image_only takes its FlexiViT."
    )
  if isinstance(model, TwoTowers):
    kinds = OF_TOWERS
  elif isinstance(model, Segmenter):
    kinds = OF_SEGMENTER
  if name not in kinds:
    what = "no Segmenter" if name in OF_SEGMENTER else "a Segmenter"
    raise errors.UserError(
      f"--to={name}: {source} holds {what}; expected --to={' or '.join(kinds)}, or --image_only for the image tower."
    )
  return kinds[name]


def _square(size: Size) -> SeqHw:
  return size[0] if size[0] == size[1] else size


def _load(source: pathlib.Path, image_only: bool, **options: Any) -> tuple[Model, Params, Json]:
  """Reads a model whole, unless its FlexiViT alone is wanted."""
  return (weights.load_with_record if image_only else weights.tasks.load)(source, **options)


def _image_tower(model: Model, params: Params) -> tuple[FlexiViT, int]:
  """Returns the image tower, and the channels of its images."""
  part = vit_part(model)
  vit, own = (model.parts[part], params[part]) if part else (model, params)
  return vit, own["embedding"]["kernel"].shape[2]


def _texts(model: Model) -> np.ndarray | None:
  return certificate.texts(model.parts["text"]) if isinstance(model, TwoTowers) else None


def _run(
  model: Model,
  params: Params,
  image: np.ndarray,
  tokens: np.ndarray | None,
  seqhw: SeqHw | None,
) -> Any:
  """Returns logits, of two towers `certificate.Embeddings`, of a detector `certificate.Boxes`."""
  if isinstance(model, TwoTowers) and tokens is not None:
    return certificate.embeddings(model, params, image, tokens, seqhw)
  if isinstance(model, OwlViT):
    return certificate.boxes(model, params, image, seqhw)
  return certificate.logits(model, params, image, seqhw)


def convert(
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  image_size: int | None = None,
  exact: bool = True,
  verify: bool = True,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  image_only: bool = False,
  **fields: Any,
) -> list[Row]:
  """Writes `out` and the certificate beside it, and returns the certificate's rows.

  Args:
    source: what `weights.load` takes, and as there: mean, std, flexify, fields.
    out: a name that ends in .npz.
    image_size: pixels a side for the certificate; by default the model's own, or 240.
    verify: compare; without it there is no certificate.
    exact: the native size must give the same logits; a flexified model does so only nearly.
    image_only: of two towers, the image tower alone.

  Raises:
    UserError: see `weights.load` and `weights.save_npz`; or outputs that differ, and then nothing is left behind.
  """
  options = dict(mean=mean, std=std, flexify=flexify, **fields)
  model, params, record = _load(source, image_only, **options)
  weights.print_notes(record)
  weights.save_npz(out, model, params, record)
  if not verify:
    return []
  try:
    folded = _folded(record)
    plain: Json = {name: [0.5] * len(values) for name, values in folded.items()}
    published = _load(source, image_only, **plain, **fields)[:2]
    target = _load(out, image_only)[:2]
    hw = certificate.image_hw(record, image_size)
    rows = compare(published, target, hw, folded.get("mean"), folded.get("std"))
    _judge(rows, hw, _image_tower(*published)[0], exact, folded=bool(folded))
  except Exception:
    out.unlink()
    raise
  certificate.write(out, source, rows, record, hw)
  return rows


def compare(
  source: tuple[Model, Params],
  target: tuple[Model, Params],
  hw: Size,
  mean: Sequence[float] | None,
  std: Sequence[float] | None,
) -> list[Row]:
  """Runs two models on the same two images at up to five patch sizes, the source's own among them."""
  vit, channels = _image_tower(*source)
  image, tokens = certificate.images(hw, channels), _texts(source[0])
  raw = image
  if mean is not None and std is not None:
    raw = (((image + 1) / 2 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
  return [
    certificate.row_of(s, _run(*source, raw, tokens, s), _run(*target, image, tokens, s))
    for s in _sizes(hw, vit.patch_size)
  ]


def _folded(record: Json) -> Json:
  """Mean and std that were folded in when the source was read; not those of a file that has them folded already."""
  as_published = record["format"] == record["source"]["format"]
  return record.get("folded_input", {}) if as_published else {}


def _judge(rows: list[Row], hw: Size, model: FlexiViT, exact: bool, folded: bool) -> None:
  for row in rows:
    native = model.patch_size == model.grid(hw, **size_args(row.seqhw)).patch_hw
    # Where its kernel shrinks, a folded input is exact only nearly; a flexified model, nowhere.
    if exact and (native or not folded) and not row.is_close:
      raise errors.UserError(
        f"The converted model differs at seqhw={size_text(row.seqhw)} by {row.difference:.1e}, more than"
        f" {row.limit:.1e}; nothing is written. Please report this."
      )


def _sizes(hw: Size, native: Size, most: int = 5) -> list[int]:
  """Up to five grids that divide the image, from 2 to 32 tokens a side, the native one among them."""
  fitting = [s for s in common_divisors(hw) if 2 <= s <= 32]
  if not fitting:
    raise errors.UserError(f"No patch size divides an image of {hw}; give --image_size.")
  stored = [s for s in fitting if (hw[0] // s, hw[1] // s) == native]
  others = [s for s in fitting if s not in stored]
  ends = np.linspace(0, len(others) - 1, min(most - len(stored), len(others)))
  return sorted([*stored, *(others[round(i)] for i in ends)])
