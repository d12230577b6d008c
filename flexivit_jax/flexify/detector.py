"""Turns a fixed detector into a flexible one: at drawn patch sizes its boxes and scores follow the original's own.

The queries are the detector's classes, or names that are given; their embeddings do not move, and neither does the text
tower, which the result has as it was. Boxes start as large as at the original's own patch size (`OwlViT.box_size`):
patches change, and objects do not. What is left of the original is counted in boxes, at every size.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from flexivit_jax import data, errors, train, weights
from flexivit_jax.flexify import card, layout, recipe, retention
from flexivit_jax.inference import predictor, queries
from flexivit_jax.models import UNNAMED, vit_part
from flexivit_jax.models.grid import paper_sizes
from flexivit_jax.objectives.detection import corners
from flexivit_jax.running import distributed, session
from flexivit_jax.sizes import SeqHw, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import model_records, stated

THRESHOLD = 0.1  # the least score of a box that counts, as in `flexivit predict`
IOU = 0.5  # the least overlap of two boxes that are the same
TOP_K = 300  # boxes of an image at most, as in OWL-ViT
ORIGINAL = "original.npz"
LR = 1e-5


def is_one(init: pathlib.Path) -> bool:
  """Tells whether a file holds a detector."""
  return weights.tasks.is_whole(init) and weights.tasks.name_of(init) == "owl_vit"


def flexify(
  init: pathlib.Path,
  images: pathlib.Path,
  out: pathlib.Path,
  *,
  epochs: float = 10,
  image_size: int | None = None,
  seqhw: Sequence[SeqHw] | None = None,
  batch_size: int = 16,
  lr: float | None = None,
  seed: int = 0,
  on_error: str = "raise",
  names: Sequence[str] = (),
  vectors: pathlib.Path | None = None,
  loading: Json | None = None,
) -> Json:
  """Does what `flexify.flexify` does, for a detector; OUT/original.npz is the teacher, with the names as its classes.

  Args:
    init: a detector, as `weights.tasks.load` takes it.
    images, out, epochs, batch_size, seed, on_error, loading: as there.
    image_size: default: the detector's own.
    seqhw: default: those with patches of 8 to 48 pixels.
    lr: default `LR`.
    names: of a detector that compares images with texts, what it is trained and measured with.
    vectors: of the names, where it has no text tower.

  Raises:
    UserError: see `queries.closed` on names; several processes; images that are not square.
  """
  if distributed.is_on():
    raise errors.UserError(
      "A detector is flexified by one process; start it without --coordinator_address."
    )
  loaded = predictor.load(init, whole=True, **(loading or {}))
  weights.print_notes(loaded.record)
  _, of_images = predictor.preparation(loaded.model, loaded.record)  # not of what is written
  notes = [line for line in loaded.record["notes"] if line not in of_images]
  loaded = loaded._replace(record=loaded.record | {"notes": notes})
  native = recipe.native_side(loaded.record)
  loaded = loaded._replace(model=with_box_size(loaded.model, native))
  closed = queries.closed(loaded, queries.Asked(names or None, vectors=vectors))
  side = image_size or native
  sizes = tuple(seqhw if seqhw is not None else paper_sizes(side))
  if not sizes:
    raise errors.UserError(f"No patch of 8 to 48 pixels divides {side} pixels; give --seqhw.")
  for size in sizes:
    closed.model.grid((side, side), **size_args(size))
  divided = layout.divide(images, batch_size if epochs else None)
  for line in divided.notes:
    session.note(line)
  original = out / ORIGINAL
  out.mkdir(parents=True, exist_ok=True)
  original.unlink(missing_ok=True)
  about = closed.record | {"model": model_records.record_of(closed.model)}
  weights.save_npz(original, closed.model, closed.params, about)
  plan = recipe.FlexifyRecipe(
    teacher=dict(checkpoint=str(original), image=recipe.TEACHER_IMAGE, whole=True),
    sources=divided.sources,
    num_classes=closed.model.num_classes,
    sides=(side, native),
    seqhw=sizes,
    batch_size=batch_size,
    on_error=on_error,
    boxes=True,
  )
  pads = "pad(" in loaded.pp
  lr = LR if lr is None else lr
  vit = closed.model.parts["backbone"]
  patch = vit.patch_size[0]
  scores: Json = {"original": {"image_size": native, "patch": patch}}
  scores["before"] = measure(plan, closed, closed.params, pads)
  params = closed.params
  if epochs:
    settings_ = settings(plan, closed.model, pads, epochs=epochs, lr=lr, seed=seed)
    train.train(settings_, out / "run")
    _, params, _ = weights.tasks.load(out / "run", scan=False)
    scores["after"] = measure(plan, closed, params, pads)
  # What names were compared by is not the detector's own: its text tower is as it was.
  kept = {k: v for k, v in params.items() if not (loaded.model.open and k == "queries")}
  record = _record(plan, loaded, trained=epochs > 0)
  facts = dict(init=init.name, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
  facts |= {"names": ", ".join(names)} if names else {}
  made = loaded.model, {**loaded.params, **kept}, record
  card.write(out, scores, made, card.text(plan, vit, scores, facts))
  return scores


def with_box_size(model: Any, side: int) -> Any:
  """Returns a detector whose boxes start as large at every patch size as at its own, where it is the same model.

  Args:
    model: the detector.
    side: pixels a side of its images.
  """
  if model.box_size is not None:
    return model
  rows, columns = model.grid((side, side)).grid_hw
  return model.clone(box_size=(1.0 / rows, 1.0 / columns))


def settings(
  plan: recipe.FlexifyRecipe, model: Any, pads: bool, *, epochs: float, lr: float, seed: int
) -> Json:
  """Returns the config of the run, as `train.train` takes it; `pads`: images are padded to a square, not squashed."""
  shared = recipe.run_of(plan, epochs=epochs, lr=lr, seed=seed, square=_square(pads))
  return shared | dict(
    model=_fields(model),
    init=dict(checkpoint=plan.teacher["checkpoint"]),
    objective=dict(name="distill_detection", teachers=dict(original=plan.teacher)),
    optim=shared["optim"] | dict(freeze=("queries",)),
  )


def _square(pads: bool) -> str:
  return "pad('square', fill=0)|" if pads else ""


def _fields(model: Any) -> Json:
  skipped = {*UNNAMED, "fsdp", "gather_dtype", *model.PARTS}
  own = {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in skipped}
  # One compiled block, recomputed in the backward pass, as for other models.
  part = vit_part(model)
  assert part is not None
  backbone = model_records.fields_of(model.parts[part]) | {"scan": True, "remat": True}
  return {"name": "owl_vit", **own, part: backbone}


def _record(plan: recipe.FlexifyRecipe, loaded: predictor.Loaded, trained: bool) -> Json:
  side = plan.sides[0]
  record = stated.written_for(loaded.record, (side, side))
  return record | recipe.sizes_of(plan, trained) | {"model": model_records.record_of(loaded.model)}


# --- what is left of the original ---


class Boxes(NamedTuple):
  """What is found in one image, the surest first.

  Attributes:
    corners: (x0, y0, x1, y1) in shares of the image.
    number: of the class.
  """

  corners: Float[np.ndarray, "m 4"]
  number: np.ndarray


def measure(
  plan: recipe.FlexifyRecipe, original: predictor.Loaded, params: Params, pads: bool
) -> list[Json]:
  """Returns a row for each size: seqhw, patch, n (images), boxes (of the original), kept, extra (fractions).

  A box is kept where the model has one of the same class with an IoU of 0.5 or more; each serves once, the surest
  first.
  Extra is the share of the model's boxes that none of the original's is. Of 0 boxes 0 are kept, or extra.

  Args:
    plan: the recipe.
    original: the detector whose classes are the queries.
    params: of the model that is measured.
    pads: see `settings`.
  """
  model = original.model
  side, _ = plan.sides
  other = recipe.TEACHER_IMAGE
  pp = f"decode|{_square(pads)}{recipe.both(plan.sides)}"
  source = data.make_source(**plan.sources["test"])
  batches = data.eval_batches(source, pp, batch_size=plan.batch_size, on_error=plan.on_error)
  run = {size: _program(model, **size_args(size)) for size in plan.seqhw}
  teach = _program(model)
  counts = {size: np.zeros(3, int) for size in plan.seqhw}  # boxes of the original, ours, in common
  n = 0
  for batch in batches:
    real = batch["_mask"] > 0
    n += int(real.sum())
    true = _boxes(teach(original.params, batch[other]), real)
    for size in plan.seqhw:
      found = _boxes(run[size](params, batch["image"]), real)
      for a, b in zip(true, found, strict=True):
        counts[size] += [len(a.number), len(b.number), in_common(a, b)]
  rows: list[Json] = []
  for size, (theirs, ours, common) in counts.items():
    hw = model.grid((side, side), **size_args(size)).patch_hw
    row: Json = {"patch": retention.patch_text(hw), "seqhw": size_text(size), "n": n}
    row |= {"boxes": int(theirs), "kept": common / max(theirs, 1)}
    rows.append(row | {"extra": (ours - common) / max(ours, 1)})
  return rows


def _program(model: Any, **size: Any) -> Callable[..., Any]:
  @jax.jit
  def run(params: Params, image: Any) -> Any:
    _, out = model.apply({"params": params}, image, **size)
    return corners(out["pred_boxes"]), jax.nn.sigmoid(out["class_logits"])

  return run


def _boxes(answers: tuple[Any, Any], real: np.ndarray) -> list[Boxes]:
  """The boxes of each image that is none of padding; `answers` are corners and scores."""
  found = []
  boxes, scores = (np.asarray(array)[real] for array in answers)
  for box, score in zip(boxes, scores, strict=True):
    order = np.argsort(-score, axis=None, kind="stable")[:TOP_K]
    order = order[score.reshape(-1)[order] >= THRESHOLD]
    token, number = np.divmod(order, score.shape[1])
    found.append(Boxes(box[token], number))
  return found


def in_common(true: Boxes, found: Boxes) -> int:
  """Returns how many boxes of one have their own in the other: of the same class, overlapping enough."""
  free = np.ones(len(found.number), bool)
  overlap = _iou(true.corners, found.corners) * (true.number[:, None] == found.number[None])
  number = 0
  for row in overlap:
    still = row * free
    if len(still) and still.max() >= IOU:
      free[int(still.argmax())] = False
      number += 1
  return number


def _iou(a: Float[np.ndarray, "m 4"], b: Float[np.ndarray, "k 4"]) -> Float[np.ndarray, "m k"]:
  low, high = np.maximum(a[:, None, :2], b[None, :, :2]), np.minimum(a[:, None, 2:], b[None, :, 2:])
  both = np.prod(np.maximum(high - low, 0), axis=-1)
  areas = [np.prod(x[:, 2:] - x[:, :2], axis=-1) for x in (a, b)]
  return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)
