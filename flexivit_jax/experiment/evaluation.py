"""The evaluators of a config: their data, what they need of a model, how often they run."""

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from flexivit_jax import config, data, errors
from flexivit_jax.config import Function, Section
from flexivit_jax.data import class_names
from flexivit_jax.data.loader import Waiting
from flexivit_jax.data.text import Tokens
from flexivit_jax.evaluators.base import Batches, Evaluator
from flexivit_jax.evaluators.classification import table_classes
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.registry import EVALUATORS, metrics_of
from flexivit_jax.experiment import labelling, sections
from flexivit_jax.experiment.loaders import REAL, Opening
from flexivit_jax.models import Model
from flexivit_jax.trees import Json


class Evaluation(NamedTuple):
  """One evaluator of a run. `every` is in steps; a teacher in `section` is loaded.

  `make(model, mesh, waiting)` builds it; `waiting` is entered while a batch is awaited. `check(model)` tries all that
  with the first example, and computes nothing. `batches()` are the images. `notes` are what the user should know of its
  classes.
  """

  make: Callable[..., Evaluator]
  check: Callable[[Model], None]
  batches: Callable[[], Batches]
  every: int
  source: data.Source
  pp: str
  section: Section
  notes: tuple[str, ...] = ()

  @property
  def metrics(self) -> tuple[Metric, ...]:
    """What it measures, the headline first."""
    return metrics_of(self.section)


def build_evaluation(
  where: str,
  section: Section,
  every: int,
  opening: Opening | None = None,
  classes: Sequence[class_names.Classes] = (),
  tokens: Tokens | None = None,
) -> Evaluation:
  """Checks the section of an evaluator and opens its data; its device programs are made later, by `make(model, mesh)`.

  Args:
    where: the name of the section, for errors: "evals.test".
    section: of a config's `evals`.
    every: steps from one evaluation to the next.
    opening: how data and weights are opened; default: `REAL`.
    classes: those of the model, then those of its training data, to which labels are mapped by name; none: labels are
      as they are.
    tokens: how texts become tokens of the model; None: it has no texts, or a run is planned.

  Raises:
    UserError: a wrong key or value; what cannot be opened; labels or a teacher of other classes than the model's.
  """
  sections.check_evaluation(where, section)
  with config.naming(where):
    return _open(section, every, opening or REAL, classes, tokens)


def missing_data(evals: Section) -> dict[str, str]:
  """Returns, of each evaluation whose data cannot be opened, what is wrong; a run would name the first one alone.

  Args:
    evals: of a config, checked.
  """
  lost = {}
  for key, section in evals.items():
    for name in ("data", "train_data"):
      try:
        if section.get(name):
          REAL.source(**section[name])
      except errors.UserError as e:
        lost[key] = str(e)
  return lost


def _open(
  section: Section,
  every: int,
  opening: Opening,
  classes: Sequence[class_names.Classes],
  tokens: Tokens | None,
) -> Evaluation:
  source = opening.source(**section["data"])
  evaluator = EVALUATORS[section.get("type", "classification")]
  if "teacher" in section:
    section = {**section, "teacher": opening.teacher(**section["teacher"])}
  process = dict(process_index=jax.process_index(), process_count=jax.process_count())
  training = None
  if "train_data" in section:
    training, source, notes = labelling.alike(opening.source(**section["train_data"]), source)
  else:
    source, teacher, notes = labelling.of_evaluation(section, source, classes)
    section = section if teacher is None else {**section, "teacher": teacher}
  section = {**section, "pp": data.counted(section["pp"], source.num_classes)}
  few = "shots" in section or section.get("type") == "fewshot"  # others are fitted to all of it
  if training and few:
    training = opening.shots(training, **_arguments(section, data.few_shots))
  loading = _arguments(section, data.eval_batches) | process

  def of(model: Model, mesh: Mesh | None, waiting: Waiting, loading: Section) -> Evaluator:
    scoring = _arguments(section, evaluator)
    given = {
      "class_names": source.class_names,
      "class_groups": source.class_groups,
      "tokens": tokens,
    }
    scoring |= {k: v for k, v in given.items() if k in inspect.signature(evaluator).parameters}
    if training:
      batches = data.eval_batches(training, waiting=waiting, **loading)
      scoring |= {"train_batches": batches, "num_classes": source.num_classes}
    batches = data.eval_batches(source, waiting=waiting, **loading)
    return evaluator(model, batches, mesh, **scoring)

  def make(model: Model, mesh: Mesh | None, waiting: Waiting = contextlib.nullcontext) -> Evaluator:
    return of(model, mesh, waiting, loading)

  def check(model: Model) -> None:
    data.eval_batches(source, **loading)
    one = dict(batch_size=1, threads=0, workers=0, process_index=0, process_count=1)
    of(model, None, contextlib.nullcontext, {**loading, **one}).check()

  def own() -> Batches:
    return data.eval_batches(source, **loading)

  return Evaluation(make, check, own, every, source, section["pp"], section, notes)


def check_evaluation(evaluation: Evaluation, model: Model, training: data.Source) -> None:
  """Raises a UserError if the model's own logits are scored on data of other classes, and no label map says which; or
  as the evaluator does on its first example.
  """
  section, classes = evaluation.section, evaluation.source.num_classes
  expected = {model.num_classes, training.num_classes}
  scores_logits = section.get("type", "classification") == "classification"
  if scores_logits and section.get("label_map") is None and classes not in expected:
    raise errors.UserError(
      f"data has {classes} classes, the model {' or '.join(map(str, expected))}; give data of the same classes, or a"
      " label_map."
    )
  evaluation.check(model)


def _arguments(section: Section, function: Function) -> Json:
  return {k: section[k] for k in inspect.signature(function).parameters if k in section}


def classes_of_tables(evaluation: Evaluation, rows: Sequence[Section]) -> list[str] | None:
  """The names of the classes of the tables, or of the samples, in an evaluation's rows; None: there are none."""
  source, section = evaluation.source, evaluation.section
  for table in ("class_iou", "class_ap"):
    if rows and table in rows[0]:
      return list(source.class_names or map(str, range(len(rows[0][table]))))
  if not rows or not {"confusion", "samples"} & rows[0].keys():
    return None
  names = table_classes(source.class_names, source.num_classes, section.get("label_map"))
  return [*names, *map(str, range(len(names), len(rows[0].get("confusion", ()))))]
