"""From a config to the things it names: data, model, objective, optimizer, evaluators. Computes nothing on a device."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AbstractMesh, Mesh

from flexivit_jax import config, data, errors
from flexivit_jax.config import Section
from flexivit_jax.data import class_names
from flexivit_jax.data.text import Tokens
from flexivit_jax.experiment import (
  checks,
  class_weights,
  evaluation,
  labelling,
  monitor,
  sections,
  texts,
)
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
from flexivit_jax.experiment.locked import TowerCache, tower_cache
from flexivit_jax.experiment.sections import DURATIONS
from flexivit_jax.experiment.settings import Settings
from flexivit_jax.models import UNNAMED, Model, TwoTowers, flops
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.sizes import SizeArgs, SizeKey, size_key
from flexivit_jax.training import patch_schedule, schedules, steps, token_budget as token_budgets
from flexivit_jax.training.optim import Optimizer, frozen, make as _make_optimizer
from flexivit_jax.trees import Json, Params, Tree


class Experiment(NamedTuple):
  """Everything that a config says, built and checked. Durations are in steps.

  Attributes:
    name, seed: of the run.
    model, model_record: the network, and the JSON-able record from which it is built again.
    inputs: shape and dtype of one example for each input of the model, the objective and its teachers.
    objective, optimizer: what a step minimises, and how.
    teachers: the objective's, by name.
    flexi: the schedule of sizes.
    step_flops: FLOPs of a step at a size.
    evaluations: the evaluators by name.
    batches: `batches(start_step)` opens the training data.
    batch_size: examples of a batch.
    steps_per_epoch, total_steps: lengths.
    images_per_step: mean over the sizes; more than batch_size with a token budget.
    batches_of: how many batches a step at a size takes.
    update_scale: factor of the update at a size; None: no token budget.
    accumulate: gradient-accumulation microbatches, or "auto".
    memory_gib: memory of a device for accumulate="auto".
    init: parameters to start from; None: random ones.
    frozen_digests: sha256 of the objective's teachers by name.
    drawn: everything that the teachers' logits depend on; the key of their cache.
    teacher_cache: folder of the teachers' logits.
    tower_cache: of the embeddings of a locked image tower; None: they are made in each step.
    save_every, keep: steps between checkpoints, and how many stay.
    log_every: steps between reads from the devices.
    skip_above, skip_limit: gradient norm above which a step is skipped; skipped steps in a row that end the run.
    mesh: arguments of `sharding.make_mesh`.
    class_names: names of the logits.
    data_classes: names of the training data's labels.
    tokens: how texts become tokens; None: there are none.
    projection: whether the model's head is a projection to embeddings and no classifier, as CLIP's.
    notes: what the user should know of the classes.
    class_lines: returns lines on the number of examples of each class, and on class weights.
    best, early: metric whose best checkpoint stays; when the run ends early.
    wandb: arguments of `wandb_run.open_run`; None: no Weights & Biases.
  """

  name: str
  seed: int
  model: Model
  model_record: Json
  inputs: dict[str, jax.ShapeDtypeStruct]
  objective: Objective
  optimizer: Optimizer
  teachers: Mapping[str, Teacher]
  flexi: patch_schedule.Flexi
  step_flops: patch_schedule.Cost
  evaluations: dict[str, Evaluation]
  batches: Callable[[int], data.TrainBatches]
  batch_size: int
  steps_per_epoch: float
  total_steps: int
  images_per_step: float
  batches_of: Callable[[SizeArgs], int]
  update_scale: Callable[[SizeArgs], float] | None
  accumulate: int | str
  memory_gib: float | None
  init: Params | None
  frozen_digests: dict[str, str]
  drawn: Json
  teacher_cache: str | None
  tower_cache: TowerCache | None
  save_every: int
  keep: int | None
  log_every: int
  skip_above: float | None
  skip_limit: int
  mesh: Json
  class_names: tuple[str, ...] | None
  data_classes: tuple[str, ...] | None
  tokens: Tokens | None
  projection: bool
  notes: list[str]
  class_lines: Callable[[], Sequence[str]] = tuple
  best: monitor.FollowedMetric | None = None
  early: monitor.EarlyStopping | None = None
  wandb: Section | None = None

  @property
  def image_shape(self) -> tuple[int, ...]:
    """(h, w, c) of what the model sees."""
    return self.shapes["image"]

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Those of `inputs`."""
    return {name: one.shape for name, one in self.inputs.items()}


class _Learner(NamedTuple):
  """What a run trains, and on what. `inputs` are those of one example; `input` is the config's, its classes counted."""

  source: data.Source
  model: Model
  record: Json
  objective: Objective
  objective_section: Section
  teachers: Mapping[str, Teacher]
  init: Init
  labelled: labelling.Labelled
  input: Section
  inputs: dict[str, jax.ShapeDtypeStruct]
  tokens: Tokens | None

  @property
  def shapes(self) -> dict[str, tuple[int, ...]]:
    """Those of `inputs`."""
    return {name: one.shape for name, one in self.inputs.items()}


class _Sizes(NamedTuple):
  """What is drawn at each step, what a step costs there, and how many batches it takes."""

  flexi: patch_schedule.Flexi
  step_flops: patch_schedule.Cost
  batches_of: Callable[[SizeArgs], int]
  update_scale: Callable[[SizeArgs], float] | None


class _Lengths(NamedTuple):
  """Durations in steps, and what they are reckoned from."""

  total_steps: int
  images_per_step: float
  examples: int

  def units(self) -> Json:
    """What turns epochs and examples into steps."""
    return {"batch_size": self.images_per_step, "dataset_size": self.examples}


# Settings that an experiment hands on as they are.
_RELAYED = (
  "name",
  "seed",
  "accumulate",
  "memory_gib",
  "teacher_cache",
  "log_every",
  "skip_above",
  "skip_limit",
  "wandb",
)


def from_config(
  settings: Section,
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

  # Data, model, objective.
  opening = sharing(opening or REAL)
  learner = _learner(checked, opening, trained)

  # Patch sizes and durations.
  sizes = _sizes(checked, learner, flexi)
  lengths = _lengths(checked, learner, sizes)
  batch_size, shapes = learner.input["batch_size"], learner.shapes
  checks.check_accumulate(checked.accumulate, checked.memory_gib, batch_size, learner.model, shapes)
  digests = {name: opening.digest(teacher.params) for name, teacher in learner.teachers.items()}
  if checked.teacher_cache is not None and not learner.teachers:
    raise errors.UserError("teacher_cache is set, but the objective has no teachers; remove it.")

  # Optimizer and evaluators.
  optimizer = _optimizer(checked, learner, lengths)
  cached = _tower_cache(checked, learner, optimizer)
  saving, evaluations = _evaluations(checked, learner, lengths, opening, best, early)

  largest = max(map(sizes.batches_of, patch_schedule.all_static(sizes.flexi)))
  batches = functools.partial(
    _train_batches, learner.source, learner.input, checked.seed, lengths.total_steps * largest
  )
  return Experiment(
    **{key: getattr(checked, key) for key in _RELAYED},
    **sizes._asdict(),
    model=learner.model,
    model_record=learner.record,
    inputs=learner.inputs,
    objective=learner.objective,
    optimizer=optimizer,
    teachers=learner.teachers,
    evaluations=evaluations,
    batches=batches,
    batch_size=learner.input["batch_size"],
    steps_per_epoch=lengths.examples / lengths.images_per_step,
    total_steps=lengths.total_steps,
    images_per_step=lengths.images_per_step,
    init=learner.init.params,
    frozen_digests=digests,
    drawn=_drawn(checked, learner, digests),
    save_every=saving,
    keep=checked.checkpoint.get("keep", 1),
    mesh=dict(checked.mesh or {}),
    class_names=learner.labelled.model.names,
    data_classes=learner.labelled.data_names,
    tokens=learner.tokens,
    projection=_teaches_head(checked.objective),
    tower_cache=cached,
    notes=[
      *learner.labelled.notes,
      *(f"evals.{key}: {n}" for key, e in evaluations.items() for n in e.notes),
    ],
    class_lines=functools.partial(_class_lines, learner, sizes.flexi),
    best=best,
    early=early,
  )


def _teaches_head(objective: Section) -> bool:
  """Whether an objective distils the output of the head as an embedding, so that the head is no classifier."""
  return (objective.get("name"), objective.get("output")) == ("distill_embeddings", "logits")


def check(settings: Section, name: str = "") -> Settings:
  """Returns the settings, every key and type checked; opens nothing.

  Raises:
    UserError: a key that does not exist, does not belong, or is missing; a value of another type.
  """
  config.check("", settings, Settings)
  checked = _filled(Settings(**{"name": name, **settings}))
  sections.check_sections(checked)
  checks.check_ranges(checked)
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
  network = _biased(network, settings.init_head_bias)
  objective = settings.objective
  teachers = {name: opening.teacher(**t) for name, t in objective.get("teachers", {}).items()}
  with config.naming("objective"):
    unweighted = {k: v for k, v in objective.items() if k != "class_weights"}
    goal = build_objective(unweighted, teachers)
  if isinstance(network, TwoTowers):
    network = _with_bias(network, goal, section["batch_size"])
    record = record | {"bias": network.bias}
  checks.check_outputs(goal, network)
  checks.check_pairs(goal, section["batch_size"])
  tokens = texts.of_run(section["pp"], network, opening.tokens)
  pps = {name: one["pp"] for name, one in settings.evals.items() if "pp" in one}
  texts.check_same(tokens, pps, opening.tokens)
  # Of embeddings it does not matter which classes a teacher knows.
  classifiers = teachers if "logits" in goal.outputs else {}
  init, labelled = _classes(
    source, network, settings.init, classifiers, "labels" in goal.inputs, opening, trained
  )
  if labelled.source is not source or "labels" in goal.inputs:
    with config.naming("input"):
      labelling.check_onehot(section["pp"], network.num_classes)
  source, teachers = labelled.source, {**teachers, **labelled.teachers}
  with config.naming("objective"):
    objective = _weighted(objective, source, network.num_classes)
    goal = build_objective(objective, teachers)
  arrays = checks.example_arrays(source, section["pp"], section.get("on_error", "raise"))
  taught = goal.teaching.inputs if goal.teaching else {}
  inputs = checks.check_inputs(
    arrays, network.inputs, goal.inputs, taught, num_classes=network.num_classes
  )
  learner = _Learner(
    source, network, record, goal, objective, teachers, init, labelled, section, inputs,
    tokens,
  )  # fmt: skip
  checks.check_teachers(teachers, learner.shapes, network, goal.outputs)
  return learner


def _biased(model: Model, bias: float | None) -> Model:
  """The model whose head's bias begins with this number; None: as it is."""
  if bias is None:
    return model
  if not hasattr(model, "head_bias"):
    raise errors.UserError(
      f"init_head_bias={bias}, but a {type(model).__name__} has no head_bias; leave it out."
    )
  return model.clone(head_bias=bias)


def _with_bias(network: TwoTowers, goal: Objective, batch_size: int) -> TwoTowers:
  """The model whose bias, where it is "auto", begins as the batch asks; of an objective without one there is none.

  A bias that nothing trains would be taken for one that was: `predict --names` reads probabilities off it.
  """
  if network.bias == "auto" and "b" not in goal.outputs:
    return network.clone(bias=None)
  return network.with_batch(batch_size)


def _sizes(settings: Settings, learner: _Learner, flexi: patch_schedule.Flexi) -> _Sizes:
  """Weighs what is drawn at each step, and makes sure that the model can run each size."""
  network, shapes = learner.model, learner.shapes
  batches_of, update_scale = _budget(settings.token_budget, flexi, learner)
  batch_size, also = learner.input["batch_size"], learner.objective.also
  # Backward is worth two passes; microbatches of a loss over the batch make their embeddings twice.
  twice = not learner.objective.separable and settings.accumulate not in (1, "auto")
  step_flops = functools.partial(
    flops.step_flops,
    network,
    shapes,
    learner.teachers,
    also,
    passes=4 if twice else 3,
    batch_size=batch_size,
    frozen=_locked(settings, learner),
  )
  known: dict[SizeKey, float] = {}

  def cost(size: SizeArgs) -> float:
    key = size_key(size)
    if key not in known:  # a traced program takes a moment
      known[key] = step_flops(size) * batches_of(size)
    return known[key]

  flexi = patch_schedule.weigh(flexi, cost)
  for size in patch_schedule.all_static(flexi):
    checks.check_size(network, shapes["image"], size)
  for fixed in also:
    with config.naming("objective.size"):
      checks.check_size(network, shapes["image"], dict(fixed))
  return _Sizes(flexi, cost, batches_of, update_scale)


def _tower_cache(settings: Settings, learner: _Learner, optimizer: Optimizer) -> TowerCache | None:
  """What the embeddings of a locked image tower are cached by, where the config asks for it."""
  if settings.tower_cache is None:
    return None
  parts = getattr(learner.model, "parts", {})
  return tower_cache(
    settings.tower_cache,
    source=learner.source,
    section=learner.input,
    model=learner.model,
    fields=_fields(parts["image"]) if "image" in parts else {},
    objective=learner.objective,
    frozen=optimizer.frozen,
  )


def _locked(settings: Settings, learner: _Learner) -> Tree | None:
  """Which parameters do not move, of a model of parts; None: all do, or it is one network."""
  if not hasattr(learner.model, "parts"):
    return None
  params = jax.eval_shape(lambda: steps.init_params(learner.model, learner.shapes, settings.seed))
  still = frozen(params, settings.optim.get("freeze"), settings.optim.get("schedule"))
  return still if any(jax.tree.leaves(still)) else None


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
  params = jax.eval_shape(lambda: steps.init_params(learner.model, learner.shapes, settings.seed))
  checks.check_channels(learner.init.params, learner.shapes["image"])
  if settings.optim.get("clip_each") is not None and not learner.objective.separable:
    raise errors.UserError(
      "optim.clip_each limits the gradient of each example, but this objective compares the examples of a batch; use"
      " optim.clip."
    )
  return _make_optimizer(
    params, total_steps=lengths.total_steps, **lengths.units(), **settings.optim
  )


def _evaluations(
  settings: Settings,
  learner: _Learner,
  lengths: _Lengths,
  opening: Opening,
  best: monitor.FollowedMetric | None,
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
    own = labelling.classes_for(section, learner.model, classes)
    often = every(where, section, default=saving if key in followed else lengths.total_steps)
    evaluations[key] = evaluation.build_evaluation(
      where, section, often, opening, own, learner.tokens
    )
    with config.naming(where):
      evaluation.check_evaluation(evaluations[key], learner.model, learner.source)
  return saving, evaluations


def _class_lines(learner: _Learner, flexi: patch_schedule.Flexi) -> list[str]:
  """Lines on how many examples or pixels each class has, what it weighs, how many captions are cut, which boxes have
  no token.
  """
  sizes = [data.class_sizes(learner.source)]
  if "mask" in learner.objective.inputs:
    sizes.append(data.pixel_shares(learner.source))
  if "boxes" in learner.objective.inputs:
    grids = [
      learner.model.grid(learner.shapes["image"][:2], **size).grid_hw
      for size in patch_schedule.all_static(flexi)
    ]
    pp = learner.input["pp"]
    sizes += data.box_lines(learner.source, pp, [h * w for h, w in grids])
  if learner.tokens is not None:
    sizes.append(texts.note(learner.tokens, learner.source))
  return [*filter(None, sizes), *_rare(learner.objective_section, learner.input, learner.source)]


def _followed(
  settings: Settings,
) -> tuple[monitor.FollowedMetric | None, monitor.EarlyStopping | None]:
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


def divided_model(exp: Experiment, mesh: Mesh | AbstractMesh) -> Model:
  """The model whose blocks gather what is divided over a mesh, as the config's `mesh` says.

  Raises:
    UserError: a `gather_dtype` that the model does not have, or that would round what its products take.
  """
  fields: dict[str, Any] = {"fsdp": mesh}
  if "gather_dtype" in exp.mesh:
    if not hasattr(exp.model, "gather_dtype"):
      raise errors.UserError(
        f"mesh.gather_dtype is for models with this field, and {type(exp.model).__name__} has none; leave it out."
      )
    fields["gather_dtype"] = exp.mesh["gather_dtype"]
  return exp.model.clone(**fields)


def without_evaluations(settings: Section) -> Json:
  """A config that only trains, with nothing that goes by an evaluation."""
  training = {k: v for k, v in settings.items() if k not in ("evals", "early_stopping")}
  checkpoint = dict(settings.get("checkpoint") or {})
  return training | {
    "checkpoint": {k: v for k, v in checkpoint.items() if not k.startswith("best")}
  }


def _weighted(objective: Section, source: data.Source, num_classes: int) -> Section:
  """The section with its class weights as numbers."""
  if objective.get("class_weights") is None:
    return objective
  weights = class_weights.resolve(objective["class_weights"], source, num_classes)
  return {**objective, "class_weights": weights}


def _rare(objective: Section, section: Section, source: data.Source) -> tuple[str, ...]:
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
  init: Section | None,
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
    load = opening.parts if hasattr(model, "parts") else opening.init
    start = load(model, labels=needed, **init)
  labelled = labelling.of_run(
    source, model.num_classes, init=start.classes, teachers=teachers, labels=labels, trained=trained
  )
  return start, labelled


def _budget(
  section: Section | None, flexi: patch_schedule.Flexi, learner: _Learner
) -> tuple[Callable[[SizeArgs], int], Callable[[SizeArgs], float] | None]:
  """Returns how many batches a step at a size takes, and by what its update is multiplied."""
  if section is None:
    return lambda size: 1, None
  if learner.teachers:
    raise errors.UserError("token_budget with teachers, whose batches are all alike; remove one.")
  if not learner.objective.separable:
    raise errors.UserError(
      "token_budget with a loss that compares the examples of a batch: with how many an example is compared would"
      " depend on the patch size; remove it."
    )
  budget = token_budgets.make(**section)

  def tokens(size: SizeArgs) -> int:
    rows, columns = learner.model.grid(learner.shapes["image"][:2], **size).grid_hw
    return rows * columns

  every = itertools.product(*(choice.values for choice in flexi.values()))
  most = max(tokens(dict(zip(flexi, values, strict=True))) for values in every)
  batches_of = lambda size: budget.batches(tokens(size), most)  # noqa: E731
  return batches_of, lambda size: budget.update_scale(batches_of(size))


def build_objective(section: Section, teachers: Mapping[str, Teacher]) -> Objective:
  """Returns the objective that a section names; one that distils takes the teachers, loaded."""
  arguments = {k: v for k, v in section.items() if k not in ("name", "teachers")}
  arguments |= {"teachers": teachers} if "teachers" in section else {}
  return OBJECTIVES[section.get("name", "supervised")](**arguments)


def _total_steps(by_flops: float | None, **durations: Any) -> int:
  if by_flops is None:
    return schedules.to_steps("total", **durations)
  units = {k: durations[k] for k in ("steps", "epochs", "examples") if durations[k] is not None}
  if units:
    raise errors.UserError(f"Got total_flops and total_{next(iter(units))}; give one of them.")
  if not math.isfinite(by_flops):
    raise errors.UserError("total_flops is not finite; give a number, like 1e18.")
  return round(by_flops)


def _drawn(settings: Settings, learner: _Learner, digests: Mapping[str, str]) -> Json:
  """What the teachers' logits depend on: images, their draws and mixup, and the teachers."""
  section, objective = learner.input, learner.objective_section
  sampler = {} if section.get("sampler") != "balanced" else {"sampler": "balanced"}
  output = {} if "output" not in objective else {"output": objective["output"]}
  return dict(
    **sampler,
    **output,
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


def _fields(model: Model) -> Json:
  """What two models of the same parameters may differ in: num_heads, gelu and the like."""
  names = (field.name for field in dataclasses.fields(model) if field.init)
  return {name: getattr(model, name) for name in names if name not in UNNAMED}


def _train_batches(
  source: data.Source, section: Section, seed: int, total: int, start_step: int
) -> data.TrainBatches:
  process = dict(process_index=jax.process_index(), process_count=jax.process_count())
  options = {k: v for k, v in section.items() if k not in ("data", "pp")}
  return data.train_batches(
    source, section["pp"], seed=seed, num_steps=total, start_step=start_step, **options, **process
  )


def _every(where: str, section: Section, *, default: int, sizes: Json, total: int) -> int:
  durations = {unit: section[f"every_{unit}"] for unit in DURATIONS if f"every_{unit}" in section}
  every = schedules.to_steps(
    f"{where}.every", **durations, **sizes, total_steps=total, default=default
  )
  if every < 1:
    raise errors.UserError(f"{where}: every 0 steps is never; give at least 1, or leave it out.")
  return every
