"""From a config to the things it names: data, model, objective, optimizer, evaluators. Computes nothing on a device."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from flexivit_jax import config, data, errors
from flexivit_jax.data import class_names
from flexivit_jax.experiment import class_weights, evaluation, labelling, monitor, sections
from flexivit_jax.experiment.evaluation import Evaluation
from flexivit_jax.experiment.loaders import (
  REAL,
  Init,
  Opening,
  build_model,
  default_dtype,
  model_like,
  sharing,
)
from flexivit_jax.experiment.sections import DURATIONS
from flexivit_jax.experiment.settings import Settings
from flexivit_jax.models import UNNAMED, Model, flops
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.training import patch_schedule, schedules, steps, token_budget as token_budgets
from flexivit_jax.training.optim import Optimizer, make as _make_optimizer


class Experiment(NamedTuple):
  """Everything that a config says, built and checked. Durations are in steps.

  `input_shapes` are those of one example, for each input of the objective and its teachers; `step_flops` gives those of
  a step at a size; `init` are parameters to start from, or None for random ones; `frozen_digests` say which teachers
  those of the objective are, and `drawn` all that their targets depend on. `batches_of` says how many batches a step
  at a size takes, `images_per_step` are the mean of that in images, and `update_scale` says by what its update is
  multiplied; None without a token budget. `class_names` are those of the logits, `data_classes` those of the training
  data by their own labels; `notes` are what the user should know of them; `says` are lines on
  how many examples each class has, and what it will weigh. `best` is the metric whose best checkpoint is kept, `early`
  says when the run ends early.
  """

  name: str
  seed: int
  model: Model
  model_record: dict[str, Any]
  input_shapes: dict[str, tuple[int, ...]]
  objective: Objective
  optimizer: Optimizer
  flexi: patch_schedule.Flexi
  step_flops: patch_schedule.Cost
  evaluations: dict[str, Evaluation]
  batches: Callable[[int], data.TrainBatches]
  batch_size: int
  steps_per_epoch: float
  total_steps: int
  images_per_step: float
  batches_of: Callable[[Mapping[str, Any]], int]
  update_scale: Callable[[Mapping[str, Any]], float] | None
  accumulate: int | str
  memory_gib: float | None
  head_bias: float | None
  init: Any
  frozen_digests: dict[str, str]
  drawn: dict[str, Any]
  teacher_cache: str | None
  save_every: int
  keep: int | None
  log_every: int
  skip_above: float | None
  skip_limit: int
  mesh: dict[str, Any]
  class_names: tuple[str, ...] | None
  data_classes: tuple[str, ...] | None
  notes: list[str]
  says: Callable[[], Sequence[str]] = tuple
  best: monitor.Metric | None = None
  early: monitor.EarlyStopping | None = None
  wandb: Mapping[str, Any] | None = None

  @property
  def image_shape(self) -> tuple[int, ...]:
    """(h, w, c) of what the model sees."""
    return self.input_shapes["image"]


class _Learner(NamedTuple):
  """What a run trains, and on what. `shapes` are those of one example; `input` is the config's, its classes counted."""

  source: data.Source
  model: Model
  record: dict[str, Any]
  objective: Objective
  objective_section: Mapping[str, Any]
  teachers: Mapping[str, Teacher]
  init: Init
  labelled: labelling.Labelled
  input: Mapping[str, Any]
  shapes: dict[str, tuple[int, ...]]


class _Sizes(NamedTuple):
  """What is drawn at each step, what a step costs there, and how many batches it takes."""

  flexi: patch_schedule.Flexi
  step_flops: patch_schedule.Cost
  batches_of: Callable[[Mapping[str, Any]], int]
  update_scale: Callable[[Mapping[str, Any]], float] | None


class _Lengths(NamedTuple):
  """Durations in steps, and what they are reckoned from."""

  total_steps: int
  images_per_step: float
  examples: int

  def units(self) -> dict[str, Any]:
    """What turns epochs and examples into steps."""
    return {"batch_size": self.images_per_step, "dataset_size": self.examples}


def from_config(
  settings: Mapping[str, Any],
  *,
  name: str = "",
  opening: Opening | None = None,
  trained: class_names.Trained | None = None,
) -> Experiment:
  """Checks a config and builds what it says: the one way from a config to the objects that it names.

  Every key and type is checked before a file is opened.

  Args:
    settings: the config; its keys are the fields of `Settings`.
    name: of the run, where the config gives none.
    opening: how data and weights are opened; default: `REAL`.
    trained: what the checkpoint that the run resumes from says of its classes; None: the run begins.

  Raises:
    UserError: a key that does not exist, a value that cannot be, sizes that do not divide the image.
  """
  checked = check(settings, name)
  flexi = patch_schedule.parse(checked.flexi)
  best, early = _followed(checked)
  _check_ranges(checked)

  # Data, model, objective.
  opening = sharing(opening or REAL)
  learner = _learner(checked, opening, trained)

  # Patch sizes and durations.
  sizes = _sizes(checked, learner, flexi)
  lengths = _lengths(checked, learner, sizes)
  check_accumulate(
    checked.accumulate, checked.memory_gib, learner.input["batch_size"], learner.model
  )
  digests = {name: opening.digest(teacher.params) for name, teacher in learner.teachers.items()}
  if checked.teacher_cache is not None and not learner.teachers:
    raise errors.UserError("teacher_cache is set, but the objective has no teachers; remove it.")

  # Optimizer and evaluators.
  optimizer = _optimizer(checked, learner, lengths)
  saving, evaluations = _evaluations(checked, learner, lengths, opening, best, early)

  largest = max(map(sizes.batches_of, patch_schedule.all_static(sizes.flexi)))
  batches = functools.partial(
    _train_batches, learner.source, learner.input, checked.seed, lengths.total_steps * largest
  )
  return Experiment(
    name=checked.name,
    seed=checked.seed,
    model=learner.model,
    model_record=learner.record,
    input_shapes=learner.shapes,
    objective=learner.objective,
    optimizer=optimizer,
    flexi=sizes.flexi,
    step_flops=sizes.step_flops,
    evaluations=evaluations,
    batches=batches,
    batch_size=learner.input["batch_size"],
    steps_per_epoch=lengths.examples / lengths.images_per_step,
    total_steps=lengths.total_steps,
    images_per_step=lengths.images_per_step,
    batches_of=sizes.batches_of,
    update_scale=sizes.update_scale,
    accumulate=checked.accumulate,
    memory_gib=checked.memory_gib,
    head_bias=checked.init_head_bias,
    init=learner.init.params,
    frozen_digests=digests,
    drawn=_drawn(checked, learner, digests),
    teacher_cache=checked.teacher_cache,
    save_every=saving,
    keep=checked.checkpoint.get("keep", 1),
    log_every=checked.log_every,
    skip_above=checked.skip_above,
    skip_limit=checked.skip_limit,
    mesh=dict(checked.mesh or {}),
    class_names=learner.labelled.model.names,
    data_classes=learner.labelled.data_names,
    notes=[
      *learner.labelled.notes,
      *(f"evals.{key}: {n}" for key, e in evaluations.items() for n in e.notes),
    ],
    says=functools.partial(_class_lines, learner),
    best=best,
    early=early,
    wandb=checked.wandb,
  )


def check(settings: Mapping[str, Any], name: str = "") -> Settings:
  """Returns the settings, every key and type checked; opens nothing.

  Raises:
    UserError: a key that does not exist, does not belong, or is missing; a value of another type.
  """
  config.check("", settings, Settings)
  checked = _filled(Settings(**{"name": name, **settings}))
  sections.check_sections(checked)
  return checked


def _filled(settings: Settings) -> Settings:
  """The same, with empty sections where there are none, and a patience as a section."""
  early = settings.early_stopping
  return dataclasses.replace(
    settings,
    objective=settings.objective or {},
    flexi=settings.flexi or {},
    evals=settings.evals or {},
    checkpoint=settings.checkpoint or {},
    early_stopping={"patience": early} if isinstance(early, int) else early,
  )


def _learner(settings: Settings, opening: Opening, trained: class_names.Trained | None) -> _Learner:
  """Opens the training data and the weights, builds the model and the objective, and decides on the classes."""
  with config.naming("input.data"):
    source = opening.source(**settings.input["data"])
  with config.naming("model"):
    fields = model_like(settings.model, settings.init, opening.fields)
  classes = fields.get("num_classes", source.num_classes)
  section = {**settings.input, "pp": data.counted(settings.input["pp"], classes)}
  with config.naming("input"):
    _train_batches(source, section, settings.seed, 1, 0)
  with config.naming("model"):
    network, record = build_model({"dtype": default_dtype(), **fields}, source.num_classes)
  objective = settings.objective
  teachers = {name: opening.teacher(**t) for name, t in objective.get("teachers", {}).items()}
  with config.naming("objective"):
    unweighted = {k: v for k, v in objective.items() if k != "class_weights"}
    goal = build_objective(unweighted, teachers)
  init, labelled = _classes(
    source, network, settings.init, teachers, "labels" in goal.inputs, opening, trained
  )
  if labelled.source is not source or "labels" in goal.inputs:
    with config.naming("input"):
      labelling.check_onehot(section["pp"], network.num_classes)
  source, teachers = labelled.source, labelled.teachers
  with config.naming("objective"):
    objective = _weighted(objective, source, network.num_classes)
    goal = build_objective(objective, teachers)
  skip = section.get("on_error", "raise")
  shapes = example_shapes(source, section["pp"], _inputs(goal), network.num_classes, skip)
  check_teachers(teachers, shapes, network.num_classes)
  return _Learner(
    source, network, record, goal, objective, teachers, init, labelled, section, shapes
  )


def _sizes(settings: Settings, learner: _Learner, flexi: patch_schedule.Flexi) -> _Sizes:
  """Weighs what is drawn at each step, and makes sure that the model can run each size."""
  network, shapes = learner.model, learner.shapes
  batches_of, update_scale = _budget(
    settings.token_budget, flexi, network, shapes["image"], bool(learner.teachers)
  )
  batch_size, also = learner.input["batch_size"], learner.objective.also

  def cost(size: Mapping[str, Any]) -> float:
    one = flops.step_flops(network, shapes, learner.teachers, also, size, batch_size=batch_size)
    return one * batches_of(size)

  flexi = patch_schedule.weigh(flexi, cost)
  for size in patch_schedule.all_static(flexi):
    check_size(network, shapes["image"], size)
  for fixed in also:
    with config.naming("objective.size"):
      check_size(network, shapes["image"], fixed)
  return _Sizes(flexi, cost, batches_of, update_scale)


def _lengths(settings: Settings, learner: _Learner, sizes: _Sizes) -> _Lengths:
  """Turns the duration that the config gives into steps."""
  per_step = learner.input["batch_size"]
  if sizes.update_scale is not None:
    per_step *= patch_schedule.mean_cost(sizes.flexi, sizes.batches_of)
  flops = settings.total_flops
  total = _total_steps(
    flops and flops / patch_schedule.mean_cost(sizes.flexi, sizes.step_flops),
    steps=settings.total_steps,
    epochs=settings.total_epochs,
    examples=settings.total_examples,
    **_Lengths(0, per_step, len(learner.source)).units(),
  )
  if total < 1:
    raise errors.UserError(f"Got {total} steps; expected at least 1.")
  return _Lengths(total, per_step, len(learner.source))


def _optimizer(settings: Settings, learner: _Learner, lengths: _Lengths) -> Optimizer:
  image_shape = learner.shapes["image"]
  params = jax.eval_shape(
    lambda: steps.init_params(learner.model, image_shape, settings.seed, settings.init_head_bias)
  )
  _check_channels(learner.init.params, image_shape)
  return _make_optimizer(
    params, total_steps=lengths.total_steps, **lengths.units(), **settings.optim
  )


def _evaluations(
  settings: Settings,
  learner: _Learner,
  lengths: _Lengths,
  opening: Opening,
  best: monitor.Metric | None,
  early: monitor.EarlyStopping | None,
) -> tuple[int, dict[str, Evaluation]]:
  """Returns the steps between checkpoints, and the evaluators."""
  every = functools.partial(_every, sizes=lengths.units(), total=lengths.total_steps)
  epoch = max(1, round(lengths.examples / lengths.images_per_step))
  saving = every("checkpoint", settings.checkpoint, default=epoch)
  classes = (learner.labelled.model, labelling.classes_of(learner.source, "input.data"))
  followed = {m.evaluator for m in (best, early and early.metric) if m}
  evaluations = {}
  for key, section in settings.evals.items():
    where = f"evals.{key}"
    often = every(where, section, default=saving if key in followed else lengths.total_steps)
    evaluations[key] = evaluation.build_evaluation(where, section, often, opening, classes)
    with config.naming(where):
      evaluation.check_evaluation(evaluations[key], learner.model, learner.source)
  return saving, evaluations


def _class_lines(learner: _Learner) -> list[str]:
  """Lines on how many examples each class has, and what it weighs."""
  sizes = [data.class_sizes(learner.source)]
  return [*filter(None, sizes), *_rare(learner.objective_section, learner.input, learner.source)]


def _followed(settings: Settings) -> tuple[monitor.Metric | None, monitor.EarlyStopping | None]:
  """The metric whose best checkpoint is kept, and when the run ends early."""
  evals, early = settings.evals, settings.early_stopping
  assert not isinstance(early, int)  # `_filled` has made a section of it
  best, mode = settings.checkpoint.get("best"), settings.checkpoint.get("best_mode")
  if mode is not None and best is None:
    raise errors.UserError("checkpoint.best_mode without checkpoint.best has no effect; add that.")
  return (
    None if best is None else monitor.parse("checkpoint.best", best, evals, mode),
    None if early is None else monitor.early_stopping(evals=evals, **early),
  )


def without_evaluations(settings: Mapping[str, Any]) -> dict[str, Any]:
  """A config that only trains, with nothing that goes by an evaluation."""
  kept = {k: v for k, v in settings.items() if k not in ("evals", "early_stopping")}
  checkpoint = dict(settings.get("checkpoint") or {})
  return kept | {"checkpoint": {k: v for k, v in checkpoint.items() if not k.startswith("best")}}


def _weighted(
  objective: Mapping[str, Any], source: data.Source, num_classes: int
) -> Mapping[str, Any]:
  """The section with its class weights as numbers."""
  if objective.get("class_weights") is None:
    return objective
  weights = class_weights.resolve(objective["class_weights"], source, num_classes)
  return {**objective, "class_weights": weights}


def _rare(
  objective: Mapping[str, Any], section: Mapping[str, Any], source: data.Source
) -> tuple[str, ...]:
  """Lines about class weights and balanced sampling."""
  lines = []
  if objective.get("class_weights") is not None:
    lines.append(class_weights.note(objective["class_weights"], source))
  if section.get("sampler") == "balanced":
    number = data.by_class(source).number
    often = len(source) / len(number) / number
    lines.append(
      f"balanced sampling: {len(number)} classes of {min(number)} to {max(number)} images; an epoch sees an image of"
      f" the smallest {often.max():.3g} times, one of the largest {often.min():.3g} times"
    )
  return tuple(lines)


def _classes(
  source: data.Source,
  model: Model,
  init: Mapping[str, Any] | None,
  teachers: Mapping[str, Teacher],
  labels: bool,
  opening: Opening,
  trained: class_names.Trained | None,
) -> tuple[Init, labelling.Labelled]:
  """Loads the weights to start from, and decides which classes labels, logits and teachers are of."""
  start = Init(None, None)
  if init is not None:
    # A run that goes on has its own head by now.
    needed = labelling.classes_of(source, "input.data") if labels and trained is None else None
    start = opening.init(model, labels=needed, **init)
  labelled = labelling.of_run(
    source, model.num_classes, init=start.classes, teachers=teachers, labels=labels, trained=trained
  )
  return start, labelled


def _check_channels(params: Any, image_shape: Sequence[int]) -> None:
  """Raises a UserError where weights to start from take images of another number of channels than there are."""
  kernel = None if params is None else params.get("embedding", {}).get("kernel")
  if kernel is not None and kernel.shape[2] != image_shape[-1]:
    raise errors.UserError(
      f"init: the weights take images of {kernel.shape[2]} channels, the data's have {image_shape[-1]}; start from"
      f" weights for {image_shape[-1]}."
    )


def _check_ranges(settings: Settings) -> None:
  """Raises a UserError for a number that is out of its range; None is none."""
  keep = settings.checkpoint.get("keep", 1)
  counts = {
    "log_every": settings.log_every,
    "skip_limit": settings.skip_limit,
    "checkpoint.keep": keep,
  }
  for key, count in counts.items():
    if count is not None and count < 1:
      raise errors.UserError(f"{key}={count}; expected at least 1.")
  limits = {"hang_after": settings.hang_after, "skip_above": settings.skip_above}
  for key, limit in limits.items():
    if limit is not None and not limit > 0:
      raise errors.UserError(f"{key}={limit}; expected more than 0, or None.")
  bias, seed = settings.init_head_bias, settings.seed
  if not math.isfinite(bias or 0.0):
    raise errors.UserError(f"init_head_bias={bias}; expected a finite number.")
  if not 0 <= seed < 2**32:
    raise errors.UserError(f"seed={seed}; expected 0 to {2**32 - 1}.")


def _budget(
  section: Mapping[str, Any] | None,
  flexi: patch_schedule.Flexi,
  model: Model,
  image_shape: Sequence[int],
  taught: bool,
) -> tuple[Callable[[Mapping[str, Any]], int], Callable[[Mapping[str, Any]], float] | None]:
  """Returns how many batches a step at a size takes, and by what its update is multiplied."""
  if section is None:
    return lambda size: 1, None
  if taught:
    raise errors.UserError("token_budget with teachers, whose batches are all alike; remove one.")
  budget = token_budgets.make(**section)

  def tokens(size: Mapping[str, Any]) -> int:
    rows, columns = model.grid(tuple(image_shape[:2]), **size).grid_hw
    return rows * columns

  every = itertools.product(*(choice.values for choice in flexi.values()))
  most = max(tokens(dict(zip(flexi, values, strict=True))) for values in every)
  batches_of = lambda size: budget.batches(tokens(size), most)  # noqa: E731
  return batches_of, lambda size: budget.update_scale(batches_of(size))


def check_accumulate(
  accumulate: int | str, memory_gib: float | None, batch_size: int, model: Model
) -> None:
  """Raises a UserError for parts that do not divide the batch, and for "auto" where the result would depend on it."""
  if accumulate == "auto":
    if getattr(model, "dropout", 0.0):
      raise errors.UserError(
        "accumulate='auto' with dropout: its masks would depend on the memory of the device; give accumulate a number."
      )
    if memory_gib is not None and not memory_gib > 0:
      raise errors.UserError(f"memory_gib={memory_gib}; expected more than 0.")
    return
  if not isinstance(accumulate, int) or accumulate < 1 or batch_size % accumulate:
    raise errors.UserError(
      f"Got accumulate={accumulate!r}, batch_size={batch_size}; expected a divisor of batch_size, or 'auto'."
    )
  if memory_gib is not None:
    raise errors.UserError(f"memory_gib={memory_gib} has no effect without accumulate='auto'.")


def build_objective(section: Mapping[str, Any], teachers: Mapping[str, Teacher]) -> Objective:
  """Returns the objective that a section names; one that distils takes the teachers, loaded."""
  given = {k: v for k, v in section.items() if k not in ("name", "teachers")}
  given |= {"teachers": teachers} if "teachers" in section else {}
  return OBJECTIVES[section.get("name", "supervised")](**given)


def check_size(model: Model, image_shape: Sequence[int], size: Mapping[str, Any]) -> None:
  """Raises a UserError if a model cannot run images (h, w, c) with these static arguments."""
  model.grid(tuple(image_shape[:2]), **size)


def _total_steps(by_flops: float | None, **given: Any) -> int:
  if by_flops is None:
    return schedules.to_steps("total", **given)
  units = {k: given[k] for k in ("steps", "epochs", "examples") if given[k] is not None}
  if units:
    raise errors.UserError(f"Got total_flops and total_{next(iter(units))}; give one of them.")
  if not math.isfinite(by_flops):
    raise errors.UserError("total_flops is not finite; give a number, like 1e18.")
  return round(by_flops)


def _inputs(objective: Objective) -> tuple[str, ...]:
  """What an objective and its teachers take from a batch."""
  taught = objective.teaching.inputs if objective.teaching else ()
  return tuple(dict.fromkeys((*objective.inputs, *taught)))


def _drawn(settings: Settings, learner: _Learner, digests: Mapping[str, str]) -> dict[str, Any]:
  """What the teachers' logits depend on: images, their draws and mixup, and the teachers."""
  section, objective = learner.input, learner.objective_section
  sampler = {} if section.get("sampler") != "balanced" else {"sampler": "balanced"}
  return dict(
    **sampler,
    data={**section["data"], "examples": len(learner.source)},
    pp=section["pp"],
    batch_size=section["batch_size"],
    on_error=section.get("on_error"),
    seed=settings.seed,
    accumulate=settings.accumulate,
    **{k: objective.get(k) for k in ("mixup_p", "top_k")},
    teachers={
      name: dict(sha256=digests[name], image=t.image, size=t.size, model=_fields(t.model))
      for name, t in learner.teachers.items()
    },
  )


def _fields(model: Model) -> dict[str, Any]:
  """What two models of the same parameters may differ in: num_heads, gelu and the like."""
  names = (field.name for field in dataclasses.fields(model) if field.init)
  return {name: getattr(model, name) for name in names if name not in UNNAMED}


def check_teachers(
  teachers: Mapping[str, Teacher], shapes: Mapping[str, tuple[int, ...]], num_classes: int
) -> None:
  """Raises a UserError for a teacher of other classes, or whose size does not divide its image."""
  for name, teacher in teachers.items():
    if teacher.model.num_classes != num_classes:
      raise errors.UserError(
        f"objective.teachers.{name} has {teacher.model.num_classes} classes, the model {num_classes}."
      )
    teacher.model.grid(shapes[teacher.image][:2], **teacher.size)


def example_shapes(
  source: data.Source, pp: str, inputs: Sequence[str], num_classes: int, on_error: str = "raise"
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of what the preprocessing makes of the first example; labels have to fit the model."""
  with config.naming("input"):
    first = data.eval_batches(source, pp, batch_size=1, threads=0, on_error=on_error)
    example = next(iter(first))
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
    fix = f"use onehot({num_classes}), or onehot(), which counts them, and keep 'labels'"
    fix += " (configs/folder.py: leave num_classes out)"
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
  where: str, section: Mapping[str, Any], *, default: int, sizes: Mapping[str, Any], total: int
) -> int:
  given = {unit: section[f"every_{unit}"] for unit in DURATIONS if f"every_{unit}" in section}
  every = schedules.to_steps(f"{where}.every", **given, **sizes, total_steps=total, default=default)
  if every < 1:
    raise errors.UserError(f"{where}: every 0 steps is never; give at least 1, or leave it out.")
  return every
