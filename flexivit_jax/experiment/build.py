"""From a config to the things it names: data, model, objective, optimizer, evaluators. Computes nothing on a device."""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from flexivit_jax import data, errors
from flexivit_jax.data import class_names
from flexivit_jax.evaluators import EVALUATORS
from flexivit_jax.evaluators.classification import table_classes
from flexivit_jax.experiment import class_weights, labelling, monitor, sections
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
from flexivit_jax.models.flexivit import UNNAMED, gmacs, which_depth, which_grid, which_patch
from flexivit_jax.objectives import OBJECTIVES
from flexivit_jax.objectives.base import Objective
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.training import patch_schedule, schedules, steps, token_budget as token_budgets
from flexivit_jax.training.optim import Optimizer, make as _make_optimizer

# Arguments of `build` that the program provides, so no keys of a config.
GIVEN = ("opening", "trained")
Waiting = Callable[[], contextlib.AbstractContextManager[None]]


class Evaluation(NamedTuple):
  """One evaluator of a run. `every` is in steps; a teacher in `section` is loaded.

  `make(model, mesh, waiting)` builds it; `waiting` is entered while a batch is awaited. `check(model)` tries all that
  with the first example, and computes nothing. `notes` are what the user should know of its classes.
  """

  make: Callable[..., Any]
  check: Callable[[nn.Module], None]
  every: int
  source: data.Source
  pp: str
  section: Mapping[str, Any]
  notes: tuple[str, ...] = ()


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
  model: nn.Module
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
  hang_after: float | None
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
  total_flops: float | None = None,
  accumulate: int | str = 1,
  memory_gib: float | None = None,
  token_budget: Mapping[str, Any] | None = None,
  init: Mapping[str, Any] | None = None,
  teacher_cache: str | None = None,
  init_head_bias: float | None = None,
  log_every: int = 50,
  early_stopping: int | Mapping[str, Any] | None = None,
  hang_after: float | None = 1800.0,
  skip_above: float | None = None,
  skip_limit: int = 10,
  mesh: Mapping[str, Any] | None = None,
  wandb: Mapping[str, Any] | None = None,
  opening: Opening | None = None,
  trained: class_names.Trained | None = None,
) -> Experiment:
  """Builds an experiment; the arguments are the top-level keys of a config, but for `GIVEN`.

  Args:
    name: of the run, in reports; default: its folder's.
    seed: of everything random.
    input: training data: `data` (arguments of `data.make_source`), and those of `data.train_batches`.
    model: `name` (default "flexivit") and the fields of that model; num_classes defaults to the data's, dtype to
      "bfloat16" on accelerators and "float32" on a CPU. `like`: a file (or what else `weights.load` takes) whose model
      has all fields that are not given here, but for num_classes, dtype and the like, which a run chooses for itself.
    optim: arguments of `optim.make`.
    objective: `name` (default "supervised") and its arguments; `teachers` is `{name: arguments of load_teacher}`.
    flexi: `{argument: section}`: what is drawn for each step; `seqhw` (or `grid_hw`, `patch_hw`, `stride`) and `depth`
      are arguments of the model, a section is e.g. {"v": values, "p": weights}; all its keys: `patch_schedule.parse`.
    evals: `{name: section}`; a section is `type` (default "classification"), `data`, `pp`, `batch_size`, `seqhw`,
      and one of every_steps, every_epochs, ... (default: at the end only); `stride` and `depth` for flexible axes other
      than the patch size; of a "distance" or "teacher" also `teacher`, of a "fewshot" or "knn" also `train_data` and
      the arguments of `data.few_shots` (without `shots` a "knn" takes all images) and of the evaluator. The one named
      "test", else the first in the alphabet, makes RUN/eval.json; another makes RUN/eval_NAME.json.
    checkpoint: `keep` (newest checkpoints to keep; None: all), and one of every_steps, ... (default: every epoch);
      `best`, a metric as "test/top1" (mean over the sizes) or "test/top1@8", whose best checkpoint is kept in RUN/best;
      `best_mode`, "max" or "min" (default: what is better of such a metric).
    total_steps: of the run; or give total_epochs, total_examples or total_flops.
    total_epochs: see `total_steps`.
    total_examples: see `total_steps`.
    total_flops: see `total_steps`; as many steps as the schedule of sizes is expected to make of it.
    accumulate: parts of a batch whose gradients are computed one after the other; "auto": at each size the fewest
      with which its step fits into memory, the same result but for rounding.
    token_budget: arguments of `token_budget.make`; steps at coarse sizes then take several batches. An epoch is so many
      steps as are expected to see each image once. Not with teachers.
    memory_gib: of each device, for accumulate="auto"; default: nine tenths of what the device has.
    init: weights to start from, arguments of `load_init`.
    teacher_cache: folder where the teachers' logits are kept, step by step: another run with the same data, seed and
      teachers reads them there, bit-equal, and runs no teacher. As large as steps x batch_size x classes x 4 bytes, or
      with objective.top_k, x top_k x 8 bytes.
    init_head_bias: fills the head's bias at the start.
    log_every: steps between reads of the losses from the device.
    early_stopping: evaluations without improvement after which the run ends; or arguments of `monitor.early_stopping`.
      Schedules stay those of the whole run. An evaluation that this or `checkpoint.best` goes by, and that does not say
      how often it runs, runs as often as checkpoints are saved.
    hang_after: seconds in which nothing goes on, no step, program or evaluation, after which the run says where it
      stands still and ends; None: never.
    skip_above: norm of a gradient, before clipping, above which a step changes nothing; also where it or the loss is
      not finite. The schedule of the learning rate waits meanwhile. None: such a step is made, or ends the run.
    skip_limit: skipped steps in a row after which the run ends.
    mesh: `data` and `fsdp`, see `sharding.make_mesh`; default: copies of the parameters on all devices, the batch
      divided. `divide_teachers` (default True): theirs are divided along "fsdp", too. Changes no result.
    wandb: arguments of `wandb_run.open_run`: metrics go to Weights & Biases, too. {} takes its own defaults. None: no.
    opening: how data and weights are opened; default: `REAL`.
    trained: what the checkpoint that the run goes on from says of its classes; None: it begins.

  Raises:
    UserError: a key that does not exist, a value that cannot be, sizes that do not divide the image.
  """
  objective, flexi, evals, checkpoint = objective or {}, flexi or {}, evals or {}, checkpoint or {}
  if isinstance(early_stopping, int):
    early_stopping = {"patience": early_stopping}
  sections.check_sections(
    input=input,
    model=model,
    objective=objective,
    optim=optim,
    flexi=flexi,
    evals=evals,
    checkpoint=checkpoint,
    init=init,
    mesh=mesh,
    token_budget=token_budget,
    early_stopping=early_stopping,
    wandb=wandb,
  )
  best, early = _followed(evals, checkpoint, early_stopping)
  keep = checkpoint.get("keep", 1)
  _check_ranges(
    seed,
    init_head_bias,
    counts={"log_every": log_every, "skip_limit": skip_limit, "checkpoint.keep": keep},
    limits={"hang_after": hang_after, "skip_above": skip_above},
  )
  opening = sharing(opening or REAL)
  with naming("input.data"):
    source = opening.source(**input["data"])
  with naming("model"):
    model = model_like(model, init, opening.fields)
  input = {**input, "pp": data.counted(input["pp"], model.get("num_classes", source.num_classes))}
  with naming("input"):
    _train_batches(source, input, seed, 1, 0)
  with naming("model"):
    network, record = build_model({"dtype": default_dtype(), **model}, source.num_classes)
  teachers = {name: opening.teacher(**t) for name, t in objective.get("teachers", {}).items()}
  with naming("objective"):
    unweighted = {k: v for k, v in objective.items() if k != "class_weights"}
    goal = build_objective(unweighted, teachers)
  start, labelled = _classes(
    source, network, init, teachers, "labels" in goal.inputs, opening, trained
  )
  if labelled.source is not source or "labels" in goal.inputs:
    with naming("input"):
      labelling.check_onehot(input["pp"], network.num_classes)
  source, teachers = labelled.source, labelled.teachers
  with naming("objective"):
    objective = _weighted(objective, source, network.num_classes)
    goal = build_objective(objective, teachers)
  skip = input.get("on_error", "raise")
  shapes = example_shapes(source, input["pp"], _inputs(goal), network.num_classes, skip)
  image_shape = shapes["image"]
  check_teachers(teachers, shapes, network.num_classes)
  batches_of, update_scale = _budget(token_budget, flexi, network, image_shape, bool(teachers))
  one = functools.partial(
    step_flops, network, shapes, teachers, goal.also, batch_size=input["batch_size"]
  )
  cost = lambda size: one(size) * batches_of(size)  # noqa: E731
  choices = patch_schedule.parse(flexi, cost)
  for size in patch_schedule.all_static(choices):
    check_size(network, image_shape, size)
  for fixed in goal.also:
    with naming("objective.size"):
      check_size(network, image_shape, fixed)
  per_step = input["batch_size"]
  if update_scale is not None:
    per_step *= patch_schedule.mean_cost(choices, batches_of)
  sizes = {"batch_size": per_step, "dataset_size": len(source)}
  total = _total_steps(
    total_flops and total_flops / patch_schedule.mean_cost(choices, cost),
    steps=total_steps,
    epochs=total_epochs,
    examples=total_examples,
    **sizes,
  )
  if total < 1:
    raise errors.UserError(f"Got {total} steps; expected at least 1.")
  check_accumulate(accumulate, memory_gib, input["batch_size"], network)
  largest = max(map(batches_of, patch_schedule.all_static(choices)))
  batches = functools.partial(_train_batches, source, input, seed, total * largest)
  digests = {name: opening.digest(teacher.params) for name, teacher in teachers.items()}
  if teacher_cache is not None and not teachers:
    raise errors.UserError("teacher_cache is set, but the objective has no teachers; remove it.")
  params = jax.eval_shape(lambda: steps.init_params(network, image_shape, seed, init_head_bias))
  _check_channels(start.params, image_shape)
  every = functools.partial(_every, sizes=sizes, total=total)
  evaluations, known = {}, (labelled.model, labelling.classes_of(source, "input.data"))
  saving = every("checkpoint", checkpoint, default=max(1, round(len(source) / per_step)))
  followed = {m.evaluator for m in (best, early and early.metric) if m}
  for key, section in evals.items():
    often = every(f"evals.{key}", section, default=saving if key in followed else total)
    with naming(f"evals.{key}"):
      evaluations[key] = build_evaluation(section, often, opening, known)
      _check_evaluation(evaluations[key], network, source)
  return Experiment(
    name=name,
    seed=seed,
    model=network,
    model_record=record,
    input_shapes=shapes,
    objective=goal,
    optimizer=_make_optimizer(params, total_steps=total, **sizes, **optim),
    flexi=choices,
    step_flops=cost,
    evaluations=evaluations,
    batches=batches,
    batch_size=input["batch_size"],
    steps_per_epoch=len(source) / per_step,
    total_steps=total,
    images_per_step=per_step,
    batches_of=batches_of,
    update_scale=update_scale,
    accumulate=accumulate,
    memory_gib=memory_gib,
    head_bias=init_head_bias,
    init=start.params,
    frozen_digests=digests,
    drawn=_drawn(source, input, seed, accumulate, objective, teachers, digests),
    teacher_cache=teacher_cache,
    save_every=saving,
    keep=keep,
    log_every=log_every,
    hang_after=hang_after,
    skip_above=skip_above,
    skip_limit=skip_limit,
    mesh=dict(mesh or {}),
    class_names=labelled.model.names,
    data_classes=labelled.data_names,
    notes=[
      *labelled.notes,
      *(f"evals.{k}: {n}" for k, e in evaluations.items() for n in e.notes),
    ],
    says=lambda: [*filter(None, [data.class_sizes(source)]), *_rare(objective, input, source)],
    best=best,
    early=early,
    wandb=wandb,
  )


def _followed(
  evals: Mapping[str, Any],
  checkpoint: Mapping[str, Any],
  early_stopping: Mapping[str, Any] | None,
) -> tuple[monitor.Metric | None, monitor.EarlyStopping | None]:
  """The metrics that a run goes by."""
  best, mode = checkpoint.get("best"), checkpoint.get("best_mode")
  if mode is not None and best is None:
    raise errors.UserError("checkpoint.best_mode without checkpoint.best has no effect; add that.")
  return (
    None if best is None else monitor.parse("checkpoint.best", best, evals, mode),
    None if early_stopping is None else monitor.early_stopping(evals=evals, **early_stopping),
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
  model: nn.Module,
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


def _check_ranges(
  seed: int,
  init_head_bias: float | None,
  counts: Mapping[str, int | None],
  limits: Mapping[str, float | None],
) -> None:
  """Raises a UserError for a number that is out of its range; None is none."""
  for key, count in counts.items():
    if count is not None and count < 1:
      raise errors.UserError(f"{key}={count}; expected at least 1.")
  for key, limit in limits.items():
    if limit is not None and not limit > 0:
      raise errors.UserError(f"{key}={limit}; expected more than 0, or None.")
  if not math.isfinite(init_head_bias or 0.0):
    raise errors.UserError(f"init_head_bias={init_head_bias}; expected a finite number.")
  if not 0 <= seed < 2**32:
    raise errors.UserError(f"seed={seed}; expected 0 to {2**32 - 1}.")


@contextlib.contextmanager
def naming(section: str) -> Iterator[None]:
  """Errors of what a section configures say which it is."""
  try:
    yield
  except errors.UserError as e:
    raise errors.UserError(f"{section}: {e}") from e


def _budget(
  section: Mapping[str, Any] | None,
  flexi: Mapping[str, Any],
  model: nn.Module,
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
    rows, columns = which_grid(tuple(image_shape[:2]), model.patch_size, **size).grid_hw
    return rows * columns

  values = patch_schedule.parse({name: {"v": choice["v"]} for name, choice in flexi.items()})
  most = max(map(tokens, patch_schedule.all_static(values)))
  batches_of = lambda size: budget.batches(tokens(size), most)  # noqa: E731
  return batches_of, lambda size: budget.update_scale(batches_of(size))


def check_accumulate(
  accumulate: int | str, memory_gib: float | None, batch_size: int, model: nn.Module
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


def classes_of_tables(
  evaluation: Evaluation, rows: Sequence[Mapping[str, Any]]
) -> list[str] | None:
  """The names of the classes of the tables in an evaluation's rows; None: there are none."""
  if not rows or "confusion" not in rows[0]:
    return None
  source, section = evaluation.source, evaluation.section
  names = table_classes(source.class_names, source.num_classes, section.get("label_map"))
  return [*names, *map(str, range(len(names), len(rows[0]["confusion"])))]


def check_size(model: nn.Module, image_shape: Sequence[int], size: Mapping[str, Any]) -> None:
  """Raises a UserError if a model cannot run images (h, w, c) with these static arguments."""
  which_grid(tuple(image_shape[:2]), model.patch_size, **size)
  which_depth(model.depth, size.get("depth"))


def step_flops(
  model: nn.Module,
  shapes: Mapping[str, tuple[int, ...]],
  teachers: Mapping[str, Teacher],
  also: Sequence[Mapping[str, Any]],
  size: Mapping[str, Any],
  *,
  batch_size: int,
) -> float:
  """FLOPs of a training step: three forward passes at the size, one for each teacher and for each size in `also`."""
  h, w, c = shapes["image"]
  macs = 3 * gmacs(model, (h, w), c, **size) + sum(gmacs(model, (h, w), c, **s) for s in also)
  for teacher in teachers.values():
    th, tw, tc = shapes[teacher.image]
    macs += gmacs(teacher.model, (th, tw), tc, **teacher.size)
  return 2e9 * macs * batch_size


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


def _drawn(
  source: data.Source,
  section: Mapping[str, Any],
  seed: int,
  accumulate: int | str,
  objective: Mapping[str, Any],
  teachers: Mapping[str, Teacher],
  digests: Mapping[str, str],
) -> dict[str, Any]:
  """What the teachers' targets depend on: images, their draws and mixup, and the teachers."""
  options = {k: objective.get(k) for k in ("mixup_p", "top_k")}
  sampler = {} if section.get("sampler") != "balanced" else {"sampler": "balanced"}
  return dict(
    **sampler,
    data={**section["data"], "examples": len(source)},
    pp=section["pp"],
    batch_size=section["batch_size"],
    on_error=section.get("on_error"),
    seed=seed,
    accumulate=accumulate,
    **options,
    teachers={
      name: dict(sha256=digests[name], image=t.image, size=t.size, model=_fields(t.model))
      for name, t in teachers.items()
    },
  )


def _fields(model: nn.Module) -> dict[str, Any]:
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
    which_patch(shapes[teacher.image][:2], teacher.model.patch_size, **teacher.size)


def build_evaluation(
  section: Mapping[str, Any],
  every: int,
  opening: Opening | None = None,
  classes: Sequence[class_names.Classes] = (),
) -> Evaluation:
  """Opens an evaluator's data; its device programs are made later, by `make(model, mesh)`.

  Args:
    section: of a config's `evals`.
    every: steps from one evaluation to the next.
    opening: how data and weights are opened; default: `REAL`.
    classes: those of the model, then those of its training data, to which labels are mapped by name; none: labels are
      as they are.

  Raises:
    UserError: what cannot be opened; labels or a teacher of other classes than the model's.
  """
  opening = opening or REAL
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

  def of(model: nn.Module, mesh: Any, waiting: Waiting, loading: Mapping[str, Any]) -> Any:
    scoring = _arguments(section, evaluator)
    if training:
      batches = data.eval_batches(training, **loading)
      batches.waiting = waiting
      scoring |= {"train_batches": batches, "num_classes": source.num_classes}
    batches = data.eval_batches(source, **loading)
    batches.waiting = waiting
    return evaluator(model, batches, mesh, **scoring)

  def make(model: nn.Module, mesh: Any, waiting: Waiting = contextlib.nullcontext) -> Any:
    return of(model, mesh, waiting, loading)

  def check(model: nn.Module) -> None:
    data.eval_batches(source, **loading)
    one = dict(batch_size=1, threads=0, workers=0, process_index=0, process_count=1)
    of(model, None, contextlib.nullcontext, {**loading, **one}).check()

  return Evaluation(make, check, every, source, section["pp"], section, notes)


def _check_evaluation(evaluation: Evaluation, model: nn.Module, training: data.Source) -> None:
  """Raises a UserError if the model's own logits are scored on data of other classes, and no label map says which; or
  as the evaluator does on its first example.
  """
  section, classes = evaluation.section, evaluation.source.num_classes
  known = {model.num_classes, training.num_classes}
  own = section.get("type", "classification") == "classification"
  if own and section.get("label_map") is None and classes not in known:
    raise errors.UserError(
      f"data has {classes} classes, the model {' or '.join(map(str, known))}; give data of the same classes, or a"
      " label_map."
    )
  evaluation.check(model)


def _arguments(section: Mapping[str, Any], function: Callable[..., Any]) -> dict[str, Any]:
  return {k: section[k] for k in inspect.signature(function).parameters if k in section}


def example_shapes(
  source: data.Source, pp: str, inputs: Sequence[str], num_classes: int, on_error: str = "raise"
) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of what the preprocessing makes of the first example; labels have to fit the model."""
  with naming("input"):
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
