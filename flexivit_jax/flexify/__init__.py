"""A fixed Vision Transformer becomes a FlexiViT, taught by itself; images need no labels.

The student starts from the model's own weights. At each step a patch size is drawn, and the student's logits there are
trained towards those of the original at its native size, on the same crops: the paper's distillation (FlexiViT, arXiv
2212.08013) with the model as its own teacher. What is left of the original is measured at every size, before and after.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Sequence

from flexivit_jax import data, errors, train, weights
from flexivit_jax.data import class_names
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import loaders
from flexivit_jax.flexify import card, layout, recipe, retention
from flexivit_jax.running import session
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Json

SIZES = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # the paper's, of 240 pixels


@contextlib.contextmanager
def _advice() -> Iterator[None]:
  """Says of a damaged image by which option of this command it is left out."""
  try:
    yield
  except data.BadExampleError as e:
    raise errors.UserError(
      f"{e.fact}. Repair it, or give --on_error=skip to leave out what is damaged."
    ) from e


@_advice()
def flexify(
  init: pathlib.Path,
  images: pathlib.Path,
  out: pathlib.Path,
  *,
  epochs: float = 10,
  image_size: int = 240,
  seqhw: Sequence[SeqHw] = SIZES,
  batch_size: int = 16,
  lr: float = 3e-5,
  seed: int = 0,
  buffers: tuple[int, ...] | None = None,
  moment: bool = False,
  on_error: str = "raise",
  loading: Json | None = None,
) -> Json:
  """Writes OUT/model.npz, OUT/retention.json, OUT/README.md (the model card) and OUT/run.

  Args:
    init: what `weights.load` takes; a classifier.
    images: any folder of images; which are held out, `layout.divide` says. Labels measure, they never train.
    out: a folder; the same command continues a run that was stopped.
    epochs: passes over the training images; 0 resizes and measures, and trains nothing.
    image_size: pixels a side of the student's images; the teacher's have its own.
    seqhw: tokens per side or (per column, per row), what is drawn and measured.
    batch_size, lr, seed: of the training.
    buffers: sides of the stored kernel (pixels) and position grid (cells); default: the model's own, with which it
      stays what it was at its native size.
    moment: resize the kernel for patches like those of the training images, not for white noise; see
      `resize.second_moment`. Matters where it shrinks.
    on_error: what a damaged image does: "raise", or "skip" to leave it out.
    loading: further arguments of `weights.load`.

  Returns:
    What is in retention.json; see `retention.measure`. "note" says why top-1 is left out, or is by number.

  Raises:
    UserError: a model without classes, a folder without images, a size that does not divide the image; files in `out`
      that this did not write and would replace.
  """
  loading = dict(loading or {})
  if not (out / "retention.json").exists():  # which the same command writes before these
    for name in ("model.npz", "README.md"):
      if (out / name).exists():
        raise errors.UserError(
          f"{out / name} is there already, of something else; give another --out."
        )
  teacher = loaders.load_teacher(checkpoint=str(init), image=recipe.TEACHER_IMAGE, **loading)
  if not teacher.model.num_classes:
    raise errors.UserError(
      f"{init} has no classes: its logits are what is taught; give a classifier."
    )
  _, _, record = weights.load_with_record(init, **loading)
  divided = layout.divide(images, batch_size if epochs else None)
  for line in divided.notes:
    session.note(line)
  plan = recipe.FlexifyRecipe(
    teacher=dict(checkpoint=str(init), image=recipe.TEACHER_IMAGE, **loading),
    sources=divided.sources,
    num_classes=teacher.model.num_classes,
    sides=(image_size, recipe.native_side(record)),
    seqhw=tuple(seqhw),
    batch_size=batch_size,
    known=class_names.of_record(record, teacher.model.num_classes, "the model"),
    on_error=on_error,
  )
  student = recipe.student_of(teacher.model, buffers)
  if moment:
    length = max(student.patch_size)
    measured = recipe.moment_of(plan.sources["train"], image_size, length, on_error)
    student = student.clone(kernel_moment=measured)
  params = loaders.load_init(student, checkpoint=str(init), **loading).params
  mesh = sharding.make_mesh()
  kept: Json = {"original": retention.original(plan, teacher, mesh)}
  if note := recipe.labels_of(plan)[1]:
    kept["note"] = note
  kept["before"] = retention.measure(plan, student, params, mesh)
  if epochs:
    settings = recipe.settings(plan, student, epochs=epochs, lr=lr, seed=seed)
    train.train(settings, out / "run")
    _, params = weights.load(out / "run", scan=False)
    kept["after"] = retention.measure(plan, student, params, mesh)
  out.mkdir(parents=True, exist_ok=True)
  (out / "retention.json").write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n")
  described = record | recipe.describe(plan, student, record, trained=epochs > 0)
  (out / "model.npz").unlink(missing_ok=True)  # of an earlier start of the same command: see above
  weights.save_npz(out / "model.npz", student, params, described)
  facts = dict(
    init=init.name, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, moment=moment
  )
  (out / "README.md").write_text(card.text(plan, student, kept, facts))
  return kept
