"""What a server serves: the programs of a checkpoint or an artifact, and how its images and answers look."""

import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from flexivit_jax import errors, trees, weights
from flexivit_jax.data import class_names
from flexivit_jax.inference import features, predictor, programs, queries, shapes, texts
from flexivit_jax.models import TwoTowers
from flexivit_jax.serving.engine import Program
from flexivit_jax.serving.pictures import Pictures, of as pictures_of
from flexivit_jax.sizes import SeqHw, from_text, size_text
from flexivit_jax.trees import Json
from flexivit_jax.weights.export import artifact

WHAT = ("predict", "embed")
NAMES = 256  # in a request
_TEXTS = 16  # texts that are embedded at a time


class Served(NamedTuple):
  """A model that can be served.

  Attributes:
    name: of the checkpoint, without its folder.
    prepare: bytes of a file -> [h, w, c].
    shape: of what `prepare` gives.
    sizes: that it may be served at; none: it does not say.
    what: of `WHAT`, what it can do.
    classes: names of its classes, "" for those without; none where classes are texts.
    program: (what, size, images) -> a compiled program.
    names: makes what turns names and the name of templates into classes, compiled; None: not of two towers.
    digest: of the weights that images go through, as a profile has it; "" of an artifact.
    weights: of all weights, as a cascade has it.
    loaded: the checkpoint; None of an artifact.
    pictures: of a model that gives masks or boxes, None of others.
  """

  name: str
  prepare: predictor.Prepare
  shape: tuple[int, int, int]
  sizes: tuple[SeqHw, ...]
  what: tuple[str, ...]
  classes: Sequence[str]
  program: Callable[[str, SeqHw, int], Program]
  names: Callable[[], Callable[[Sequence[str], str], texts.Names]] | None = None
  digest: str = ""
  weights: str = ""
  loaded: predictor.Loaded | None = None
  pictures: Pictures | None = None


def load(
  path: str | pathlib.Path,
  image_size: int | None = None,
  *,
  way: programs.Way = programs.PLAIN,
  names: Sequence[str] | None = None,
  **loading: Any,
) -> Served:
  """Loads a checkpoint, or an artifact (.zip).

  Args:
    path: what `weights.load` takes, or an artifact.
    image_size: see `predictor.load`.
    way: what runs it; in onnxruntime it has no features.
    names: the classes of a detector that takes names.
    **loading: see `weights.load`.

  Raises:
    UserError: it cannot be loaded; an artifact, masks or boxes in another way than the plain one; its images have
      no common shape; names for a model that takes none at the start, or none for a detector that does.
  """
  if pathlib.Path(path).suffix == ".zip":
    if way != programs.PLAIN or names is not None:
      raise errors.UserError(
        f"{path} is an artifact, which XLA runs as it is; leave --way and --names out."
      )
    return _of_artifact(pathlib.Path(path), image_size)
  if weights.tasks.is_whole(path):
    if way != programs.PLAIN:
      raise errors.UserError(
        f"{path} gives masks or boxes, which XLA computes in float32; leave --way out."
      )
    return _of_pictures(path, image_size, names, loading)
  if names is not None:
    raise errors.UserError(
      f"--names are for detectors; {path} takes names with a request, or has classes of its own."
    )
  return _of_classes(path, image_size, way, loading)


def _of_classes(
  path: str | pathlib.Path, image_size: int | None, way: programs.Way, loading: Json
) -> Served:
  """A model that gives classes, of its own or of names that come with a request, and features."""
  loaded = _with_texts(path, image_size, **loading)
  digest = weights.towers.digest(loaded.model, loaded.params)
  all_weights = trees.digest(loaded.params)
  weights.print_notes(loaded.record)
  loaded = loaded._replace(params=jax.device_put(loaded.params))  # once, not for each program
  towers = isinstance(loaded.model, TwoTowers)
  shape = shapes.common(loaded.prepare, loaded.name)

  def program(what: str, size: SeqHw, batch: int) -> Program:
    fn: programs.Fn = features.features
    if what == "predict":
      fn = texts.embedding if towers else programs.probabilities
    return programs.compiled(loaded, fn, size, batch=batch, shape=shape, way=way).run

  def of_requests() -> Callable[[Sequence[str], str], texts.Names]:
    vectors = texts.compiled(loaded, _TEXTS)
    return lambda listed, templates: texts.of_names(loaded, listed, templates, vectors)

  has_classes = bool(loaded.model.num_classes) and not loaded.record.get("projection")
  what: tuple[str, ...] = WHAT if towers or has_classes else ("embed",)
  if way.runtime == "onnx":
    what = tuple(one for one in what if one == "predict")
  return Served(
    name=pathlib.Path(loaded.name).name,
    prepare=loaded.prepare,
    shape=shape,
    sizes=predictor.sizes.trained(loaded.record),
    what=what,
    classes=predictor.names_of(loaded) if has_classes and not towers else (),
    program=program,
    names=of_requests if towers else None,
    digest=digest,
    weights=all_weights,
    loaded=loaded,
  )


def _of_pictures(
  path: str | pathlib.Path, image_size: int | None, names: Sequence[str] | None, loading: Json
) -> Served:
  """A model that gives masks or boxes."""
  loaded = predictor.load(path, image_size, texts=bool(names), whole=True, **loading)
  if predictor.gives_boxes(loaded.model):
    loaded = queries.closed(loaded, queries.Asked(names))
    shape = shapes.common(loaded.prepare, loaded.name)
  else:
    if names is not None:
      raise errors.UserError(
        f"--names are for detectors; {path} gives masks of classes of its own."
      )
    shape = shapes.of_training(loaded.prepare, loaded.record, loaded.name)
  weights.print_notes(loaded.record)
  loaded = loaded._replace(params=jax.device_put(loaded.params))
  found = pictures_of(loaded)

  def program(what: str, size: SeqHw, batch: int) -> Program:
    del what
    return programs.compiled(loaded, found.fn, size, batch=batch, shape=shape).run

  return Served(
    name=pathlib.Path(loaded.name).name,
    prepare=loaded.prepare,
    shape=shape,
    sizes=predictor.sizes.trained(loaded.record),
    what=("predict",),
    classes=predictor.names_of(loaded),
    program=program,
    digest=weights.towers.digest(loaded.model, loaded.params),
    weights=trees.digest(loaded.params),
    loaded=loaded,
    pictures=found,
  )


def _with_texts(
  path: str | pathlib.Path, image_size: int | None, **loading: Any
) -> predictor.Loaded:
  """Both towers, where there are two and texts can be encoded; else the model of images."""
  try:
    loaded = predictor.load(path, image_size, texts=True, **loading)
  except errors.UserError:
    return predictor.load(path, image_size, **loading)
  return loaded if loaded.record.get("text") else predictor.load(path, image_size, **loading)


def _of_artifact(path: pathlib.Path, image_size: int | None) -> Served:
  try:
    loaded = artifact.load_artifact(path)
  except ValueError as e:
    raise errors.UserError(str(e)) from e
  record = loaded.record
  if record["format"] != artifact.FORMATS[0] or loaded.text is not None:
    raise errors.UserError(
      f"{path} gives masks, boxes, or embeddings of two towers; an artifact that is served gives classes. Serve two"
      " towers from their checkpoint."
    )
  prepare = predictor.preparer(
    weights.preparation(record, image_size), int(record["image_shape"][2])
  )
  number = int(record["outputs"])
  known = class_names.of_record(record, number, f"the artifact {path}")

  def program(what: str, size: SeqHw, batch: int) -> Program:
    del what
    calls: Any = loaded.programs[
      size
    ]  # a partial: a jitted function and the weights, its first argument
    images = np.zeros((batch, *record["image_shape"]), np.float32)
    jitted = jax.jit(lambda params, images: jax.nn.softmax(calls.func(params, images)))
    compiled = jitted.lower(*calls.args, images).compile()
    return lambda images: np.asarray(compiled(*calls.args, images))

  return Served(
    name=path.name,
    prepare=prepare,
    shape=shapes.common(prepare, str(path)),
    sizes=tuple(from_text(s) for s in record["sizes"]),
    what=("predict",),
    classes=known.names or [""] * number,
    program=program,
  )


def sizes(served: Served, text: str | None, of_profile: Sequence[SeqHw] = ()) -> tuple[SeqHw, ...]:
  """Returns the sizes to serve: those of --seqhw, else of the profile, else those that the model says.

  Raises:
    UserError: there are none; one that an artifact does not have, or that does not divide the images.
  """
  listed = of_profile or served.sizes
  lacking = f"{served.name} does not say at which sizes it was trained, and has no profile"
  found = tuple(dict.fromkeys(predictor.sizes.parse(text or "all", listed, lacking)))
  if not served.digest and (other := [size for size in found if size not in served.sizes]):
    has = ", ".join(str(size_text(size)) for size in served.sizes)
    raise errors.UserError(f"seqhw={size_text(other[0])} is not in {served.name}; it has {has}.")
  for size in found if served.loaded else ():
    served.loaded.model.grid(served.shape[:2], **predictor.sizes.size_args(size))
  return found
