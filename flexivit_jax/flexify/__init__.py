"""Turns a fixed Vision Transformer into a FlexiViT by self-distillation; images need no labels.

The student starts from the model's own weights. At each step a patch size is drawn, and the student's logits there are
trained towards those of the original at its native size, on the same crops: the paper's distillation (FlexiViT, arXiv
2212.08013) with the model as its own teacher. A model without classes (CLIP, SigLIP, DINOv2) teaches its embeddings.
A detector teaches its boxes and scores (`detector`). Agreement with the original is measured at every size, before and
after.
"""

import contextlib
import pathlib
from collections.abc import Iterator, Sequence

from flexivit_jax import data, errors, train, weights
from flexivit_jax.data import class_names
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import loaders
from flexivit_jax.flexify import card, detector, layout, recipe, retention
from flexivit_jax.inference import predictor, texts
from flexivit_jax.models import FlexiViT, TwoTowers
from flexivit_jax.running import distributed, session
from flexivit_jax.sizes import SeqHw
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import model_records

SIZES = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # the paper's, of 240 pixels


@contextlib.contextmanager
def _advice() -> Iterator[None]:
  """Adds to the error of a damaged image the option of this command that skips it."""
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
  image_size: int | None = None,
  seqhw: Sequence[SeqHw] | None = None,
  batch_size: int = 16,
  lr: float | None = None,
  seed: int = 0,
  buffers: tuple[int, ...] | None = None,
  moment: bool = False,
  on_error: str = "raise",
  names: Sequence[str] = (),
  vectors: pathlib.Path | None = None,
  loading: Json | None = None,
) -> Json:
  """Writes OUT/model.npz, OUT/retention.json, OUT/README.md (the model card) and OUT/run.

  Of two towers the image tower becomes flexible; model.npz holds the text tower and the tokenizer as they were.

  Args:
    init: a model, as `weights.load` takes it: one with classes teaches their logits, another its embeddings.
    images: any folder of images; `layout.divide` chooses the held-out ones. Labels are for measuring only.
    out: the output folder; the same command resumes a run that was stopped.
    epochs: passes over the training images; 0 resizes and measures without training.
    image_size: pixels a side of the student's images, default 240, of a detector its own; the teacher keeps its native
      size.
    seqhw: tokens per side or (per column, per row), the sizes to draw and to measure; default `SIZES`, see
      `detector.flexify`.
    batch_size, lr, seed: of the training; default of lr: `recipe.LR`.
    buffers: sides of the stored kernel (pixels) and position grid (cells); default: the model's own, so that its
      output at the native size does not change.
    moment: resizes the kernel for patches like those of the training images, not for white noise; see
      `resize.second_moment`. Matters when the kernel shrinks.
    on_error: "raise" at a damaged image, or "skip" it.
    names: texts; of a detector that takes texts what it looks for, see `detector.flexify`; of two towers it is measured
      how often an image is nearest to the same one as by the original.
    vectors: of the names, of a detector without a text tower, see `queries.Asked`.
    loading: further arguments of `weights.load`.

  Returns:
    The content of retention.json; see `retention.measure`. "note" says why top-1 is missing, or is by class number.

  Raises:
    UserError: no images, a size that does not divide the image; files of another origin in `out`;
      names without a text tower or its tokenizer.
  """
  loading = dict(loading or {})
  distributed.on_first(lambda: _check_out(out), "--out")
  if detector.is_one(init):
    if buffers is not None or moment:
      raise errors.UserError(
        "A detector keeps its stored kernel; leave --buffers and --moment out."
      )
    return detector.flexify(
      init, images, out, epochs=epochs, image_size=image_size, seqhw=seqhw, batch_size=batch_size, lr=lr,
      seed=seed, on_error=on_error, names=names, vectors=vectors, loading=loading,
    )  # fmt: skip
  if vectors is not None:
    raise errors.UserError(f"--vectors={vectors} is for detectors; {init} gives no boxes.")
  image_size, seqhw = image_size or 240, SIZES if seqhw is None else seqhw
  section = dict(checkpoint=str(init), image=recipe.TEACHER_IMAGE, **loading)
  teacher = distributed.each(lambda: loaders.load_teacher(**section), "its model")
  _, _, record = weights.load_with_record(init, **loading)
  two_towers = distributed.each(lambda: _has_text(init), "its text tower")
  divided = distributed.each(
    lambda: layout.divide(images, batch_size if epochs else None), "its images"
  )
  for line in divided.notes:
    session.note(line)
  plan = recipe.FlexifyRecipe(
    teacher=section,
    sources=divided.sources,
    num_classes=teacher.model.num_classes,
    sides=(image_size, recipe.native_side(record)),
    seqhw=tuple(seqhw),
    batch_size=batch_size,
    known=class_names.of_record(record, teacher.model.num_classes, "the model"),
    on_error=on_error,
    embedding=recipe.embedding_of(teacher.model, record, two_towers),
    anchors=_anchors(init, names, loading) if names else None,
  )
  lr = recipe.LR["classes" if plan.embedding is None else "embeddings"] if lr is None else lr
  student = recipe.student_of(teacher.model, buffers)
  if moment:
    size = (image_size, max(student.patch_size))
    student = student.clone(kernel_moment=recipe.moment_of(plan.sources["train"], *size, on_error))
  params = loaders.load_init(student, checkpoint=str(init), **loading).params
  mesh = sharding.make_mesh()
  scores: Json = {"original": retention.original(plan, teacher, mesh)}
  if note := recipe.labels_of(plan)[1]:
    scores["note"] = note
  scores["before"] = retention.measure(plan, student, params, mesh)
  if epochs:
    train.train(recipe.settings(plan, student, epochs=epochs, lr=lr, seed=seed), out / "run")
    _, params = weights.load(out / "run", scan=False)
    scores["after"] = retention.measure(plan, student, params, mesh)
  new = recipe.describe(plan, student, record, trained=epochs > 0)
  made = student, params, record | new
  if two_towers:
    made = _with_text(weights.towers.load(init, **loading), student, params, new)
  facts = dict(
    init=init.name, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, moment=moment
  )

  def write() -> None:
    card.write(out, scores, made, card.text(plan, student, scores, facts))

  distributed.on_first(write, f"the folder {out}")
  return scores


def _anchors(
  init: pathlib.Path, names: Sequence[str], loading: Json
) -> tuple[tuple[float, ...], ...]:
  """Embeddings of names by the text tower, which does not change."""
  whole = predictor.load(init, texts=True, **loading)
  return tuple(map(tuple, texts.of_names(whole, names).vectors.tolist()))


def _has_text(init: pathlib.Path) -> bool:
  """Whether a file has a text tower that we can keep; prints why not where it has another."""
  try:
    return weights.towers.text_of(init) is not None
  except errors.UserError as e:
    session.note(f"the text tower is left out: {e}")
    return False


def _with_text(
  whole: tuple[TwoTowers, Params, Json], student: FlexiViT, params: Params, new: Json
) -> tuple[TwoTowers, Params, Json]:
  """Two towers with the student in the place of the image tower; the other one, and the tokenizer, as they were.

  Args:
    whole: the original, as `weights.towers.load` returns it.
    student, params: the image tower.
    new: what the record says of it, see `recipe.describe`.
  """
  model, both, record = whole
  fields = {name: value for name, value in recipe.fields_of(student).items() if name != "dtype"}
  model = model.clone(image=fields)
  record = record | new | {"model": model_records.record_of(model)}
  return model, {**both, "image": params}, record


def _check_out(out: pathlib.Path) -> None:
  """Raises a UserError for files of another origin; retention.json says that they are of this command."""
  for name in ("model.npz", "README.md"):
    if (out / name).exists() and not (out / "retention.json").exists():
      raise errors.UserError(
        f"{out / name} is there already, of something else; give another --out."
      )
