"""Batches, prefetched by Grain in threads or processes; `stream.py` says what they contain."""

import atexit
import contextlib
import functools
import logging
import math
import os
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from flexivit_jax.data.balanced import by_class
from flexivit_jax.data.preprocess import parse
from flexivit_jax.data.sources import Source
from flexivit_jax.data.stream import (
  Bad,
  Batch,
  BatchPlan,
  Chunk,
  Odd,
  check_limit,
  check_shapes,
  example_cache,
  index_of,
  make_chunk,
)
from flexivit_jax.errors import UserError, unknown

# Entered while a batch is awaited: in a run, the watchdog says what it is waiting for.
Waiting = Callable[[], contextlib.AbstractContextManager[None]]

SAMPLERS = ("shuffle", "balanced")
_LOG = logging.getLogger(__name__)
_CHUNK = 32  # Examples per task: large enough to hide Grain's overhead, small enough to share out.


class Options(NamedTuple):
  """How the work is distributed; does not change the batches."""

  threads: int
  workers: int
  prefetch: int


def train_batches(
  source: Source,
  pp: str,
  *,
  batch_size: int,
  seed: int,
  num_steps: int,
  start_step: int = 0,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = min(16, os.cpu_count() or 1),
  workers: int = 0,
  prefetch: int = 2,
  on_error: str = "raise",
  max_errors: int = 100,
  keep_mb: int = 512,
  sampler: str = "shuffle",
) -> "TrainBatches":
  """Shuffled batches of this process, for steps `start_step` to `num_steps`.

  Args:
    source: the examples.
    pp: the preprocessing string; its keys are stacked, and `_id` (int64 [n], the index of the
      example in the source) is added.
    batch_size: over all processes; each gets a contiguous `batch_size / process_count`.
    seed: of the order and of every random draw.
    num_steps: the step at which the stream ends.
    start_step: the first step; its batch is the one that a run from step 0 would see there.
    process_index, process_count: of this process.
    threads: number of threads that prepare examples; 0: the caller, without prefetching. More help
      for large images; tiny ones mostly hold Python's lock.
    workers: processes instead (each with `threads`); they start slowly and copy each batch.
    prefetch: number of batches to prefetch.
    on_error: "raise", or "skip": a bad example is replaced by the next good one of its epoch's
      order, and counted in `.errors`.
    max_errors: how many different bad examples "skip" tolerates.
    keep_mb: MiB of memory to cache decoded examples for later epochs: the whole data set or, if it is larger,
      nothing. Not with `workers`, each of which would have its own cache.
    sampler: "shuffle", each example once an epoch; or "balanced", each class equally often, in epochs of the same
      length, so that examples of rare classes come several times and not all of the common ones, see `balanced`.

  Raises:
    UserError: at once for bad arguments, from the iterator for bad examples.
  """
  if sampler not in SAMPLERS:
    raise unknown("sampler", sampler, SAMPLERS)
  if seed < 0:
    raise UserError(f"Data seed is {seed}; expected 0 or more.")
  options = _options(threads, workers, prefetch, keep_mb)
  plan = _plan(source, pp, seed, batch_size, process_index, process_count, on_error, max_errors)
  if len(source) < batch_size:
    raise UserError(
      f"{source.name} {source.split!r} has {len(source)} examples, fewer than one batch of "
      f"{batch_size}; take a larger split or a smaller batch_size."
    )
  plan = plan._replace(
    cache=None if workers else example_cache(source, plan.pp, keep_mb),
    order=by_class(source) if sampler == "balanced" else None,
  )
  return TrainBatches(plan, options, num_steps, start_step)


def eval_batches(
  source: Source,
  pp: str,
  *,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
  threads: int = min(16, os.cpu_count() or 1),
  workers: int = 0,
  prefetch: int = 2,
  on_error: str = "raise",
  max_errors: int = 100,
  keep_mb: int = 512,
  waiting: Waiting = contextlib.nullcontext,
) -> "EvalBatches":
  """Every example once, in order; every process gets the same number of batches.

  The arguments are those of `train_batches`, and `waiting`, a context manager that is entered while waiting for a
  batch. Batches also have `_mask` (float32 [n], 0 for padding and for examples that "skip" left out; such entries are
  zeros, their `_id` is -1).
  """
  options = _options(threads, workers, prefetch, keep_mb)
  plan = _plan(source, pp, None, batch_size, process_index, process_count, on_error, max_errors)
  plan = plan._replace(cache=None if workers else example_cache(source, plan.pp, keep_mb))
  return EvalBatches(plan, options, waiting)


@final
class TrainBatches:
  """Iterator over training batches; see `train_batches`. Close it, or use it in a `with`.

  Attributes:
    errors: example index -> what was wrong, for each bad example that was replaced.
  """

  def __init__(self, plan: BatchPlan, options: Options, num_steps: int, start_step: int):
    self.errors: Bad = {}
    self._noticed = _Noticed(plan.source)
    self._plan = plan
    self._options = options
    self._num_steps = num_steps
    self._step = start_step
    self._batches: Generator[Chunk, None, None] | None = None

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    if self._step >= self._num_steps:
      self.close()
      raise StopIteration
    if self._batches is None:
      self._batches = _run(self._plan, self._options, self._step, self._num_steps)
      # At exit too, while Grain's modules still exist.
      self._stop = weakref.finalize(self, self._batches.close)
    try:
      batch, bad, odd = next(self._batches)
      _count(self.errors, bad, self._plan)
      self._noticed.add(odd)
    except Exception:
      self.close()  # The next call fails again, at the same step: the stream must not seem to have ended.
      raise
    self._step += 1
    return batch

  def next_ids(self) -> list[int]:
    """Returns the indices of the next batch over all processes, without replacing bad examples."""
    first = self._step * self._plan.batch_size
    return [index_of(self._plan, first + i) for i in range(self._plan.batch_size)]

  def get_state(self) -> dict[str, Any]:
    """Returns the next step and all that the order depends on."""
    plan = self._plan
    state = {
      "step": self._step,
      "seed": plan.seed or 0,
      "batch_size": plan.batch_size,
      "examples": len(plan.source),
    }
    return state if plan.order is None else {**state, "sampler": "balanced"}

  def set_state(self, state: dict[str, Any]) -> None:
    """Continues at the step of `state`; raises a UserError if its seed, batch size or data set differs."""
    current, state = ({"sampler": SAMPLERS[0], **s} for s in (self.get_state(), state))
    for key in current.keys() - {"step"}:
      if state[key] != current[key]:
        raise UserError(
          f"The data state has {key}={state[key]}, this run {current[key]}; the order of the examples "
          f"would change. Use the same {key}, or start a new run."
        )
    self.close()
    self._step = state["step"]

  def close(self) -> None:
    """Stops threads and workers; the next batch starts them again."""
    if self._batches is not None:
      self._stop()
      self._noticed.say_totals(self.errors)
    self._batches = None

  def __enter__(self) -> "TrainBatches":
    return self

  def __exit__(self, *_: object) -> None:
    self.close()


@final
class EvalBatches:
  """Evaluation batches, which can be iterated over repeatedly; see `eval_batches`.

  Attributes:
    errors: example index -> reason, for each bad example left out in the latest pass.
  """

  def __init__(self, plan: BatchPlan, options: Options, waiting: Waiting):
    self.errors: Bad = {}
    self._noticed = _Noticed(plan.source)
    self._waiting = waiting
    self._plan = plan
    self._options = options

  def __len__(self) -> int:
    return math.ceil(len(self._plan.source) / self._plan.batch_size)

  def __iter__(self) -> Iterator[Batch]:
    self.errors = {}
    batches = _run(self._plan, self._options, 0, len(self))
    atexit.register(batches.close)  # For a pass that is never finished.
    try:
      while True:
        with self._waiting():
          chunk = next(batches, None)
        if chunk is None:
          break
        batch, bad, odd = chunk
        _count(self.errors, bad, self._plan)
        self._noticed.add(odd)
        yield batch
    finally:
      atexit.unregister(batches.close)
      batches.close()
      self._noticed.say_totals(self.errors)


def _options(threads: int, workers: int, prefetch: int, keep_mb: int) -> Options:
  _at_least(0, threads=threads, workers=workers, prefetch=prefetch, keep_mb=keep_mb)
  return Options(threads, workers, prefetch)


def _at_least(least: int, **numbers: int) -> None:
  for name, value in numbers.items():
    if value < least:
      raise UserError(f"{name}={value}; expected {least} or more.")


def _plan(
  source: Source,
  pp: str,
  seed: int | None,
  batch_size: int,
  process_index: int,
  process_count: int,
  on_error: str,
  max_errors: int,
) -> BatchPlan:
  _at_least(1, batch_size=batch_size)
  _at_least(0, max_errors=max_errors)
  if batch_size % process_count:
    raise UserError(f"batch_size={batch_size} is not a multiple of {process_count} processes.")
  if not 0 <= process_index < process_count:
    raise UserError(f"process_index={process_index} is not in 0..{process_count - 1}.")
  if on_error not in ("raise", "skip"):
    raise UserError(f"on_error={on_error!r}; expected 'raise' or 'skip'.")
  local = batch_size // process_count
  chunks = math.ceil(local / _CHUNK)
  offset = local * process_index
  ops = parse(pp).of_classes(source.class_names, source.num_classes)
  ops = ops.upright() if source.upright else ops
  return BatchPlan(source, ops, seed, batch_size, local, offset, chunks, on_error, max_errors)


# --- the parallel pipeline ---


def _run(plan: BatchPlan, options: Options, start: int, stop: int) -> Generator[Chunk, None, None]:
  """Yields a `Chunk` for each step from `start` to `stop`; closing the generator stops the work."""
  batches = iter(_pipeline(plan, options, start, stop))
  try:
    yield from batches
  finally:
    batches.close()


def _pipeline(plan: BatchPlan, options: Options, start: int, stop: int) -> Any:
  """Returns Grain's data set of batches, each a `Chunk`."""
  import grain  # Lazy: a second.
  from absl import flags

  read = grain.ReadOptions(
    num_threads=options.threads,
    prefetch_buffer_size=max(options.threads, options.prefetch * plan.chunks),
  )
  chunks = grain.MapDataset.range(start * plan.chunks, stop * plan.chunks)
  batches = chunks.map(functools.partial(make_chunk, plan)).to_iter_dataset(read)
  if options.workers:
    if not flags.FLAGS.is_parsed():
      flags.FLAGS.mark_as_parsed()  # Grain reads a flag of absl, which we do not parse.
    # Before `batch`: workers take turns chunk by chunk, which keeps the order for any number.
    batches = batches.mp_prefetch(
      grain.MultiprocessingOptions(
        num_workers=options.workers,
        per_worker_buffer_size=max(1, options.prefetch * plan.chunks // options.workers),
      )
    )
  batches = batches.batch(plan.chunks, batch_fn=_join)
  if options.threads:
    batches = grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=1)
  return batches


def _join(chunks: Sequence[Chunk]) -> Chunk:
  """Joins the chunks of one batch."""
  if len(chunks) == 1:
    return chunks[0]
  batches = [chunk.batch for chunk in chunks]
  bad = {index: text for chunk in chunks for index, text in chunk.bad.items()}
  odd: Odd = {}
  for chunk in chunks:
    for text, indices in chunk.odd.items():
      odd.setdefault(text, []).extend(indices)
  for key in batches[0]:
    check_shapes(key, (b[key].shape[1:] for b in batches))
  return Chunk({key: np.concatenate([b[key] for b in batches]) for key in batches[0]}, bad, odd)


@final
class _Noticed:
  """Warns of odd examples that are used all the same: at the first one, and at the end with their number."""

  def __init__(self, source: Source):
    self._source = source
    self._examples: dict[str, set[int]] = {}

  def add(self, odd: Odd) -> None:
    for text, indices in odd.items():
      if text not in self._examples:
        first = self._source[min(indices)]["id"]
        _warn(f"{self._name()}: {text}. The first: {first!r}.")
      self._examples.setdefault(text, set()).update(indices)

  def say_totals(self, errors: Bad) -> None:
    if errors:
      _warn(
        f"{self._name()}: left out {len(errors):,} of {len(self._source):,} images, which cannot be read or prepared."
      )
    for text, indices in self._examples.items():
      if len(indices) > 1:
        _warn(f"{self._name()}: {len(indices):,} of {len(self._source):,} images: {text}.")

  def _name(self) -> str:
    place = f" in {self._source.where}" if self._source.where else ""
    return f"{self._source.name} {self._source.split!r}{place}"


@functools.cache
def _warn(message: str) -> None:
  """Warns once: evaluations see the same examples many times."""
  _LOG.warning("%s", message)


def _count(errors: Bad, bad: Bad, plan: BatchPlan) -> None:
  """Adds `bad` to `errors`; warns of each new one, raises a UserError over the limit."""
  for index in bad.keys() - errors.keys():
    _LOG.warning("Left out: %s", bad[index])
  errors.update(bad)
  check_limit(errors, plan)
