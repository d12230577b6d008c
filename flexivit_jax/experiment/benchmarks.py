"""What each patch size costs on this machine, measured before anything is trained.

Times are medians over rounds in which all sizes take turns, so that a machine that slows down slows all of them. The
columns are those of timm's benchmark.py where it has them, and the patch size.
"""

import contextlib
import functools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors, experiment, trees, weights
from flexivit_jax.config import Section
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.devices.timing import alternate, matmul_peak
from flexivit_jax.evaluators import results
from flexivit_jax.experiment import preparation
from flexivit_jax.models import FlexiViT, attention
from flexivit_jax.objectives.supervised import supervised
from flexivit_jax.sizes import SeqHw, SizeArgs, SizeKey, size_args, size_key, size_name, size_text
from flexivit_jax.tables import aligned
from flexivit_jax.training import optim, patch_schedule, step_programs, steps
from flexivit_jax.trees import Json, Params

BenchRow = Json
PASSES = {"infer": 1, "train": 3}  # FLOPs in forward passes; a backward pass is two


class Setting(NamedTuple):
  """What all sizes share; `peak` is the device's FLOP/s in a large matrix product."""

  batch_size: int
  image_size: int
  rounds: int
  peak: float


# --- speed ---


def forward(model: FlexiViT, sizes: Sequence[SeqHw], setting: Setting) -> list[BenchRow]:
  """Inference at each size, the kernel and the grid resized once beforehand."""
  image = _image(setting.batch_size, setting.image_size)
  params = _params(model, setting.image_size)
  hw = (setting.image_size, setting.image_size)
  runs: dict[SeqHw, Callable[[], object]] = {}
  programs: dict[SeqHw, compilation.Program] = {}
  for seqhw in sizes:
    fixed, baked = weights.bake(model, params, image_hw=hw, **size_args(seqhw))
    baked = jax.device_put(baked)

    def apply(params: Params, image: jax.Array, model: FlexiViT = fixed) -> jax.Array:
      return model.apply({"params": params}, image)[0]

    (programs[seqhw],) = compilation.compile_each(apply, (baked, image), [{}]).values()
    runs[seqhw] = functools.partial(programs[seqhw].run, baked, image)
  times = alternate(runs, setting.rounds)
  return [_row("infer", model, n, setting, times[n], programs[n]) for n in sizes]


def train(
  model: FlexiViT, sizes: Sequence[SeqHw], setting: Setting, memory_gib: float | None = None
) -> list[BenchRow]:
  """A training step at each size: forward, backward, clipping, Adam with decoupled weight decay.

  With `memory_gib` in as few microbatches as fit into this memory.
  """
  step, state, programs = training(
    model, sizes, setting.batch_size, setting.image_size, memory_gib=memory_gib
  )
  times = alternate({n: functools.partial(step, n) for n in sizes}, setting.rounds)
  rows = []
  for n in sizes:
    key = size_key(size_args(n))
    opt_bytes = trees.size_in_bytes(state.opt_state)
    row = _row("train", model, n, setting, times[n], programs.gradients[key], opt_bytes)
    rows.append(row | {"parts": programs.microbatches[key]})
  return rows


def forms(model: FlexiViT) -> list[str]:
  """Returns the forms of attention that can run here, and prints why the others cannot."""
  reasons = {
    form: attention.why_not(form, attention.here(), model.dtype, model.width // model.num_heads)
    for form in attention.FORMS
  }
  for form, reason in reasons.items():
    if reason:
      print(f"attention={form} is not measured: {reason}")
  return [form for form, reason in reasons.items() if not reason]


def each_form(
  measure: Callable[[FlexiViT], list[BenchRow]], model: FlexiViT, forms: Sequence[str]
) -> list[BenchRow]:
  """The rows of `measure(model)` with each of these forms of attention, from few tokens to many.

  A column "attention" has the form, with a star where it is what "auto" is at that size. Forms that do not fit into
  memory are printed.

  Raises:
    OutOfMemory: no form fits.
  """
  head, platform = model.width // model.num_heads, attention.here()
  rows: list[BenchRow] = []
  failed = None
  for form in forms:
    try:
      measured = measure(model.clone(attention=form))
    except compilation.OutOfMemory as e:
      failed = e
      print(f"attention={form} is not measured; give fewer tokens or images. {e}")
      continue
    for row in measured:
      chosen = ""
      if row["tokens"] != "all":
        length = row["tokens"] + model.prefix_length
        chosen = attention.choose(platform, length, length, model.dtype, head)
      rows.append({"attention": form + " *" * (form == chosen)} | row)
  if failed is not None and not rows:
    raise failed
  return sorted(rows, key=lambda row: math.inf if row["tokens"] == "all" else row["tokens"])


def training(
  model: FlexiViT,
  sizes: Sequence[SeqHw],
  batch_size: int,
  image_size: int,
  *,
  memory_gib: float | None = None,
  report: step_programs.Report = lambda size, program, microbatches: None,
) -> tuple[Callable[[SeqHw], dict[str, jax.Array]], steps.TrainState, step_programs.StepPrograms]:
  """Supervised training on random images, compiled.

  Returns:
    A function that makes a step at a size and returns what it measured, the first state's shapes, and the programs.
  """
  params = _params(model, image_size)
  optimizer = optim.make(
    params, total_steps=1000, lr=1e-3, wd=1e-4, clip=1.0, schedule=dict(decay_type="cosine")
  )
  objective = supervised()
  state = steps.init_state(params, optimizer.tx, objective)
  labels = jax.nn.one_hot(jnp.arange(batch_size) % model.num_classes, model.num_classes)
  batch = {"image": _image(batch_size, image_size), "labels": labels}
  mesh = sharding.make_mesh()
  whole = sharding.replicated(mesh)
  state, run = jax.device_put((state, {"seed": np.uint32(0), "total_steps": np.int32(1000)}), whole)
  batch = jax.device_put(batch, sharding.batch_split(mesh))
  limited = memory_gib is not None
  programs = step_programs.compile_steps(
    [size_args(n) for n in sizes],
    state,
    batch,
    run,
    mesh,
    model=model,
    objective=objective,
    tx=optimizer.tx,
    report=report,
    microbatches=sharding.possible_microbatches(batch_size, mesh) if limited else (1,),
    memory=memory_gib * 2**30 if limited else math.inf,
  )
  shapes = jax.eval_shape(lambda: state)

  def step(seqhw: SeqHw) -> dict[str, jax.Array]:
    nonlocal state
    state, measured = programs(size_args(seqhw), state, batch, run)
    return measured

  return step, shapes, programs


def stepping(settings: Section, rounds: int) -> list[BenchRow]:
  """A training step of a config at each of its sizes, whatever its model and objective: from a batch to the new state.

  Its FLOPs are those that the model counts; its memory is that of the compiled programs.
  """
  caches = ("teacher_cache", "tower_cache")  # no files are written
  trained = {k: v for k, v in settings.items() if k not in caches}
  exp, mesh = preparation.place(experiment.from_config(experiment.without_evaluations(trained)))
  state = preparation.first_state(exp, mesh)
  sizes = {size_key(size): size for size in patch_schedule.all_static(exp.flexi)}
  with contextlib.ExitStack() as stack:
    step = preparation.compile_step(exp, state, mesh, stack.enter_context)
    batches = stack.enter_context(exp.batches(0))
    numbers = {key: exp.batches_of(size) for key, size in sizes.items()}
    taken = [next(batches) for _ in range(max(numbers.values()))]

    def run(key: SizeKey) -> dict[str, jax.Array]:
      nonlocal state
      batch = {k: np.concatenate([b[k] for b in taken[: numbers[key]]]) for k in taken[0]}
      state, measured = step(1, sizes[key], state, batch)
      return measured

    times = alternate({key: functools.partial(run, key) for key in sizes}, rounds)
  peak = matmul_peak(exp.model.dtype)
  opt_bytes = trees.size_in_bytes(state.opt_state)
  rows = []
  for key, size in sizes.items():
    median = statistics.median(times[key])
    grid, program = (
      exp.model.grid(exp.image_shape[:2], **size).grid_hw,
      step.programs.gradients[key],
    )
    flops = exp.step_flops(size) / median
    rows.append(
      {
        "model": type(exp.model).__name__,
        "size": size_name(size),
        "tokens": grid[0] * grid[1],
        "train_batch_size": numbers[key] * exp.batch_size,
        "train_samples_per_sec": numbers[key] * exp.batch_size / median,
        "train_step_time": median * 1e3,
        "spread": (max(times[key]) - min(times[key])) / median,
        "gflops_per_s": flops / 1e9,
        "of_peak": flops / peak,
        "peak_mib": (program.bytes + opt_bytes) / 2**20,
        "parts": step.programs.microbatches[key],
      }
    )
  return rows


# --- compilation, input, start-up ---


def compiling(
  model: FlexiViT,
  sizes: Sequence[SeqHw],
  batch_size: int,
  image_size: int,
  memory_gib: float | None = None,
) -> list[BenchRow]:
  """Seconds to trace and lower, and to compile the gradients at each size and the update of all; memory of a step.

  With no compiled program cached, or with those that JAX_COMPILATION_CACHE_DIR names. A size is compiled while the next
  is traced: all together take less than the sum.
  """
  rows: list[BenchRow] = []

  def report(size: SizeArgs, program: compilation.Program, microbatches: int) -> None:
    names = {"model": f"FlexiViT-{model.variant}", "img_size": image_size}
    names |= {"patch_size": "all", "tokens": "all"}
    rows.append(
      (_names(model, size, image_size) if size else names)
      | {
        "trace_s": program.trace_seconds,
        "compile_s": program.seconds - program.trace_seconds,
        "peak_mib": program.bytes / 2**20,
        "parts": microbatches,
      }
    )

  _, state, programs = training(
    model, sizes, batch_size, image_size, memory_gib=memory_gib, report=report
  )
  # The update has the optimizer state among its arguments; the gradients do not.
  for row in rows[:-1]:
    row["peak_mib"] += trees.size_in_bytes(state.opt_state) / 2**20
  print(f"{len(sizes)} sizes and the update in {programs.seconds:.1f} s")
  return rows


def reading(settings: Section, seconds: float = 10.0) -> BenchRow:
  """Images per second of a config's training input, and per second of CPU time: what one core would do."""
  exp = experiment.from_config(experiment.without_evaluations(settings))
  with exp.batches(0) as batches:
    next(batches)
    images, begin, cpu = 0, time.perf_counter(), time.process_time()
    for _ in batches:  # a short run ends before the time is over
      images += exp.batch_size
      if time.perf_counter() - begin >= seconds:
        break
    wall, cpu = time.perf_counter() - begin, time.process_time() - cpu
  shape = "x".join(map(str, exp.image_shape))
  return {
    "image": shape,
    "images": images,
    "images_per_s": images / wall,
    "images_per_core_s": images / cpu,
  }


def starting(spec: str) -> list[BenchRow]:
  """Seconds from the command `flexivit train` to the end of its first step: with no program cached, then with all."""
  with tempfile.TemporaryDirectory() as folder:
    return [
      {"programs": cache, "first_step_s": _first_step(spec, folder, cache)}
      for cache in ("cold", "warm")
    ]


def _first_step(spec: str, folder: str, name: str) -> float:
  environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_COMPILATION_CACHE")}
  environment["FLEXIVIT_CACHE"] = folder
  command = [
    "flexivit",
    "train",
    f"--config={spec}",
    f"--workdir={folder}/{name}",
    "--config.log_every=1",
  ]
  rows = pathlib.Path(folder, name, "metrics.jsonl")  # a row is written at once
  begin = time.perf_counter()
  with (
    tempfile.TemporaryFile("w+") as stderr,
    subprocess.Popen(
      [sys.executable, "-m", "flexivit_jax.cli", *command[1:]], env=environment, stderr=stderr
    ) as process,
  ):
    while process.poll() is None:
      if rows.exists() and rows.stat().st_size:
        seconds = time.perf_counter() - begin
        process.kill()
        return seconds
      time.sleep(0.01)
    stderr.seek(0)
    last = "".join(stderr.readlines()[-3:])
  raise errors.UserError(f"{' '.join(command)} ended before its first step: {last}")


# --- rows ---


def _image(batch_size: int, image_size: int) -> jax.Array:
  return jax.random.normal(jax.random.key(1), (batch_size, image_size, image_size, 3))


def _params(model: FlexiViT, image_size: int) -> Params:
  return jax.jit(lambda: steps.init_params(model, {"image": (image_size, image_size, 3)}, seed=0))()


def _names(model: FlexiViT, size: SizeArgs, image_size: int) -> BenchRow:
  patch, _, grid = model.grid((image_size, image_size), **size)
  return {
    "model": f"FlexiViT-{model.variant}",
    "img_size": image_size,
    "patch_size": patch[0] if patch[0] == patch[1] else size_text(patch),
    "tokens": grid[0] * grid[1],
  }


def _row(
  kind: str,
  model: FlexiViT,
  seqhw: SeqHw,
  setting: Setting,
  times: Sequence[float],
  program: compilation.Program,
  opt_bytes: int = 0,
) -> BenchRow:
  size, median = setting.image_size, statistics.median(times)
  macs = model.gmacs({"image": (size, size, 3)}, **size_args(seqhw))
  flops = 2e9 * PASSES[kind] * macs * setting.batch_size / median
  return _names(model, size_args(seqhw), size) | {
    f"{kind}_batch_size": setting.batch_size,
    f"{kind}_samples_per_sec": setting.batch_size / median,
    f"{kind}_step_time": median * 1e3,
    "spread": (max(times) - min(times)) / median,
    "gflops_per_s": flops / 1e9,
    "of_peak": flops / setting.peak,
    "peak_mib": (program.bytes + opt_bytes) / 2**20,
    f"{kind}_gmacs": macs,
    "param_count": trees.count(_shapes(model, size)) / 1e6,
  }


@functools.cache
def _shapes(model: FlexiViT, image_size: int) -> Params:
  return jax.eval_shape(
    lambda: steps.init_params(model, {"image": (image_size, image_size, 3)}, seed=0)
  )


def table(rows: Sequence[BenchRow]) -> str:
  """Rows of the same keys as columns of equal width."""
  cells = [list(rows[0]), *([_text(v) for v in row.values()] for row in rows)]
  return "\n".join(aligned(cells))


def _text(value: object) -> str:
  return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(file: pathlib.Path, benches: Mapping[str, Sequence[BenchRow]]) -> None:
  """One CSV of all tables, with a column "bench" that tells them apart."""
  rows = [{"bench": name, **row} for name, rows in benches.items() for row in rows]
  results.write_csv(file, rows)
