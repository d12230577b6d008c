"""Which classes the labels, the logits and the teachers of a run are: all of one list of names, in one order."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from flexivit_jax import data, errors
from flexivit_jax.config import Section
from flexivit_jax.data import class_names, label_maps
from flexivit_jax.data.class_names import Classes, Trained
from flexivit_jax.models import Model
from flexivit_jax.objectives.distill import Teacher, reordered


class Labelled(NamedTuple):
  """What a run's classes are.

  Attributes:
    source: the training data, whose labels are the model's classes.
    data_names: the names of the training data's own classes; None: they have none.
    model: the classes of the model's logits.
    teachers: those given, whose logits are of the same classes in the same order.
    notes: what the user should know.
  """

  source: data.Source
  data_names: tuple[str, ...] | None
  model: Classes
  teachers: dict[str, Teacher]
  notes: list[str]


def classes_of(source: data.Source, where: str) -> Classes:
  """The classes of a data set; `where` is its section in the config."""
  of = f"{where} ({source.name} {source.split!r})"
  return Classes(source.class_names, source.num_classes, of)


def of_run(
  source: data.Source,
  num_classes: int,
  *,
  init: Classes | None,
  teachers: Mapping[str, Teacher],
  labels: bool,
  trained: Trained | None = None,
) -> Labelled:
  """Decides of which classes the model's logits are, and makes labels and teachers follow.

  The names are those of the checkpoint that the run goes on from; else those of the weights that it starts from, of
  which it keeps the head; else those of the teachers, where there are no labels; else those of the data.

  Args:
    source: the training data.
    num_classes: of the model.
    init: classes of the head that the run starts from; None: it starts from a new one.
    teachers: by name.
    labels: whether the objective takes labels.
    trained: what the checkpoint says that the run goes on from.

  Raises:
    UserError: labels or teachers of other classes; data of other classes than those of the checkpoint.
  """
  notes: list[str] = []
  if trained is not None:
    source = _as_trained(source, num_classes, trained, labels)
  elif init is not None and init.names is None and init.by_text and labels:
    source = _in_text_order(source)
  data_names = source.class_names
  model = _model(source, num_classes, init, teachers, labels, trained)
  if labels and model.names is not None:
    source, note = fit(source, model, "input.data")
    notes += [note] if note else []
  ordered = {}
  for name, teacher in teachers.items():
    ordered[name], note = teacher_in_order(teacher, model, f"objective.teachers.{name}")
    notes += [note] if note else []
  if init is not None and init.names is None and trained is None and labels:
    note = class_names.match(classes_of(source, "input.data"), init).note
    notes += [note] if note else []
  return Labelled(source, data_names, model, ordered, notes)


def fit(
  source: data.Source, model: Classes, where: str, advice: str = ""
) -> tuple[data.Source, str | None]:
  """Returns the source with labels that are classes of the model, and what the user should know.

  Args:
    source: labelled data.
    model: the classes that the labels should be of.
    where: the section of the data in the config, for messages.
    advice: what to do where they do not fit, beside what is said anyway.

  Raises:
    UserError: the source has a class that the model has not.
  """
  if model.names is None and model.by_text and source.name == "folder":
    return _in_text_order(source), None
  ours = classes_of(source, where)
  match = class_names.match(ours, model, advice=f"{advice} {_advice(ours, model)}".strip())
  if match.labels is None or model.names is None:
    return source, match.note
  return data.renumber(source, match.labels, model.number, model.names), match.note


def teacher_in_order(teacher: Teacher, model: Classes, where: str) -> tuple[Teacher, str | None]:
  """Returns the teacher with logits in the order of the model's classes, and what the user should know.

  Raises:
    UserError: a teacher of other classes.
  """
  number = teacher.model.num_classes
  if number != model.number:
    return teacher, None  # refused elsewhere, where no evaluator takes it
  theirs = Classes(teacher.class_names, number, f"the teacher of {where}")
  again = "If they are the same classes in the same order, add by_number=True to the teacher."
  match = class_names.match(model, theirs, advice=again)
  if match.labels is None:
    return teacher, match.note
  return reordered(teacher, match.labels, model.names), match.note


def of_evaluation(
  section: Section, source: data.Source, classes: Sequence[Classes]
) -> tuple[data.Source, Teacher | None, tuple[str, ...]]:
  """Returns an evaluation's data with labels of the model's classes, its teacher (None: it has none), and notes.

  Args:
    section: of a config's `evals`, its teacher loaded; one that fits no classifier of its own.
    source: its data.
    classes: those of the model, then those of its training data; none: labels are as they are.

  Raises:
    UserError: labels or a teacher of other classes.
  """
  kind, teacher = section.get("type", "classification"), section.get("teacher")
  without_classes = kind in (*OF_TEXTS, "embedding_distance")
  if not classes or section.get("label_map") is not None or without_classes:
    return source, teacher, ()
  # Fewer names than logits, and no names for all of these: the labels are then those of the training data.
  named = [c for c in classes[1:] if c.number == source.num_classes]
  target = named[0] if named and classes[0].names is None and not classes[0].by_text else classes[0]
  notes = []
  if kind == "teacher":
    target = Classes(teacher.class_names, teacher.model.num_classes, "the teacher")
  elif teacher is not None:
    teacher, note = teacher_in_order(teacher, target, "the evaluation")
    notes.append(note)
  if kind != "distance" or section.get("labels"):
    mapped, note = fit(source, target, "data")
    if mapped is not source:
      check_onehot(section["pp"], mapped.num_classes)
    source = mapped
    notes.append(note)
  return source, teacher, tuple(note for note in notes if note)


OF_TEXTS = (
  "retrieval",
  "zero_shot",
)  # evaluators that compare images with texts, of no class of the model
# Keys of an evaluation that say how the names of classes become queries of a detector.
OF_QUERIES = ("templates", "vectors", "canonical", "same_names")


def classes_for(
  section: Section, model: Model, classes: tuple[Classes, ...]
) -> tuple[Classes, ...]:
  """Returns the classes to which the labels of an evaluation are mapped; none where a detector is asked for its names.

  Args:
    section: of a config's `evals`.
    model: the model.
    classes: those of the model, then those of its training data.
  """
  asked = section.get("type") == "detection" and "queries" in model.inputs
  return () if asked else classes


def check_onehot(pp: str, num_classes: int) -> None:
  """Raises a UserError where preprocessing has no room for all classes that labels were mapped to."""
  for op in data.parse(data.counted(pp, num_classes)).ops:
    name, depth = op.text.partition("(")[0], op.kwargs.get("depth", op.args[0] if op.args else None)
    if name in ("onehot", "multihot") and isinstance(depth, int) and depth < num_classes:
      counts = (
        ", or onehot(), which counts them (configs/folder.py: leave num_classes out)"
        if name == "onehot"
        else ""
      )
      raise errors.UserError(
        f"pp has {op.text}, but the labels are of the {num_classes} classes of the model: give"
        f" {name}({num_classes}){counts}."
      )


def alike(
  train: data.Source, test: data.Source
) -> tuple[data.Source, data.Source, tuple[str, ...]]:
  """Returns what an evaluator is fitted to and what it is tested on, with the same labels, and notes.

  Raises:
    UserError: the second has a class that the first has not.
  """
  if train.num_classes != test.num_classes and None in (train.class_names, test.class_names):
    raise errors.UserError(
      f"train_data is {train.name} {train.split!r} with {train.num_classes} classes, data {test.name} {test.split!r}"
      f" with {test.num_classes}; expected the same classes under the same names."
    )
  test, note = fit(test, classes_of(train, "train_data"), "data")
  return train, test, (note,) if note else ()


def _as_trained(
  source: data.Source, num_classes: int, trained: Trained, labels: bool
) -> data.Source:
  """The training data in the order that they had, where the checkpoint does not say it by the model's classes."""
  names = trained.data
  if not trained.recorded and labels and source.num_classes == num_classes:
    names = trained.model.names
  class_names.check_unchanged(classes_of(source, "input.data"), trained._replace(data=names))
  if trained.model.names is not None or source.class_names is None:
    return source
  if not trained.recorded:
    return _in_text_order(source)
  if trained.data is None:
    return source
  then = Classes(trained.data, len(trained.data), trained.of)
  return fit(source, then, "input.data")[0]


def _model(
  source: data.Source,
  num_classes: int,
  init: Classes | None,
  teachers: Mapping[str, Teacher],
  labels: bool,
  trained: Trained | None,
) -> Classes:
  if trained is not None and (trained.model.names is not None or trained.recorded):
    return trained.model
  if trained is None and init is not None and init.names is not None:
    return init
  taught = [
    Classes(t.class_names, num_classes, f"the teacher of objective.teachers.{name}")
    for name, t in teachers.items()
    if t.class_names is not None and t.model.num_classes == num_classes
  ]
  named = source.class_names is not None and source.num_classes == num_classes
  if taught and not (labels and named):
    return taught[0]
  return Classes(source.class_names if named else None, num_classes, "the model")


def _in_text_order(source: data.Source) -> data.Source:
  """Class folders as they were ordered before numbers were: what a run did that did not record their names."""
  if source.name != "folder" or source.class_names is None:
    return source
  names = class_names.by_text(source.class_names)
  if names == source.class_names:
    return source
  labels = [names.index(name) for name in source.class_names]
  return data.renumber(source, labels, source.num_classes, names)


def _advice(ours: Classes, model: Classes) -> str:
  """What can be done about data that have classes that the model has not."""
  if ours.names is None or (model.names is None and ours.number > model.number):
    return f"Give data of {model.number} classes."
  if model.names is None:
    return "If they are its first classes in the same order, add by_number=True to the section of the data."
  maps = [
    f"label_map={name!r}"
    for name in label_maps.LABEL_MAPS
    if (table := label_maps.label_map(name)).model_classes == model.number
    and ours.number in table.labels
    and ours.number != model.number
  ]
  advice = f"If they are classes of ImageNet, evaluate with {' or '.join(maps)}. " if maps else ""
  advice += "Give the data the names that the model has, without others"
  if ours.number == model.number:
    advice += (
      "; or if they are the same classes in the same order already, add by_number=True to the config's section of the"
      " data"
    )
  return f"{advice}."
