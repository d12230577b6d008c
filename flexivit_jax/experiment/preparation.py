"""Prepares the steps of a run: the mesh, the first state, the teachers, the compiled programs."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from flexivit_jax import experiment, trees
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.models import FlexiViT, attention, two_towers
from flexivit_jax.objectives import contrastive
from flexivit_jax.running import distributed
from flexivit_jax.running.session import note
from flexivit_jax.sizes import SizeArgs, size_name
from flexivit_jax.training import (
  locked as locked_tower,
  patch_schedule,
  step_programs,
  steps,
  teachers,
)
from flexivit_jax.trees import Json, Params

Hold = Callable[[contextlib.AbstractContextManager[Any]], Any]


def place(exp: experiment.Experiment) -> tuple[experiment.Experiment, Mesh]:
  """Returns the experiment, its model knowing the mesh where that divides parameters, and the mesh that it names.

  Raises:
    UserError: the batch does not divide over the mesh; a form of attention that cannot run on these devices.
  """
  mesh = sharding.make_mesh(**{k: v for k, v in exp.mesh.items() if k not in sharding.OPTIONS})
  whole = 1 if exp.accumulate == "auto" else int(exp.accumulate)
  sharding.check_divides(exp.batch_size // whole, mesh)
  for name, evaluation in exp.evaluations.items():
    if (
      evaluation.section.get("window") is None
    ):  # else batches are of windows, on each process by itself
      sharding.check_divides(evaluation.section["batch_size"], mesh, f"evals.{name}.batch_size")
  if isinstance(exp.model, FlexiViT):
    model = exp.model
    attention.check_here(model.attention, model.dtype, model.width // model.num_heads)
  if sharding.lengths(mesh)[1] > 1 and hasattr(exp.model, "fsdp"):
    exp = exp._replace(model=experiment.divided_model(exp, mesh))
  return exp, mesh


def _microbatches(exp: experiment.Experiment, mesh: Mesh) -> tuple[list[int], float]:
  """Returns the candidate numbers of microbatches, and the bytes of each device that a step may use."""
  if exp.accumulate != "auto":
    return [int(exp.accumulate)], math.inf
  if exp.memory_gib is not None:
    return sharding.possible_microbatches(exp.batch_size, mesh), exp.memory_gib * 2**30
  memory = distributed.smallest(
    compilation.device_memory()
  )  # other numbers would be other programs
  return sharding.possible_microbatches(exp.batch_size, mesh), memory


def abstract_state(exp: experiment.Experiment) -> steps.TrainState:
  """The shapes and dtypes of the training state; nothing is computed."""
  return jax.eval_shape(functools.partial(_init, exp), exp.init, np.uint32(exp.seed))


def first_state(exp: experiment.Experiment, mesh: Mesh) -> steps.TrainState:
  """Returns the state before the first step, made on its devices: a divided array is never whole on one."""
  init = jax.jit(functools.partial(_init, exp))
  weights = None if exp.init is None else jax.device_put(exp.init, sharding.divided(exp.init, mesh))
  seed = np.uint32(exp.seed)
  where = sharding.divided(jax.eval_shape(init, weights, seed), mesh)
  state = jax.jit(init, out_shardings=where)(weights, seed)
  fsdp = sharding.lengths(mesh)[1]
  note(
    f"{trees.count(state.params):,} parameters on {mesh.size} x {jax.devices()[0].device_kind}"
    + (f", divided by {fsdp}" if fsdp > 1 else "")
  )
  return state


def _init(exp: experiment.Experiment, weights: Params | None, seed: jax.Array) -> steps.TrainState:
  params = steps.init_params(exp.model, exp.shapes, seed)
  params = trees.overlaid(params, weights or {})  # loaded weights may lack a head, or a tower
  return steps.init_state(params, exp.optimizer.tx, exp.objective)


def rest(state: steps.TrainState) -> Json:
  """Returns the arrays of a checkpoint other than the parameters."""
  items = {k: v for k, v in state._asdict().items() if k != "params"}
  return {k: v for k, v in items.items() if v is not None}


def constants(exp: experiment.Experiment, mesh: Mesh) -> dict[str, jax.Array]:
  """Returns the arrays constant within a run that differ between runs of the same compiled programs."""
  numbers = {"seed": np.uint32(exp.seed), "total_steps": np.int32(exp.total_steps)}
  return jax.device_put(numbers, sharding.replicated(mesh))


class Step(NamedTuple):
  """The compiled training step: `step(number, size, state, batch) -> (state, measured)`. Reads nothing back.

  Attributes:
    programs: the gradients at each size, and the update.
    teachers: gives the teachers' logits of a batch; None: there are no teachers.
    constants: arrays constant within a run that differ between runs of the same programs.
    mesh: where all of it lives.
    inputs: the keys of a batch that the objective takes from the data.
    tower: gives the images' vectors of a locked tower whose embeddings are cached; None: there is none.
  """

  programs: step_programs.StepPrograms
  teachers: teachers.TeacherLogits | None
  constants: dict[str, jax.Array]
  mesh: Mesh
  inputs: tuple[str, ...]
  tower: locked_tower.LockedTower | None = None

  def __call__(
    self, number: int, size: SizeArgs, state: steps.TrainState, batch: dict[str, np.ndarray]
  ) -> tuple[steps.TrainState, dict[str, jax.Array]]:
    """Makes step `number`, counted from 1, at a size. The memory of `state` is taken."""
    return self.programs(size, state, self.put(number, size, state, batch), self.constants)

  def put(
    self, number: int, size: SizeArgs, state: steps.TrainState, batch: dict[str, np.ndarray]
  ) -> Json:
    """Returns the inputs of a step on the devices, with the teachers' logits or the locked tower's embeddings."""
    on_device = sharding.put_batch({k: batch[k] for k in self.inputs}, self.mesh)
    if self.tower is not None:
      on_device["embedded"] = self.tower(size, state.params["image"], batch)
    if self.teachers is not None:
      on_device["targets"] = self.teachers(number - 1, batch, state.step)
    return on_device

  def look(
    self, number: int, size: SizeArgs, state: steps.TrainState, batch: dict[str, np.ndarray]
  ) -> tuple[steps.TrainState, dict[str, jax.Array], Params]:
    """As a call, and returns the gradients too."""
    inputs = self.put(number, size, state, batch)
    return self.programs.with_gradients(size, state, inputs, self.constants)


def compile_step(
  exp: experiment.Experiment, state: steps.TrainState, mesh: Mesh, hold: Hold
) -> Step:
  """Compiles the teachers, one program of gradients for each size, and the update.

  Args:
    exp: the experiment.
    state: before the next step.
    mesh: where it lives.
    hold: enters a context until the run ends: the cache of the teachers' logits.

  Raises:
    UserError: a step that does not fit into memory; on several processes, other microbatches on one of them.
  """
  numbers, memory = _microbatches(exp, mesh)
  tower = _locked_tower(exp, state, mesh)
  if tower is not None:
    exp = exp._replace(objective=contrastive.of_embeddings(exp.objective))
  room = memory - sharding.bytes_each(state)
  logits = teacher_logits(exp, int(state.step), mesh, hold, microbatches=numbers, memory=room)
  free = memory - (0 if logits is None else logits.bytes)
  compiled = programs(exp, state, logits, mesh, tower, microbatches=numbers, memory=free)
  if distributed.is_on():
    distributed.agree(
      int(state.step), {"parts of the batch": sorted(compiled.microbatches.items())}
    )
  from_data = tuple(name for name in exp.objective.inputs if name != "embedded")
  return Step(compiled, logits, constants(exp, mesh), mesh, from_data, tower)


def _locked_tower(
  exp: experiment.Experiment, state: steps.TrainState, mesh: Mesh
) -> locked_tower.LockedTower | None:
  """Returns what embeds the images of a batch, where the config caches them; else None."""
  if exp.tower_cache is None:
    return None
  assert isinstance(exp.model, two_towers.TwoTowers)  # `locked.tower_cache` has seen to it
  params, part = state.params["image"], exp.model.parts["image"]

  def embed(params: Params, images: jax.Array, **size: Any) -> jax.Array:
    return two_towers.unit(part.apply({"params": params}, images, **size)[0].astype(np.float32))

  images = _specs(exp, ["image"], mesh)["image"]
  cached = locked_tower.EmbeddingCache(
    exp.tower_cache.folder,
    exp.tower_cache.identity(trees.digest(params)),
    exp.tower_cache.examples,
    int(exp.model.outputs["image"].shape[0]),
  )
  sizes = sorted(patch_schedule.all_static(exp.flexi), key=exp.step_flops)
  report = report_of("locked tower", exp)
  return locked_tower.LockedTower(embed, params, images, sizes, mesh, cache=cached, report=report)


def teacher_logits(
  exp: experiment.Experiment,
  start: int,
  mesh: Mesh,
  hold: Hold,
  *,
  microbatches: Sequence[int] = (1,),
  memory: float = math.inf,
) -> teachers.TeacherLogits | None:
  """Returns the source of the teachers' logits for the steps that are left; None without teachers."""
  if exp.objective.teaching is None:
    return None
  cache = None
  if exp.teacher_cache is not None:
    process = (jax.process_index(), jax.process_count())
    cache = teachers.TeacherCache(exp.teacher_cache, exp.drawn, process)
    hold(contextlib.closing(cache))
  logits = teachers.TeacherLogits(
    exp.objective.teaching,
    _specs(exp, exp.objective.teaching.inputs, mesh),
    mesh,
    seed=exp.seed,
    cache=cache,
    todo=range(start, exp.total_steps),
    divide=exp.mesh.get("divide_teachers", True),
    report=lambda program: note(f"compiled teachers: {program.seconds:.1f} s"),
    microbatches=microbatches,
    memory=memory,
  )
  if logits.complete:
    note(f"teachers: their logits of all steps are in {exp.teacher_cache}")
  return logits


def programs(
  exp: experiment.Experiment,
  state: steps.TrainState,
  logits: teachers.TeacherLogits | None,
  mesh: Mesh,
  tower: locked_tower.LockedTower | None = None,
  *,
  microbatches: Sequence[int] = (1,),
  memory: float = math.inf,
) -> step_programs.StepPrograms:
  """Compiles the steps at all sizes."""
  batch = _specs(exp, [name for name in exp.objective.inputs if name in exp.inputs], mesh)
  if tower is not None:
    batch["embedded"] = tower.specs
  if logits is not None:
    batch["targets"] = logits.specs
  sizes = sorted(patch_schedule.all_static(exp.flexi), key=exp.step_flops)
  compiled = step_programs.compile_steps(
    sizes,
    state,
    batch,
    constants(exp, mesh),
    mesh,
    model=exp.model,
    objective=exp.objective,
    tx=exp.optimizer.tx,
    clip_each=exp.optimizer.clip_each,
    frozen=exp.optimizer.frozen,
    skip_above=exp.skip_above,
    batches_of=exp.batches_of,
    update_scale=exp.update_scale,
    report=report_of("train", exp),
    microbatches=microbatches,
    memory=memory,
  )
  note(f"{len(sizes)} sizes and the update compiled in {compiled.seconds:.1f} s")
  return compiled


def _specs(exp: experiment.Experiment, inputs: Iterable[str], mesh: Mesh) -> Json:
  local = exp.batch_size // jax.process_count()
  arrays = {
    name: np.broadcast_to(exp.inputs[name].dtype.type(0), (local, *exp.inputs[name].shape))
    for name in inputs
  }
  return sharding.specs(arrays, mesh)


def report_of(kind: str, exp: experiment.Experiment) -> Callable[..., None]:
  """Returns a function that prints a line about each compiled program."""

  def report(size: dict, program: compilation.Program, microbatches: int = 1) -> None:
    if not size:
      note(f"compiled the update: {program.seconds:.1f} s, {_mib(program.bytes)}")
      return
    rows, columns = exp.model.grid(exp.image_shape[:2], **size).grid_hw
    note(
      f"compiled {kind} {size_name(size)}: {rows * columns} tokens,"
      f" {program.seconds:.1f} s, {_mib(program.bytes)}, {_mib(program.temp_bytes)} of it temporary"
      + (f", in {microbatches} parts" if microbatches > 1 else "")
    )

  return report


def _mib(size: float) -> str:
  return f"{size / 2**20:.1f} MiB"
