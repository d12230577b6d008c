"""The recipe of `flexivit flexify`: data, sizes and their probabilities, the config of the run."""

from typing import NamedTuple

import numpy as np

from flexivit_jax import data, errors, resize
from flexivit_jax.data import class_names
from flexivit_jax.models import UNNAMED, FlexiViT
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Json

TEACHER_IMAGE = "teacher_image"
NEIGHBOURS = 5  # of each held-out image, compared where there are no classes
# CLIP's towers are easily destroyed: docs/flexify.md.
LR = {"classes": 3e-5, "embeddings": 1e-5}
_CROP = 0.9  # of the shorter side, in the evaluation: as AugReg and timm do


class FlexifyRecipe(NamedTuple):
  """The settings that training and measuring share.

  Attributes:
    teacher: arguments of `loaders.load_teacher`.
    sources: arguments of `data.make_source`, "train" and "test".
    num_classes: of teacher and student.
    sides: pixels a side of the student's and the teacher's images.
    seqhw: tokens per side, or (per column, per row).
    batch_size: of training and evaluation.
    known: the classes of teacher and student; None: they have only numbers.
    on_error: "raise" at a damaged image, or "skip" it.
    embedding: the output that is taught where the model has no classes, see `distill_embeddings`; None: the logits of
      its classes.
    anchors: of two towers, embeddings of names, for which zero-shot agreement is measured; None: it is not.
    boxes: whether the model is a detector, whose boxes and scores are taught.
  """

  teacher: Json
  sources: dict[str, Json]
  num_classes: int
  sides: tuple[int, int]
  seqhw: tuple[SeqHw, ...]
  batch_size: int
  known: class_names.Classes | None = None
  on_error: str = "raise"
  embedding: str | None = None
  anchors: tuple[tuple[float, ...], ...] | None = None
  boxes: bool = False

  @property
  def skipping(self) -> dict[str, str]:
    """The key of a data section about damaged images; {} for the default."""
    return {} if self.on_error == "raise" else {"on_error": self.on_error}

  @property
  def classes(self) -> class_names.Classes:
    """The classes of teacher and student."""
    return self.known or class_names.Classes(None, self.num_classes, "the model")

  @property
  def labelled(self) -> bool:
    """Whether the labels of the test images are classes of the model."""
    return labels_of(self)[0]


def labels_of(plan: FlexifyRecipe) -> tuple[bool, str | None]:
  """Returns whether the labels of the test images are classes of the model, and a note for the user or None."""
  if plan.sources["test"]["name"] != "folder" or plan.embedding is not None:
    return False, None
  source, ours = data.make_source(**plan.sources["test"]), plan.classes
  theirs = class_names.Classes(source.class_names, source.num_classes, "the folders")
  if None in (ours.names, theirs.names) and ours.number != theirs.number:
    left_out = f"the model has {ours.number} classes, the folders {theirs.number}"
    return False, f"Top-1 is left out: {left_out}."
  try:
    return True, class_names.match(theirs, ours).note
  except errors.UserError as e:
    return False, f"Top-1 is left out. {e}"


def native_side(record: Json) -> int:
  """Returns the native image side of a model in pixels; raises a UserError if its images are not square."""
  h, w, *_ = record.get("image_size") or record.get("image_shape") or (240, 240)
  if h != w:
    raise errors.UserError(
      f"The model is for images of {h}x{w} pixels; only square ones can be flexified."
    )
  return h


def student_of(teacher: FlexiViT, buffers: tuple[int, ...] | None) -> FlexiViT:
  """Returns the teacher's architecture; `buffers` replaces the sides of the stored kernel and grid."""
  if buffers is None:
    return teacher
  if len(buffers) != 2 or min(buffers) < 1:
    raise errors.UserError(f"buffers={tuple(buffers)}: expected PATCH,GRID, e.g. 32,7.")
  patch, grid = buffers
  return teacher.clone(patch_size=(patch, patch), posemb_size=(grid, grid))


def moment_of(source: Json, side: int, length: int, on_error: str = "raise") -> resize.Moment:
  """Returns the second moment of pixels in the first 100 images of a source, preprocessed for this side."""
  opened = data.make_source(**source)
  first = data.subset(opened, range(min(100, len(opened))))
  pp = f"decode|{central(side)}|keep('image')"
  batches = data.eval_batches(first, pp, batch_size=len(first), on_error=on_error)
  images = np.concatenate([batch["image"][batch["_mask"] > 0] for batch in batches])
  return resize.second_moment(images, length)


def settings(
  plan: FlexifyRecipe,
  student: FlexiViT,
  *,
  epochs: float,
  lr: float,
  seed: int,
) -> Json:
  """Returns the config of the run, as `train.train` takes it."""
  return run_of(plan, epochs=epochs, lr=lr, seed=seed) | dict(
    # One compiled block, recomputed in the backward pass: a ViT-Ti at patch 16 takes 198 MiB of temporary memory for
    # 16 images, instead of 1273.
    model=dict(fields_of(student), name="flexivit", scan=True, remat=True),
    init=_without_image(plan.teacher),
    # Mixup as in the paper: with few images, mixtures of them are most of the inputs to match.
    objective=_goal(plan) | dict(teachers=dict(original=plan.teacher), mixup_p=1.0),
  )


def run_of(plan: FlexifyRecipe, *, epochs: float, lr: float, seed: int, square: str = "") -> Json:
  """Returns what the configs of all models share: all but model, start and objective.

  Args:
    plan: the recipe.
    epochs, lr, seed: of the training.
    square: operations that make a square of a crop; "": it is squashed.
  """
  crop = f"decode|inception_crop(area_min=25)|flip_lr|{square}"
  return dict(
    name="flexified",
    seed=seed,
    total_epochs=epochs,
    log_every=10,
    input=dict(
      data=plan.sources["train"],
      pp=f"{crop}{both(plan.sides)}",
      batch_size=plan.batch_size,
      **plan.skipping,
    ),
    # Equal FLOPs for each size, so coarse sizes are drawn more often: they are cheap and differ most from the original.
    flexi=flexi(plan.seqhw),
    optim=dict(lr=lr, wd=lr / 10, clip=1.0, schedule=dict(warmup_percent=0.05)),
    checkpoint=dict(every_percent=0.1),
  )


def _goal(plan: FlexifyRecipe) -> Json:
  if plan.embedding is None:
    return dict(name="distill")
  return dict(name="distill_embeddings", output=plan.embedding)


def embedding_of(model: FlexiViT, record: Json, two_towers: bool = False) -> str | None:
  """Returns the output that is the embedding of a model without classes; None: it has classes.

  Args:
    model, record: see `weights.load_with_record`.
    two_towers: whether the file has a text tower, too, so that a head is a projection.
  """
  if not model.num_classes:
    return "pre_logits"
  return "logits" if two_towers or record.get("projection") else None


def flexi(sizes: tuple[SeqHw, ...]) -> Json:
  """The section of the sizes; where one is not square, all are grids."""
  if not any(isinstance(size, tuple) for size in sizes):
    return dict(seqhw=dict(v=sizes, share="flops"))
  grids = tuple(size if isinstance(size, tuple) else (size, size) for size in sizes)
  return dict(grid_hw=dict(v=grids, share="flops"))


def _without_image(teacher: Json) -> Json:
  return {k: v for k, v in teacher.items() if k != "image"}


def fields_of(model: FlexiViT) -> Json:
  """Returns the resolved fields of a model."""
  skipped = (*UNNAMED, "variant")
  return {k: getattr(model, k) for k in model.__dataclass_fields__ if k not in skipped}


def both(sides: tuple[int, int]) -> str:
  """Returns preprocessing that resizes one crop for student and teacher."""
  student, teacher = sides
  key = f"key='{TEACHER_IMAGE}'"
  return (
    f"copy('image', '{TEACHER_IMAGE}')|resize({student}, method='cubic')|value_range(-1, 1)"
    f"|resize({teacher}, method='cubic', {key})|value_range(-1, 1, {key})|keep('image', '{TEACHER_IMAGE}')"
  )


def central(side: int, key: str = "image") -> str:
  """Returns preprocessing of an evaluation: the central nine tenths of the shorter side."""
  at = f", key='{key}'"
  return f"resize_small({int(side / _CROP)}, method='cubic'{at})|central_crop({side}{at})|value_range(-1, 1{at})"


def evaluation(plan: FlexifyRecipe) -> Json:
  """Returns a section of `evals`: agreement with the teacher, and accuracy if there are labels; or embeddings."""
  side, native = plan.sides
  pp = f"decode|copy('image', '{TEACHER_IMAGE}')|{central(side)}|{central(native, TEACHER_IMAGE)}"
  keys = f"'image', '{TEACHER_IMAGE}'"
  if plan.labelled:
    pp, keys = f"{pp}|onehot({plan.num_classes})", f"{keys}, 'labels'"
  compared: Json = dict(type="distance", labels=plan.labelled)
  if plan.embedding is not None:
    compared = dict(type="embedding_distance", output=plan.embedding, k=NEIGHBOURS)
    compared |= {} if plan.anchors is None else {"anchors": plan.anchors}
  return dict(
    **compared,
    data=plan.sources["test"],
    pp=f"{pp}|keep({keys})",
    batch_size=plan.batch_size,
    seqhw=plan.seqhw,
    teacher=plan.teacher,
    **plan.skipping,
  )


def labelled(plan: FlexifyRecipe, side: int) -> str:
  """Returns preprocessing of labelled images for a model of this resolution."""
  return f"decode|{central(side)}|onehot({plan.num_classes})|keep('image', 'labels')"


def describe(plan: FlexifyRecipe, student: FlexiViT, record: Json, trained: bool) -> Json:
  """Returns the fields of the new model's record that differ from the original's."""
  return sizes_of(plan, trained) | {
    "model": fields_of(student)
    | {"patch_size": list(student.patch_size), "posemb_size": list(student.posemb_size)},
    "pp": f"decode|{central(plan.sides[0])}",
    "flexified_from": {
      "patch_size": list(record["native_patch_size"]),
      "grid": list(record["native_grid"]),
    },
  }


def sizes_of(plan: FlexifyRecipe, trained: bool) -> Json:
  """Returns the fields of the new model's record that tell its images and the sizes of its training."""
  side = plan.sides[0]
  drawn = [list(s) if isinstance(s, tuple) else s for s in plan.seqhw]
  return {
    "image_size": [side, side],
    "image_shape": [side, side, 3],
    "trained": {"seqhw": drawn} if trained else {},
  }
