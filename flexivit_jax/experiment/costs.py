"""What a config will cost, before anything is there: no data, no weights, no accelerator.

Mistakes in shapes are found: the config is built with stand-ins of the right size, and the training step of
each size is traced and lowered for meshes of devices that do not exist. Nothing is compiled, nothing computed.
"""

import functools
import inspect
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Sharding

from flexivit_jax import data, experiment, trees, weights
from flexivit_jax.config import Section
from flexivit_jax.data import queries
from flexivit_jax.devices import collectives, sharding
from flexivit_jax.evaluators import windows
from flexivit_jax.evaluators.per_size import sizes_of
from flexivit_jax.experiment import loaders
from flexivit_jax.experiment.machines import MACHINES
from flexivit_jax.models import MODELS, FlexiViT, Model, attention, counting, flops
from flexivit_jax.models.owl_vit import with_queries
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.sizes import SizeArgs, size_name
from flexivit_jax.training import patch_schedule, steps
from flexivit_jax.trees import Json, Tree

Jitted = jax.stages.Wrapped


MESHES = (1, 8, 32)


def plan(settings: Section, *, utilisation: float = 0.4, meshes: Sequence[int] = MESHES) -> Json:
  """Returns `costs`, and under "lowered" what `lowered` says of the meshes of more than one device."""
  summary = costs(settings, utilisation=utilisation, meshes=meshes)
  return summary | {"lowered": lowered(settings, several(meshes))}


def meshes_of(settings: Section) -> tuple[int, ...]:
  """Returns `MESHES`, and as many devices as the config's `mesh.fsdp` needs where none of these are."""
  fsdp = (settings.get("mesh") or {}).get("fsdp", 1)
  return MESHES if any(n % fsdp == 0 for n in MESHES) else (*MESHES, fsdp)


def several(meshes: Sequence[int]) -> list[int]:
  """Returns the numbers of more than one device: only these send anything."""
  return [n for n in meshes if n > 1]


def costs(
  settings: Section,
  *,
  utilisation: float = 0.4,
  meshes: Sequence[int] = MESHES,
  platform: str = "tpu v3",
) -> Json:
  """Returns what a config will cost, JSON-able.

  Args:
    settings: the config.
    utilisation: the share of its peak that a machine reaches.
    meshes: numbers of devices for which memory is estimated.
    platform: of these devices, one of `attention.PLATFORMS`; on a TPU v3 attention keeps its scores.

  Raises:
    UserError: what is wrong with the config; a data set that is neither here nor known.
  """
  exp = planned(settings, platform)
  state = state_of(exp)
  training = flops_of_training(exp)
  evaluation = sum(_evaluation_flops(exp, e) for e in exp.evaluations.values())
  sizes = _sizes(exp)
  seconds = {k: 1 / (m.flops * utilisation) for k, m in MACHINES.items()}
  return {
    "name": exp.name,
    "parameters": trees.count(state.params),
    "steps": exp.total_steps,
    "batch_size": exp.batch_size,
    "accumulate": exp.accumulate,
    "tower_cache": exp.tower_cache is not None,
    "epochs": exp.total_steps / exp.steps_per_epoch,
    "sizes": sizes,
    "training_flops": training,
    "evaluation_flops": evaluation,
    "utilisation": utilisation,
    "hours": {
      k: {"training": training * s / 3600, "evaluation": evaluation * s / 3600}
      for k, s in seconds.items()
    },
    "memory": {str(n): _memory(exp, state, n) for n in meshes},
    "divided": {str(n): divided(state.params, mesh) for n in meshes if (mesh := _mesh(exp, n))},
    "sent": {str(n): _sent(exp, state, n) for n in several(meshes)},
  }


def training_flops(settings: Section) -> float:
  """Returns what `costs` says of training, sooner: teachers have no parameters here, blocks are a loop."""
  teacher = functools.partial(_planned_teacher, shapes=False)
  exp = _looped(settings, PLANNED._replace(teacher=teacher))
  return flops_of_training(exp)


def flops_of_training(exp: experiment.Experiment) -> float:
  """FLOPs of all steps, without what `remat` computes again."""
  return patch_schedule.mean_cost(exp.flexi, exp.step_flops) * exp.total_steps


# --- the parts ---


def planned(settings: Section, platform: str) -> experiment.Experiment:
  """The experiment of a config with stand-ins for what it opens, for a platform: one of `attention.PLATFORMS`."""
  teacher = functools.partial(_planned_teacher, platform=platform)
  return experiment.from_config(
    on_accelerator(settings, platform), opening=PLANNED._replace(teacher=teacher)
  )


def _planned_teacher(
  *,
  checkpoint: str | None = None,
  model: Section | None = None,
  shapes: bool = True,
  platform: str = "tpu",
  **options: Any,
) -> Teacher:
  """As `load_teacher`, of shapes only where the config names the model, or without those."""
  if model is None:
    return loaders.load_teacher(checkpoint=checkpoint, **options)
  section = {"dtype": "bfloat16", **_attention_of(model, platform)}
  network, _ = loaders.build_model(section, num_classes=0)
  init = functools.partial(steps.init_params, network, {"image": (8, 8, 3)}, seed=0)
  params = jax.eval_shape(init) if shapes else {}
  size = {} if options.get("seqhw") is None else {"seqhw": options["seqhw"]}
  return Teacher(network, params, options.get("image", "image"), size)


def _planned_fields(checkpoint: str, **options: Any) -> Json:
  """As `loaders.fields_of`; of a published file that is not here, what is known of it."""
  if checkpoint in weights.PUBLISHED and not weights.is_here(checkpoint):
    return {k: v for k, v in weights.PUBLISHED[checkpoint].expected.items() if k != "num_classes"}
  return loaders.fields_of(checkpoint, **options)


PLANNED = loaders.Opening(
  source=data.planned_source,
  teacher=_planned_teacher,
  init=lambda model, **_: loaders.Init(None, None),
  parts=lambda model, **_: loaders.Init(None, None),
  fields=_planned_fields,
  digest=lambda params: "planned",
  shots=lambda source, **_: source,
  tokens=lambda pp: None,
)


def state_of(exp: experiment.Experiment) -> steps.TrainState:
  """The shapes of the state before the first step."""

  def init() -> steps.TrainState:
    params = steps.init_params(exp.model, exp.shapes, exp.seed)
    return steps.init_state(params, exp.optimizer.tx, exp.objective)

  return jax.eval_shape(init)


def _sizes(exp: experiment.Experiment) -> list[Json]:
  mean = patch_schedule.mean_cost(exp.flexi, exp.step_flops)
  rows = []
  for size, share, cost in patch_schedule.shares(exp.flexi, exp.step_flops):
    args: SizeArgs = dict(size)
    grid = exp.model.grid(exp.image_shape[:2], **args).grid_hw
    rows.append(
      {
        "size": size_name(size),
        "tokens": grid[0] * grid[1],
        "gmacs": exp.model.gmacs(exp.shapes, **size),
        "step_flops": cost,
        "share_of_steps": share,
        "share_of_flops": share * cost / mean,
      }
    )
  return rows


def _evaluation_flops(exp: experiment.Experiment, evaluation: experiment.Evaluation) -> float:
  """FLOPs of one evaluator over the whole run: a forward pass at each size, and the teacher's once for all."""
  section = evaluation.section
  axes = {k: section[k] for k in ("seqhw", "stride", "depth") if section.get(k)}
  sizes = sizes_of(**axes) if axes else []
  model, shapes, views = exp.model, exp.shapes, 1.0
  if section.get("type") == "detection" and "queries" in model.inputs:  # which are embedded once
    length = int(model.outputs["query_embeddings"].shape[-1])
    queries = np.zeros((evaluation.source.num_classes, length), np.float32)
    model, shapes = with_queries(model, {}, queries)[0], {"image": shapes["image"]}  # type: ignore[arg-type]
  if section.get("type") == "segmentation":
    shapes, views = _views(section, evaluation.source, exp.shapes)
  macs = views * sum(model.gmacs(shapes, **size) for size in sizes)
  times = math.ceil(exp.total_steps / evaluation.every)
  if "teacher" in section:
    teacher = section["teacher"]
    arrays = experiment.example_arrays(evaluation.source, evaluation.pp)
    macs += teacher.model.gmacs({"image": arrays[teacher.image].shape}, **teacher.size)
    times = 1 if not sizes else times
  return 2e9 * macs * len(evaluation.source) * times


def _views(
  section: Section, source: data.Source, shapes: dict[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], float]:
  """What the model sees of an image in an evaluation of segmentation, and how often: windows, scales, mirrored.

  All images are taken to have the size of the first; without a window they are as in training (`shapes`), and a scale
  costs as its number of pixels.
  """
  scales, flips = section.get("scales", (1.0,)), 2 if section.get("flip") else 1
  window = section.get("window")
  if window is None:
    return shapes, flips * sum(scale**2 for scale in scales)
  stride = section.get("window_stride", window)
  window, stride = ((n, n) if isinstance(n, int) else tuple(n) for n in (window, stride))
  h, w, channels = experiment.example_arrays(source, section["pp"])["image"].shape
  short = section.get("short_side") or min(h, w)
  seen = (windows.scaled((h, w), short * scale, window) for scale in scales)
  number = sum(windows.number(hw, window, stride) for hw in seen)
  return {**shapes, "image": (*window, channels)}, flips * number


def _activation_bytes(exp: experiment.Experiment, model: Model, size: SizeArgs) -> float:
  """Bytes of one example's activations; a part of the model that does not move keeps none."""
  if not hasattr(model, "parts"):
    return model.activation_bytes(exp.shapes, **size)
  return counting.activation_bytes(model, exp.shapes, exp.optimizer.frozen, **size)


def memory(
  exp: experiment.Experiment,
  state: steps.TrainState,
  mesh: AbstractMesh,
  model: Model,
  microbatches: int,
) -> dict[str, float]:
  """Returns bytes on each device at the costliest size: the batch is divided, weights where the mesh says so.

  "activations" are those of the student or of the teachers, whichever are more: the teachers' are freed before the
  student's step begins, for they are another program.

  Args:
    exp: the experiment.
    state: see `state_of`.
    mesh: its batch need not divide over it: a device then has a share of an image.
    model: `exp.model`, or a copy with another `remat`, `scan` or `attention`.
    microbatches: their number.
  """
  share = exp.batch_size / mesh.size
  batch = sum(share * math.prod(x.shape) * x.dtype.itemsize for x in exp.inputs.values())
  teachers = exp.objective.teaching.frozen if exp.objective.teaching else ()
  costliest = max(patch_schedule.all_static(exp.flexi), key=exp.step_flops)
  weights = collectives.state_bytes(state.params, mesh)
  return {
    "parameters": weights,
    "copies": _copies(state.params, mesh, model),
    "gradients": weights * (1 if microbatches == 1 else 2),  # of a microbatch, and their sum
    "optimizer": collectives.state_bytes((state.opt_state, state.ema), mesh),
    "teachers": collectives.state_bytes(teachers, mesh)
    if exp.mesh.get("divide_teachers", True)
    else trees.size_in_bytes(teachers),
    "batch": batch,
    "activations": max(_activation_bytes(exp, model, costliest), _taught_bytes(exp))
    * share
    / microbatches,
  }


def _taught_bytes(exp: experiment.Experiment) -> float:
  """Bytes of the teachers' forward passes for one example, which are computed one after the other."""

  def forward(teacher: Teacher) -> float:
    shapes = {"image": exp.inputs[teacher.image].shape}
    if isinstance(teacher.model, flops.Transformer):
      return flops.forward_bytes(teacher.model, shapes, **teacher.size)
    # What a backward pass would keep: an upper bound.
    return teacher.model.activation_bytes(shapes, **teacher.size)

  return max(map(forward, exp.teachers.values()), default=0.0)


def divided(params: Tree, mesh: AbstractMesh) -> Json:
  """Returns how parameters, or their shapes, are divided over a mesh.

  Returns:
    "pieces": bytes of the arrays that are in so many pieces, 1 for copies; "two_axes": number of arrays that are
    divided along more than one axis; "each": bytes on each device.
  """
  placed = zip(
    jax.tree.leaves(params), jax.tree.leaves(sharding.divided(params, mesh)), strict=True
  )
  found: dict[str, int] = {}
  two = 0
  for leaf, where in placed:
    pieces = str(sharding.pieces(leaf, where))
    found[pieces] = found.get(pieces, 0) + trees.size_in_bytes(leaf)
    two += sum(names is not None for names in where.spec) > 1
  most_first = dict(sorted(found.items(), key=lambda item: -int(item[0])))
  return {
    "pieces": most_first,
    "two_axes": two,
    "each": collectives.state_bytes(params, mesh),
  }


def _copies(params: Tree, mesh: AbstractMesh, model: Model) -> float:
  """Bytes of parameters that a step makes: those it stacks for a loop, and those it gathers along "fsdp".

  Gathered are, with their gradients, one block, or all without a loop, and everything that is outside of blocks.
  """
  encoder = params.get("Transformer", {})
  blocks = {k: v for k, v in encoder.items() if k.startswith("encoderblock")}
  looped = getattr(model, "scan", False)
  stacked = collectives.state_bytes(blocks, mesh) if looped == "by_block" else 0
  if sharding.lengths(mesh)[1] == 1:
    return stacked
  inside = trees.size_in_bytes(blocks)
  at_once = inside / getattr(model, "depth", 1) if looped else inside
  return stacked + 2 * (trees.size_in_bytes(params) - inside + at_once)


def _memory(exp: experiment.Experiment, state: steps.TrainState, devices: int) -> dict[str, float]:
  mesh = _mesh(exp, devices) or sharding.abstract_mesh(devices)
  return memory(exp, state, mesh, exp.model, _microbatches(exp))


def _sent(exp: experiment.Experiment, state: steps.TrainState, devices: int) -> float:
  """Bytes that each device sends to others in a step, see `collectives`."""
  mesh = _mesh(exp, devices) or sharding.abstract_mesh(devices)
  half = exp.mesh.get("gather_dtype") == "bfloat16"
  sent = collectives.expected(state.params, mesh, gather_bytes=2 if half else 4)
  return sent.on_the_wire(*sharding.lengths(mesh))


# --- lowering ---


def lowered(settings: Section, meshes: Sequence[int]) -> dict[str, str]:
  """Traces and lowers every training step for each number of devices; returns a line about each."""
  exp = _looped(settings)
  # One object per function, so that its trace serves the next mesh too.
  teach = None
  if exp.objective.teaching is not None:
    teach = jax.jit(
      functools.partial(steps.targets, teaching=exp.objective.teaching, **_common(exp))
    )
  train = _gradients(exp, exp.model)
  update = jax.jit(functools.partial(steps.update, objective=exp.objective, tx=exp.optimizer.tx))
  return {str(n): _lower_for(n, exp, teach, train, update) for n in meshes}


def _gradients(exp: experiment.Experiment, model: Model) -> list[Jitted]:
  """The first program of a step at each size."""
  clipping = {"clip_each": exp.optimizer.clip_each, "frozen": exp.optimizer.frozen}
  gradients = functools.partial(
    steps.gradients, model=model, objective=exp.objective, **clipping, **_common(exp)
  )
  sizes = patch_schedule.all_static(exp.flexi)
  return [jax.jit(functools.partial(gradients, **size)) for size in sizes]


def _common(exp: experiment.Experiment) -> Json:
  return {"seed": exp.seed, "accumulate": _microbatches(exp)}


def _microbatches(exp: experiment.Experiment) -> int:
  """Number of microbatches; 1 is assumed where memory decides."""
  return 1 if exp.accumulate == "auto" else int(exp.accumulate)


def _lower_for(
  devices: int,
  exp: experiment.Experiment,
  teach: Jitted | None,
  train: Sequence[Jitted],
  update: Jitted,
) -> str:
  if (exp.batch_size // _microbatches(exp)) % devices:
    return f"not possible: batch_size={exp.batch_size} / accumulate={_microbatches(exp)} does not divide over them"
  mesh = _mesh(exp, devices)
  if mesh is None:
    return f"not possible: mesh.fsdp={exp.mesh['fsdp']} does not divide them"
  # Blocks of a model with this field gather what is divided over the mesh; XLA does it for other models.
  if sharding.lengths(mesh)[1] > 1 and hasattr(exp.model, "fsdp"):
    train = _gradients(exp, experiment.divided_model(exp, mesh))
  split = functools.partial(_placed, sharding.batch_split(mesh))

  def whole(tree: Tree) -> Tree:
    return jax.tree.map(_placed_one, tree, sharding.divided(tree, mesh))

  specs = {
    k: split(jax.ShapeDtypeStruct((exp.batch_size, *x.shape), x.dtype))
    for k, x in exp.inputs.items()
  }
  state = whole(state_of(exp))
  batch: Json = {k: specs[k] for k in exp.objective.inputs}
  if teach is not None:
    taught = {k: specs[k] for k in exp.objective.teaching.inputs}
    args = (state.step, taught, whole(exp.objective.teaching.frozen))
    teach.trace(*args).lower(lowering_platforms=("tpu",))
    batch["targets"] = split(jax.eval_shape(teach, *args))
  for gradients in train:
    gradients.trace(state, batch).lower(lowering_platforms=("tpu",))
  gradients_out = whole(jax.eval_shape(train[0], state, batch))
  update.trace(state, *gradients_out).lower(lowering_platforms=("tpu",))
  return f"{len(train)} training steps lowered"


def _placed(where: Sharding, tree: Tree) -> Tree:
  return jax.tree.map(lambda s: _placed_one(s, where), tree)


def _placed_one(s: jax.ShapeDtypeStruct, where: Sharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where)


def _mesh(exp: experiment.Experiment, devices: int) -> AbstractMesh | None:
  """The config's mesh with so many devices, as many as there may be along "data"; None where that cannot be."""
  fsdp = exp.mesh.get("fsdp", 1)
  return None if devices % fsdp else sharding.abstract_mesh(devices, fsdp=fsdp)


def on_accelerator(settings: Section, platform: str = "tpu") -> Json:
  """A config with the dtype and the form of attention that it has there, whatever this machine is and has of files."""
  model = {"dtype": "bfloat16", **_attention_of(settings["model"], platform)}
  changed: Json = {**settings, "model": model}
  length = model.get("query_length", 0)
  if "input" in changed:
    changed["input"] = _without_files(changed["input"], length)
  if changed.get("evals"):
    changed["evals"] = {k: _without_files(one, length) for k, one in changed["evals"].items()}
  return changed


def _without_files(section: Section, query_length: int) -> Section:
  pp = section.get("pp") if isinstance(section, Mapping) else None
  if not isinstance(pp, str):
    return section
  made = {**section, "pp": data.without_files(pp, query_length)}
  vectors = section.get("vectors")
  if query_length and isinstance(vectors, str) and not os.path.exists(vectors):
    made["vectors"] = f"{queries.RANDOM}{query_length}"
  return made


def _attention_of(section: Section, platform: str = "tpu") -> Json:
  """A model's section whose attention is that of a platform; as it is where the model has no such field.

  A kernel for other devices than the platform's is "auto" there.
  """
  network = MODELS.get(section.get("name", "flexivit"), FlexiViT)
  if "attention" not in inspect.signature(network).parameters:
    return {**section}
  form = section.get("attention", "auto")
  if ":" in form:
    return {**section}
  if form in attention.KERNELS and attention.why_not(form, platform, "bfloat16", 8):
    form = "auto"
  return {**section, "attention": f"{form}:{platform}"}


def _looped(settings: Section, opening: loaders.Opening = PLANNED) -> experiment.Experiment:
  """The experiment with its blocks as one loop: no shape of a step changes, and one block is traced, not a dozen.

  As it is where its optimizer tells blocks apart by name. Evaluations have no part in it.
  """
  optim = settings["optim"]
  named = optim.get("lr_mults") or not isinstance(optim.get("schedule", {}), Mapping)
  settings = on_accelerator(settings)
  network = MODELS.get(settings["model"].get("name", "flexivit"), FlexiViT)
  lowered = {**settings["model"], **({} if named else {"scan": True})}
  fields = inspect.signature(network).parameters  # a model without blocks is lowered as it is
  model = {k: v for k, v in lowered.items() if k in settings["model"] or k in fields}
  return experiment.from_config(
    experiment.without_evaluations({**settings, "model": model}), opening=opening
  )
