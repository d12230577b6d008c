"""What the demo page shows: the sizes of a model, and its answers to photos at each of them."""

import json
import pathlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.analyses import relevance
from flexivit_jax.budget.profile import Profile
from flexivit_jax.demo import in_browser, kinds
from flexivit_jax.demo.kinds import Photo
from flexivit_jax.inference import boxes, picture_files, predictor, programs, texts
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.trees import Json

ROUNDS = 7
Program = Callable[[np.ndarray], np.ndarray]


def about(
  model: Any,
  name: str,
  shape: tuple[int, int, int],
  sizes: Sequence[SeqHw],
  profile: Profile | None = None,
) -> Json:
  """Returns what the page says of a model: its sizes, from few tokens to many, with what they cost.

  Args:
    model: a FlexiViT, two towers, or a model with a FlexiViT in it.
    name: how it is called.
    shape: of an image: height, width, channels.
    sizes: to choose among.
    profile: of the model on this device, where there is one.
  """
  listed = [_size(model, shape, size, profile) for size in dict.fromkeys(sizes)]
  return {
    "model": name,
    "kind": kinds.name_of(model),
    "threshold": boxes.THRESHOLD,
    "device": programs.device_name(),
    "image": [*shape[:2]],
    "sizes": sorted(listed, key=lambda one: one["tokens"]),
    "photos": [],
    "server": False,
    "relevance": can_be_explained(model),
    "names": None,
    "cascade": None,
  }


def _size(model: Any, shape: tuple[int, int, int], size: SeqHw, profile: Profile | None) -> Json:
  patch, _, grid = model.grid(shape[:2], **size_args(size))
  tower = getattr(model, "parts", {}).get("image", model)
  known: Json = {
    "key": str(size_text(size)),
    "patch": str(patch[0]) if patch[0] == patch[1] else f"{patch[0]}x{patch[1]}",
    "tokens": grid[0] * grid[1],
    "grid": [*grid],
    "gflops": 2 * float(tower.gmacs({"image": shape}, **size_args(size))),
  }
  rows = [row for row in profile.rows if row.size == size] if profile else []
  if rows and profile:
    row = min(rows, key=lambda row: row.batch)
    value = f"{row.value:.1%}" if profile.metric.get("unit") == "%" else f"{row.value:.4g}"
    label = str(profile.metric.get("label") or profile.metric["name"])
    known |= {"p90": row.ms_p90, "accuracy": [label, value]}
  return known


def can_be_explained(model: Any) -> bool:
  """Whether `analyses.relevance` has a rule for this model."""
  return (
    isinstance(model, FlexiViT) and bool(model.num_classes) and model.pool_type in relevance.POOLS
  )


def explaining(
  loaded: predictor.Loaded, size: SeqHw, batch: int, shape: tuple[int, int, int]
) -> Program:
  """Returns a compiled program: images [batch, h, w, c] -> the relevance of each patch, [batch, grid height, width]."""
  args = size_args(size)

  def fn(params: Any, image: Any) -> Any:
    return relevance.relevance(loaded.model, params, image, **args).map

  params = jax.device_put(loaded.params)
  images = jax.ShapeDtypeStruct((batch, *shape), np.float32)
  program = jax.jit(fn).lower(params, images).compile()
  return lambda image: np.asarray(program(params, np.asarray(image, np.float32)))


def answers(
  loaded: predictor.Loaded,
  photos: Sequence[Photo],
  sizes: Sequence[SeqHw],
  among: texts.Names | None = None,
) -> list[Json]:
  """Returns photos with what the model says of them at each size, for a page without a server.

  Args:
    loaded: a model, see `kinds.of`.
    photos: of one shape.
    sizes: at each of these.
    among: the classes, where they are texts.
  """
  shape: Any = photos[0].image.shape
  kind = kinds.of(loaded, among)
  shown: list[Json] = [
    {
      "name": photo.name,
      "src": picture(photo.image),
      "truth": photo.truth,
      "window": photo.window.tolist(),
      "answers": {},
    }
    for photo in photos
  ]
  finest: list[Any] = []
  for size in _finest_first(loaded.model, shape, sizes):
    run = programs.compiled(loaded, kind.fn, size, batch=1, shape=shape).run
    explain = explaining(loaded, size, 1, shape) if can_be_explained(loaded.model) else None
    ms = _ms(run, photos[0].image)
    for i, (photo, content) in enumerate(zip(photos, shown, strict=True)):
      (output,) = run(photo.image[None])
      if not np.isfinite(output).all():
        raise errors.UserError(f"{photo.name} at seqhw={size_text(size)}: {predictor.NOT_FINITE}.")
      answer = kind.answer(photo, output)
      if len(finest) == i:
        finest.append(answer)
      found = kind.as_json(answer, finest[i]) | {"ms": round(ms, 3)}
      if explain is not None:
        found["relevance"] = _short(explain(photo.image[None])[0])
      content["answers"][str(size_text(size))] = found
  return shown


def _finest_first(model: Any, shape: tuple[int, ...], sizes: Sequence[SeqHw]) -> list[SeqHw]:
  def tokens(size: SeqHw) -> int:
    rows, columns = model.grid(shape[:2], **size_args(size))[2]
    return int(rows * columns)

  return sorted(dict.fromkeys(sizes), key=tokens, reverse=True)


def _ms(run: Program, image: np.ndarray) -> float:
  times = []
  for _ in range(ROUNDS):
    begin = time.perf_counter()
    run(image[None])
    times.append(time.perf_counter() - begin)
  return statistics.median(times) * 1e3


def _short(values: Float[np.ndarray, "h w"]) -> list[list[float]]:
  """A map as JSON, of the map's largest, in thousandths."""
  return np.round(values / max(float(values.max()), 1e-12), 3).tolist()


def picture(image: Float[np.ndarray, "h w c"]) -> str:
  """An image in [-1, 1] as the address of a PNG that holds it."""
  return kinds.address(picture_files.png(image))


def html(content: Mapping[str, Any]) -> str:
  """The page: one file that loads nothing from anywhere."""
  page = resources.files("flexivit_jax.demo").joinpath("page.html").read_text("utf-8")
  # In a script element "</script" and "<!--" would be read as markup.
  text = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
  # The data last: they may hold what looks like a mark.
  return page.replace("/*OWN*/", in_browser.script() if content.get("own") else "").replace(
    "/*DATA*/", text
  )


def write(out: pathlib.Path, content: Mapping[str, Any]) -> pathlib.Path:
  """Writes OUT/index.html.

  Raises:
    UserError: OUT is a file.
  """
  if out.exists() and not out.is_dir():
    raise errors.UserError(f"{out} is a file; expected a folder for the page.")
  out.mkdir(parents=True, exist_ok=True)
  path = out / "index.html"
  path.write_text(html(content), "utf-8")
  return path
