"""From a config to the things it names: data, model, objective, optimizer, evaluators. Computes nothing on a device."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import numpy as np

from flexivit_jax import config, data, errors, patch_schedule, schedules, steps, trees, weights
from flexivit_jax.evaluators import EVALUATORS
from flexivit_jax.models import MODELS
from flexivit_jax.models.flexivit import which_patch
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.optim import Optimizer, make as _make_optimizer

# Arguments that the program provides, so no keys of a config.
_GIVEN_DATA = ("source", "seed", "num_steps", "start_step", "process_index", "process_count")
_GIVEN_OPTIM = ("params", "total_steps", "batch_size", "dataset_size")
_DURATIONS = ("steps", "epochs", "examples", "percent")


class Evaluation(NamedTuple):
  """One evaluator of a run. `every` is in steps; `make(model, mesh)` builds it."""

  make: Callable[[nn.Module, Any], Any]
  every: int
  source: data.Source
  pp: str


class Experiment(NamedTuple):
  """Everything that a config says, built and checked. Durations are in steps.

  `input_shapes` are those of one example, for each input of the objective; `init` are parameters to start from, or
  None for random ones; `frozen_digests` say which teachers those of the objective are.
  """

  name: str
  seed: int
  model: nn.Module
  model_record: dict[str, Any]
  input_shapes: dict[str, tuple[int, ...]]
  objective: Objective
  optimizer: Optimizer
  flexi: patch_schedule.Flexi
  evaluations: dict[str, Evaluation]
  batches: Callable[[int], data.TrainBatches]
  batch_size: int
  steps_per_epoch: float
  total_steps: int
  accumulate: int
  head_bias: float | None
  init: Any
  frozen_digests: dict[str, str]
  save_every: int
  keep: int | None
  log_every: int

  @property
  def image_shape(self) -> tuple[int, ...]:
    """(h, w, c) of what the model sees."""
    return self.input_shapes["image"]


def build(
  *,
  name: str = "",
  seed: int = 0,
  input: Mapping[str, Any],
  model: Mapping[str, Any],
  optim: Mapping[str, Any],
  objective: Mapping[str, Any] | None = None,
  flexi: Mapping[str, Any] | None = None,
  evals: Mapping[str, Any] | None = None,
  checkpoint: Mapping[str, Any] | None = None,
  total_steps: int | None = None,
  total_epochs: float | None = None,
  total_examples: float | None = None,
  accumulate: int = 1,
  init: Mapping[str, Any] | None = None,
  init_head_bias: float | None = None,
  log_every: int = 50,
) -> Experiment:
  """Builds an experiment; the arguments are the top-level keys of a config.

  Args:
    name: of the run, in reports; default: its folder's.
    seed: of everything random.
    input: training data: `data` (arguments of `data.make_source`), and those of `data.train_batches`.
    model: `name` (default "flexivit") and the fields of that model; num_classes defaults to the data's.
    optim: arguments of `optim.make`.
    objective: `name` (default "supervised") and its arguments; `teachers` is `{name: arguments of load_teacher}`.
    flexi: `{argument: {"v": values, "p": weights}}`: what is drawn for each step.
    evals: `{name: section}`; a section is `type` (default "classification"), `data`, `pp`, `batch_size`, `seqhw`,
      and one of every_steps, every_epochs, ... (default: at the end only); of a "distance" also `teacher`. The one
      named "test", else the first in the alphabet, makes RUN/eval.json; another makes RUN/eval_NAME.json.
    checkpoint: `keep` (newest checkpoints to keep; None: all), and one of every_steps, ... (default: every epoch).
    total_steps: of the run; or give total_epochs or total_examples.
    total_epochs: see `total_steps`.
    total_examples: see `total_steps`.
    accumulate: parts of a batch whose gradients are computed one after the other.
    init: weights to start from, arguments of `load_init`.
    init_head_bias: fills the head's bias at the start.
    log_every: steps between reads of the losses from the device.

  Raises:
    UserError: a key that does not exist, a value that cannot be, sizes that do not divide the image.
  """
  objective, flexi, evals, checkpoint = objective or {}, flexi or {}, evals or {}, checkpoint or {}
  check_sections(
    input=input,
    model=model,
    objective=objective,
    optim=optim,
    evals=evals,
    checkpoint=checkpoint,
    init=init,
  )
  source = data.make_source(**input["data"])
  sizes = {"batch_size": input["batch_size"], "dataset_size": len(source)}
  total = schedules.to_steps(
    "total", steps=total_steps, epochs=total_epochs, examples=total_examples, **sizes
  )
  if total < 1 or log_every < 1 or accumulate < 1 or input["batch_size"] % accumulate:
    message = f"Got {total} steps, log_every={log_every}, accumulate={accumulate}, batch_size={input['batch_size']}"
    raise errors.UserError(
      f"{message}; expected all at least 1 and accumulate a divisor of batch_size."
    )
  network, record = build_model(model, source.num_classes)
  batches = functools.partial(_train_batches, source, input, seed, total)
  config.check("flexi", flexi, which_patch, given=("image_hw", "default"))
  choices = patch_schedule.parse(flexi)
  teachers = {name: load_teacher(**t) for name, t in objective.get("teachers", {}).items()}
  goal = build_objective(objective, teachers)
  shapes = example_shapes(source, input["pp"], goal.inputs, network.num_classes)
  image_shape = shapes["image"]
  check_teachers(teachers, shapes, network.num_classes)
  for size in patch_schedule.all_static(choices):
    which_patch(image_shape[:2], network.patch_size, **cast(dict[str, Any], size))
  params = jax.eval_shape(lambda: steps.init_params(network, image_shape, seed, init_head_bias))
  every = functools.partial(_every, sizes=sizes, total=total)
  return Experiment(
    name=name,
    seed=seed,
    model=network,
    model_record=record,
    input_shapes=shapes,
    objective=goal,
    optimizer=_make_optimizer(params, total_steps=total, **sizes, **optim),
    flexi=choices,
    evaluations={
      k: build_evaluation(v, every(f"evals.{k}", v, default=total)) for k, v in evals.items()
    },
    batches=batches,
    batch_size=input["batch_size"],
    steps_per_epoch=len(source) / input["batch_size"],
    total_steps=total,
    accumulate=accumulate,
    head_bias=init_head_bias,
    init=None if init is None else load_init(network, **init),
    frozen_digests={name: trees.digest(teacher.params) for name, teacher in teachers.items()},
    save_every=every(
      "checkpoint", checkpoint, default=max(1, round(len(source) / input["batch_size"]))
    ),
    keep=checkpoint.get("keep", 1),
    log_every=log_every,
  )


def check_sections(
  *,
  input: Mapping[str, Any],
  model: Mapping[str, Any],
  objective: Mapping[str, Any],
  optim: Mapping[str, Any],
  evals: Mapping[str, Any],
  checkpoint: Mapping[str, Any],
  init: Mapping[str, Any] | None = None,
) -> None:
  """Raises a UserError for the first key that is misspelt, does not belong, or is missing."""
  network = _named("model", model, MODELS, "flexivit")
  goal = _named("objective", objective, OBJECTIVES, "supervised")
  config.check("input", input, data.train_batches, given=_GIVEN_DATA, needed=("data",))
  config.check("input.data", input["data"], data.make_source)
  config.check("model", model, network, given=("parent",), optional=("name",))
  config.check("objective", objective, goal, optional=("name",))
  for name, section in objective.get("teachers", {}).items():
    config.check(f"objective.teachers.{name}", section, load_teacher)
  if init is not None:
    config.check("init", init, load_init, given=("model",))
  config.check("optim", optim, _make_optimizer, given=_GIVEN_OPTIM)
  if isinstance(optim.get("schedule"), Mapping):
    config.check("optim.schedule", optim["schedule"], schedules.make, given=_GIVEN_OPTIM)
  every = [f"every_{unit}" for unit in _DURATIONS]
  config.check("checkpoint", checkpoint, optional=("keep", *every))
  for key, section in evals.items():
    check_evaluation(f"evals.{key}", section)


def check_evaluation(where: str, section: Mapping[str, Any]) -> None:
  """Raises a UserError for the first wrong key in a section of `evals`."""
  evaluator = _named(where, section, EVALUATORS, "classification", "type")
  optional = ("type", *(f"every_{unit}" for unit in _DURATIONS))
  given = ("model", "batches", "mesh", *_GIVEN_DATA)
  config.check(
    where, section, data.eval_batches, evaluator, given=given, needed=("data",), optional=optional
  )
  config.check(f"{where}.data", section["data"], data.make_source)
  if "teacher" in section:
    config.check(f"{where}.teacher", section["teacher"], load_teacher)


def build_model(section: Mapping[str, Any], num_classes: int) -> tuple[nn.Module, dict[str, Any]]:
  """Returns the model, and the JSON-able record from which it can be built again."""
  record = {"name": "flexivit", "num_classes": num_classes, **section}
  return MODELS[record["name"]](**_without(record, "name")), record


def build_objective(section: Mapping[str, Any], teachers: Mapping[str, Teacher]) -> Objective:
  """Returns the objective that a section names; one that distils takes the teachers, loaded."""
  given = _without(section, "name", "teachers") | ({"teachers": teachers} if teachers else {})
  return OBJECTIVES[section.get("name", "supervised")](**given)


def load_teacher(
  *,
  checkpoint: str,
  image: str = "image",
  seqhw: int | None = None,
  num_heads: int | None = None,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
) -> Teacher:
  """Loads a teacher.

  Args:
    checkpoint: what `weights.load` takes.
    image: key of the batch under which it finds its image, of its own resolution.
    seqhw: tokens per side at which it runs; default: its own patch size.
    num_heads, mean, std: as in `weights.load`.
  """
  model, params = weights.load(checkpoint, **_given(num_heads=num_heads, mean=mean, std=std))
  size = {} if seqhw is None else {"seqhw": seqhw}
  return Teacher(model, jax.tree.map(np.asarray, params), image, size)


def load_init(
  model: nn.Module,
  *,
  checkpoint: str,
  num_heads: int | None = None,
  mean: tuple[float, ...] | None = None,
  std: tuple[float, ...] | None = None,
) -> Any:
  """Returns parameters to start from; kernel and position grid are resized to the model's buffers.

  Args:
    model: the model that they are for.
    checkpoint: what `weights.load` takes.
    num_heads, mean, std: as in `weights.load`.
  """
  given = _given(num_heads=num_heads, mean=mean, std=std)
  return jax.tree.map(np.asarray, weights.load_into(checkpoint, model, **given))


def _given(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value is not None}


def check_teachers(
  teachers: Mapping[str, Teacher], shapes: Mapping[str, tuple[int, ...]], num_classes: int
) -> None:
  """Raises a UserError for a teacher of other classes, or whose size does not divide its image."""
  for name, teacher in teachers.items():
    if teacher.model.num_classes != num_classes:
      raise errors.UserError(
        f"objective.teachers.{name} has {teacher.model.num_classes} classes, the model {num_classes}."
      )
    which_patch(shapes[teacher.image][:2], teacher.model.patch_size, **teacher.size)


def build_evaluation(section: Mapping[str, Any], every: int) -> Evaluation:
  """Opens an evaluator's data; its device programs are made later, by `make(model, mesh)`."""
  source = data.make_source(**section["data"])
  evaluator = EVALUATORS[section.get("type", "classification")]
  if "teacher" in section:
    section = {**section, "teacher": load_teacher(**section["teacher"])}
  process = dict(process_index=jax.process_index(), process_count=jax.process_count())

  def make(model: nn.Module, mesh: Any) -> Any:
    loading = {
      k: section[k] for k in inspect.signature(data.eval_batches).parameters if k in section
    }
    scoring = {k: section[k] for k in inspect.signature(evaluator).parameters if k in section}
    return evaluator(model, data.eval_batches(source, **loading, **process), mesh, **scoring)

  return Evaluation(make, every, source, section["pp"])


def example_shapes(
  source: data.Source, pp: str, inputs: Sequence[str], num_classes: int
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of what the preprocessing makes of the first example; labels have to fit the model."""
  example = next(iter(data.eval_batches(source, pp, batch_size=1, threads=0)))
  for name in inputs:
    if name == "labels":
      continue
    if name not in example or example[name].ndim != 4:
      got = (
        f"no {name!r}" if name not in example else f"an image of shape {example[name].shape[1:]}"
      )
      raise errors.UserError(f"input.pp gives {got}; expected [h, w, c] under the key {name!r}.")
  labels = example.get("labels")
  if "labels" in inputs and (labels is None or labels.shape[1:] != (num_classes,)):
    got = "no 'labels'" if labels is None else f"labels of shape {labels.shape[1:]}"
    fix = f"use onehot({num_classes}) and keep 'labels'"
    raise errors.UserError(f"input.pp gives {got}; the model has {num_classes} classes: {fix}.")
  return {name: example[name].shape[1:] for name in inputs}


def _train_batches(
  source: data.Source, section: Mapping[str, Any], seed: int, total: int, start_step: int
) -> data.TrainBatches:
  process = dict(process_index=jax.process_index(), process_count=jax.process_count())
  options = {k: v for k, v in section.items() if k not in ("data", "pp")}
  return data.train_batches(
    source, section["pp"], seed=seed, num_steps=total, start_step=start_step, **options, **process
  )


def _every(
  where: str, section: Mapping[str, Any], *, default: int, sizes: Mapping[str, int], total: int
) -> int:
  given = {unit: section[f"every_{unit}"] for unit in _DURATIONS if f"every_{unit}" in section}
  every = schedules.to_steps(f"{where}.every", **given, **sizes, total_steps=total, default=default)
  if every < 1:
    raise errors.UserError(f"{where}: every 0 steps is never; give at least 1, or leave it out.")
  return every


def _named(
  where: str, section: Mapping[str, Any], table: Mapping[str, Any], default: str, key: str = "name"
) -> Any:
  name = section.get(key, default)
  if name not in table:
    raise errors.unknown(f"{where}.{key}", name, table)
  return table[name]


def _without(section: Mapping[str, Any], *keys: str) -> dict[str, Any]:
  return {k: v for k, v in section.items() if k not in keys}
