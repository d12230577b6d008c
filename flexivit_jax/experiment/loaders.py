"""Opens the files a config refers to: data sets, teachers, initial weights. `plan` replaces these by stand-ins."""

import dataclasses
import json
import shlex
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from flexivit_jax import data, errors, trees, weights
from flexivit_jax.config import Section
from flexivit_jax.data import class_names
from flexivit_jax.data.class_names import Classes
from flexivit_jax.data.text import Tokens
from flexivit_jax.models import MODELS, UNNAMED, FlexiViT, Model, TextTower, vit_part
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.training import steps
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import text as text_weights


class Init(NamedTuple):
  """Parameters to start from, and the classes of their head; None: they have no head that is used."""

  params: Params | None
  classes: Classes | None


class Opening(NamedTuple):
  """How files are opened: really, or only as far as shapes need it.

  Attributes:
    source: as `data.make_source`.
    teacher: as `load_teacher`.
    init: as `load_init`.
    parts: as `load_parts`.
    fields: as `fields_of`.
    digest: of a teacher's parameters.
    shots: `(source, section) -> source` of the few images that an evaluator is fitted to.
    tokens: as `preprocess.tokens_of`.
  """

  source: Callable[..., data.Source]
  teacher: Callable[..., Teacher]
  init: Callable[..., Init]
  parts: Callable[..., Init]
  fields: Callable[..., Json]
  digest: Callable[[Params], str]
  shots: Callable[..., data.Source]
  tokens: Callable[[str], Tokens | None]


def sharing(opening: Opening) -> Opening:
  """Returns loaders that open a teacher once, however many sections name it."""
  opened: dict[str, Teacher] = {}

  def teacher(**section: Any) -> Teacher:
    key = json.dumps(section, sort_keys=True, default=str)
    if key not in opened:
      opened[key] = opening.teacher(**section)
    return opened[key]

  return opening._replace(teacher=teacher)


def build_model(section: Section, num_classes: int) -> tuple[Model, Json]:
  """Returns the model, and the JSON-able record from which it can be built again."""
  record = {"name": "flexivit", "num_classes": num_classes, **section}
  return MODELS[record["name"]](**{k: v for k, v in record.items() if k != "name"}), record


# Fields that a run chooses for itself, whatever file its model is like.
_OWN = (
  "num_classes", "variant", "dtype", "scan", "remat", "attention", "dropout", "stochastic_depth", "head_zeroinit",
)  # fmt: skip


def fields_of(checkpoint: str, **options: Any) -> Json:
  """Returns the fields of the model in a file, without those that a run chooses for itself.

  Args:
    checkpoint: what `weights.load` takes.
    **given: arguments of `weights.load`.
  """
  model, _ = weights.load(checkpoint, **options)
  names = (f.name for f in dataclasses.fields(model) if f.init)
  return {name: getattr(model, name) for name in names if name not in (*_OWN, *UNNAMED)}


def model_like(
  section: Section,
  init: Section | None,
  fields: Callable[..., Json] = fields_of,
) -> Json:
  """Returns a config's section of a model, in which the fields of the file under `like` stand in its place.

  Args:
    section: fields of a model; where there is `like`, those that are to differ from the file's. So may be the fields
      of a part of a model, as of a Segmenter's backbone.
    init: the section of weights to start from; of the same file, it says how that is read.
    fields: as `fields_of`.

  Raises:
    UserError: see `weights.load`; a variant beside `like`.
  """
  chosen = {k: v for k, v in section.items() if k != "like"}
  like = section.get("like")
  if like is None:
    parts = {k: v for k, v in chosen.items() if isinstance(v, Mapping) and "like" in v}
    return chosen | {k: model_like(v, (init or {}).get(k), fields) for k, v in parts.items()}
  if "variant" in chosen:
    raise errors.UserError(
      f"Got variant={chosen['variant']!r} and like={like!r}, which both say what model it is; give one of them."
    )
  same = init is not None and init.get("checkpoint") == like
  reading = {k: v for k, v in (init or {}).items() if same and k not in _NOT_READING}
  if "num_heads" in chosen:
    reading["num_heads"] = chosen["num_heads"]
  return fields(like, **{k: v for k, v in reading.items() if v is not None}) | chosen


_NOT_READING = ("checkpoint", "new_head", "by_number")


def default_dtype() -> str:
  """The dtype of matrix products that this backend is fast in: a run's, where its config gives none."""
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def load_teacher(
  *,
  checkpoint: str | None = None,
  model: Section | None = None,
  image: str = "image",
  seqhw: int | None = None,
  num_heads: int | None = None,
  gelu: str | None = None,
  posemb_size: tuple[int, int] | None = None,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  ema: bool = False,
  by_number: bool = False,
  whole: bool = False,
) -> Teacher:
  """Loads a teacher.

  Args:
    checkpoint: what `weights.load` takes.
    model: fields of the model that it must hold, by which a run can be planned without the file. Without a
      checkpoint: of a model with random weights, to try a config.
    image: key of the batch under which it finds its image, of its own resolution.
    seqhw: tokens per side at which it runs; default: its own patch size.
    num_heads, gelu, posemb_size, mean, std, ema: as in `weights.load`.
    by_number: leave the names of its classes out, so that they are the model's by number.
    whole: of a model of parts, all of it, as `distill_detection` takes it; else its FlexiViT.

  Raises:
    UserError: neither checkpoint nor model; a checkpoint of another model.
  """
  names = None
  network: Model
  if checkpoint is not None:
    options = _given(num_heads, gelu, posemb_size, mean, std, ema)
    read = weights.tasks.load if whole else weights.load_with_record
    network, params, record = read(checkpoint, **options)
    _print_notes(record)
    names = class_names.of_record(record, network.num_classes, str(checkpoint)).names
    _check_model(network, model or {}, checkpoint)
  elif model is not None:
    own = {"head_zeroinit": False} if model.get("name", "flexivit") == "flexivit" else {}
    network, _ = build_model({**own, **model}, num_classes=0)
    params = steps.init_params(
      network, {"image": (8, 8, 3)}, seed=0
    )  # no parameter depends on the image
  else:
    raise errors.UserError("A teacher has neither checkpoint nor model; give one of them.")
  size = {} if seqhw is None else {"seqhw": seqhw}
  names = None if by_number else names
  return Teacher(network, jax.tree.map(np.asarray, params), image, size, names)


def _check_model(stored: Model, section: Section, checkpoint: str) -> None:
  """Raises a UserError that lists the fields in which a model is not the one that a config names."""
  names = (
    {"width", "depth", "mlp_dim", "num_heads", "patch_size"} if "variant" in section else set()
  )
  names |= section.keys() - {"variant", "name"}
  want = build_model({**section}, num_classes=0)[0] if section else stored
  lines = [
    f"{name}: {getattr(stored, name)!r} in the file, {getattr(want, name)!r} in the config"
    for name in sorted(names)
    if getattr(stored, name) != getattr(want, name)
  ]
  if lines:
    raise errors.UserError(f"{checkpoint} is not the model of the config:\n  " + "\n  ".join(lines))


def load_init(
  model: Model,
  *,
  checkpoint: str,
  new_head: bool = False,
  num_heads: int | None = None,
  gelu: str | None = None,
  posemb_size: tuple[int, int] | None = None,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  ema: bool = False,
  by_number: bool = False,
  labels: Classes | None = None,
) -> Init:
  """Returns parameters to start from; kernel and position grid are resized to the model's buffers.

  Args:
    model: the model that they are for.
    checkpoint: what `weights.load` takes.
    new_head: its head is not used, the model's own is drawn: for other classes.
    num_heads, gelu, posemb_size, mean, std, ema: as in `weights.load`.
    by_number: leave the names of its classes out, so that they are the data's by number.
    labels: the classes of the labels that it is trained with, all of which its head has to have; None: there are none.

  Raises:
    UserError: see `weights.load_into`; labels of classes that the head has not; a model that is no FlexiViT.
  """
  if not isinstance(model, FlexiViT):
    raise errors.UserError(
      f"init: {checkpoint} holds a FlexiViT, model.name is that of a {type(model).__name__}; leave init out."
    )
  classes: list[Classes] = []

  def accept(stored: Model, record: Json) -> None:
    _print_notes(record)
    of = f"init ({checkpoint})"
    if new_head or not stored.num_classes:
      return
    head = class_names.of_record(record, stored.num_classes, of)
    classes.append(head._replace(names=None) if by_number else head)
    if labels is not None:
      class_names.match(labels, classes[0], advice=_NEW_HEAD)

  options = _given(num_heads, gelu, posemb_size, mean, std, ema)
  try:
    params = weights.load_into(checkpoint, model, new_head=new_head, accept=accept, **options)
  except weights.OtherModel as e:
    raise errors.UserError(f"{e}\n{_how_to_fit(checkpoint)}") from e
  return Init(jax.tree.map(np.asarray, params), classes[0] if classes else None)


def load_parts(model: Any, labels: Classes | None = None, **sections: Any) -> Init:
  """Returns parameters to start from of a model made of parts, such as two towers.

  Args:
    model: has `parts`.
    labels: as for `load_init`; the parts' own heads are no classifiers, so they are not compared.
    **sections: for each part that starts from a file, the arguments of its function in `PART_LOADERS`; or those of
      `load_whole`, where all start from one file.
  """
  if "checkpoint" in sections:
    return load_whole(model, labels=labels, **sections)
  parts = model.parts
  loaded = {name: _load_part(parts[name], section) for name, section in sections.items()}
  return Init(loaded, None)


def load_whole(
  model: Any,
  *,
  checkpoint: str,
  new_head: bool = False,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
  by_number: bool = False,
  labels: Classes | None = None,
) -> Init:
  """Returns parameters to start from of a model made of parts other than two towers, all of one file.

  Args:
    model: the model that they are for.
    checkpoint: what `weights.tasks.load` takes.
    new_head: what depends on the number of classes is left to the model's own initialisation, for other classes. A
      detector of fixed classes then starts from one that compares images with texts, too.
    mean, std: as in `weights.load`.
    by_number, labels: as for `load_init`.

  Raises:
    UserError: a file of another model, all differences listed; other classes without `new_head`.
  """
  part = vit_part(model)
  assert part is not None  # `load_parts` is for models with one
  options = _given(None, None, None, mean, std, ema=False)
  stored: Any
  stored, params, record = weights.tasks.load(checkpoint, scan=model.parts[part].scan, **options)
  _print_notes(record)
  if type(stored) is not type(model):
    raise errors.UserError(
      f"init: {checkpoint} holds a {type(stored).__name__}, model.name is that of a {type(model).__name__}; where a"
      f" part alone is to start from it, give init.{part}.checkpoint."
    )
  _check_own(stored, model, checkpoint, new_head)
  classes = None
  if stored.num_classes and model.num_classes and not new_head:
    classes = class_names.of_record(record, stored.num_classes, f"init ({checkpoint})")
    classes = classes._replace(names=None) if by_number else classes
    if labels is not None:
      class_names.match(labels, classes, advice=_NEW_HEAD)
  loaded = {part: weights.load_into(checkpoint, model.parts[part], **options)}
  if "text" in model.parts:
    loaded["text"] = text_weights.load_into(checkpoint, model.parts["text"])[0]
  loaded |= _own_arrays(model, params, checkpoint, new_head)
  return Init(jax.tree.map(np.asarray, loaded), classes)


def _check_own(stored: Any, model: Any, checkpoint: str, new_head: bool) -> None:
  """Raises a UserError that lists the fields, but for those of parts, in which the file's model is another."""
  skipped = {*UNNAMED, *model.PARTS, "num_classes", "dtype", "fsdp", "gather_dtype"}
  skipped |= {"decoder_dropout"} | ({"query_length", "unit_queries"} if new_head else set())
  names = [f.name for f in dataclasses.fields(model) if f.name not in skipped]
  lines = [
    f"model.{n}: {getattr(stored, n)!r} in the file, {getattr(model, n)!r} in the config"
    for n in names
    if getattr(stored, n) != getattr(model, n)
  ]
  if "text" in model.parts and "text" not in stored.parts:
    lines.append("model.text: none in the file")
  if "text" in stored.parts and "text" not in model.parts and not new_head:
    lines.append("model.text: none in the config; init.new_head=True leaves the file's out")
  if lines:
    raise errors.UserError(
      f"init: {checkpoint} is of another {type(model).__name__}:\n  " + "\n  ".join(lines)
    )


def _own_arrays(model: Any, params: Params, checkpoint: str, new_head: bool) -> Params:
  """The arrays of a file that are of no part; with `new_head` without those that depend on the number of classes."""
  part = vit_part(model)
  assert part is not None
  channels = params[part]["embedding"]["kernel"].shape[2]
  n = max(model.num_classes, 1)
  few, more = (
    {
      name: array
      for name, array in trees.flatten(tree).items()
      if name.partition("/")[0] not in model.PARTS
    }
    for tree in (weights.tasks.params_of(model.clone(num_classes=k), channels) for k in (n, n + 1))
  )
  own = {k: a for k, a in trees.flatten(params).items() if k.partition("/")[0] not in model.PARTS}
  if new_head:
    few = {name: s for name, s in few.items() if s.shape == more[name].shape}
    own = {name: a for name, a in own.items() if name in few}
  if lines := trees.diff(few, own, max_lines=10**6):
    advice = "" if new_head else f"\n{_NEW_HEAD}"
    raise errors.UserError(
      f"init: {checkpoint} does not fit the model:\n  " + "\n  ".join(lines) + advice
    )
  return trees.unflatten(own)


def _load_part(part: Any, section: Section) -> Params:
  return PART_LOADERS[type(part).__name__](part, **section).params


def load_text(
  model: TextTower,
  *,
  checkpoint: str,
  new_head: bool = False,
  num_heads: int | None = None,
  labels: Classes | None = None,
) -> Init:
  """Returns parameters to start a text tower from; of the file's positions it has the first `model.max_length`.

  Args:
    model: the tower that they are for.
    checkpoint: what `weights.text.load` takes: a BERT, two towers.
    new_head: its head is not used.
    num_heads: as in `weights.text.load`.
    labels: without effect, a text tower's head is no classifier.

  Raises:
    UserError: see `weights.text.load_into`.
  """
  del labels
  params, record = text_weights.load_into(checkpoint, model, num_heads=num_heads, new_head=new_head)
  _print_notes(record)
  return Init(jax.tree.map(np.asarray, params), None)


PART_LOADERS: dict[str, Callable[..., Init]] = {"FlexiViT": load_init, "TextTower": load_text}
"""What fills a part of a model, by the class of the part."""


def _how_to_fit(checkpoint: str) -> str:
  """Returns what to do where the config's model is not that of its initial weights."""
  like = f"--config.model={ {'like': checkpoint} }"
  like = f'"{like}"' if not set('"$`\\!') & set(checkpoint) else shlex.quote(like)
  return (
    "To take the model from the file, with a new head for the classes of the data, add"
    f" {like} --config.init.new_head=True"
  )


_NEW_HEAD = (
  "Give init.new_head=True, by which the head is a new one; or, if they are the same classes in the same order,"
  " init.by_number=True."
)


_printed: set[str] = set()  # per process: init and teacher may be one file


def _print_notes(record: Section) -> None:
  """Prints what a user should know of weights, each note once, from the first process."""
  notes = [note for note in record.get("notes") or [] if note not in _printed]
  _printed.update(notes)
  if jax.process_index() == 0:
    weights.print_notes({"notes": notes})


def _given(
  num_heads: int | None,
  gelu: str | None,
  posemb_size: tuple[int, int] | None,
  mean: tuple[float, ...] | None,
  std: tuple[float, ...] | None,
  ema: bool,
) -> Json:
  """Returns the options of a section for reading weights, as keyword arguments of `weights.load`."""
  values = dict(num_heads=num_heads, gelu=gelu, posemb_size=posemb_size, mean=mean, std=std)
  options = {name: value for name, value in values.items() if value is not None}
  return options | ({"ema": True} if ema else {})


REAL = Opening(
  data.make_source, load_teacher, load_init, load_parts, fields_of, trees.digest, data.few_shots,
  data.tokens_of,
)  # fmt: skip
