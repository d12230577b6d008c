"""The content of each batch: the order of examples and their random draws, as pure functions.

The stream of a run is one sequence: position g = step * batch_size + i belongs to epoch g // n
and is example permutation(seed, epoch)[g % n]; its random draws are seeded by (seed, epoch,
example). So threads, workers, processes and interruptions change nothing, and the step is the only
state. A balanced stream is another function of the position, see `balanced.py`.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from flexivit_jax.data import annotations, images
from flexivit_jax.data.balanced import Balanced, Place, place, shuffled
from flexivit_jax.data.preprocess import Example, Preprocess
from flexivit_jax.data.sources import Record, Source
from flexivit_jax.errors import UserError

Batch = dict[str, np.ndarray]
Value = np.ndarray | float | str | bytes | tuple[int, ...] | tuple[str, ...]  # under a key
Bad = dict[int, str]  # Example index -> why it cannot be used.
Odd = dict[str, list[int]]  # Warning -> indices of examples that are used all the same.
# Keys of a record whose values are numbers of classes.
_LABELS = {"label", "box_labels", "neg_labels", "not_exhaustive"}
_AHEAD = 16  # chunks for which examples in a bucket are asked before they are needed
_SEVERAL = (tuple, np.ndarray)


class BadExampleError(UserError):
  """An example that cannot be read or prepared.

  Attributes:
    fact: what is wrong, without the advice.
  """

  fact: str


class BatchPlan(NamedTuple):
  """How one process makes its part of each batch: all that a worker needs to make any chunk of any batch.

  Attributes:
    source, pp: the examples and their preprocessing.
    seed: of the order; None: in order, once, padded (evaluation).
    batch_size: over all processes; this process makes `local` examples of each batch, from `offset`.
    chunks: number of tasks that make a batch.
    on_error, max_errors: see `train_batches`.
    cache: decoded examples, if they fit into memory, see `example_cache`; None: no cache.
    order: for balanced sampling; None: each example once an epoch.
  """

  source: Source
  pp: Preprocess
  seed: int | None
  batch_size: int
  local: int
  offset: int
  chunks: int
  on_error: str
  max_errors: int
  cache: "ExampleCache | None" = None
  order: Balanced | None = None


class ExampleCache(NamedTuple):
  """Cached decoded examples, which are not read and decoded again.

  Attributes:
    fixed: the first, deterministic part of the preprocessing.
    rest: the other part.
    examples: index -> the result of `fixed`; filled as examples are used.
  """

  fixed: Preprocess
  rest: Preprocess
  examples: dict[int, Example]


class Chunk(NamedTuple):
  """A batch or a part of it, with the bad and the odd ones among its examples."""

  batch: Batch
  bad: Bad
  odd: Odd


def make_chunk(plan: BatchPlan, chunk: int) -> Chunk:
  """Makes one of the `plan.chunks` parts of a batch; a pure function of its arguments."""
  positions = _positions(plan, int(chunk))
  places = [place_of(plan, position) for position in positions]
  bad: Bad = {}
  odd: Odd = {}
  cached = plan.cache.examples if plan.cache else {}
  if plan.source.ahead is not None:
    soon = (index_of(plan, position) for position in _positions(plan, int(chunk) + _AHEAD))
    plan.source.ahead([i for i in soon if i >= 0 and i not in cached])
  records = _read(plan.source, [-1 if i in cached else i for _, i in places])
  pairs = [
    _prepare(plan, position, there, record, bad, odd)
    for position, there, record in zip(positions, places, records, strict=True)
  ]
  check_limit(bad, plan)
  return Chunk(_stack(plan, pairs), bad, odd)


def _positions(plan: BatchPlan, chunk: int) -> range:
  """Returns the positions of the stream that are in a chunk."""
  step, part = divmod(chunk, plan.chunks)
  first = step * plan.batch_size + plan.offset
  low, high = (plan.local * k // plan.chunks for k in (part, part + 1))
  return range(first + low, first + high)


def index_of(plan: BatchPlan, position: int) -> int:
  """Returns the example at a position of the stream; -1 past the end of an evaluation."""
  return place_of(plan, position).example


def place_of(plan: BatchPlan, position: int, ahead: int = 0) -> Place:
  """Returns the place at a position of the stream, or `ahead` positions further in its epoch; see `index_of`."""
  size = len(plan.source)
  if plan.seed is None:
    return Place(0, position if position < size else -1)
  if plan.order is not None:
    return place(plan.order, plan.seed, position, ahead)
  epoch, slot = divmod(position, size)
  return Place(epoch, shuffled((slot + ahead) % size, size, (plan.seed, epoch)))


def _read(source: Source, indices: Sequence[int]) -> list[Record | None]:
  """Reads all records in one request, much faster for array_record; all None if any is damaged."""
  real = [i for i in indices if i >= 0]
  try:
    records = iter(source.read(real) if real else [])
    return [next(records) if i >= 0 else None for i in indices]
  except Exception:  # `_prepare` reads one by one, and finds the damaged one.
    return [None] * len(indices)


def _prepare(
  plan: BatchPlan,
  position: int,
  there: Place,
  record: Record | None,
  bad: Bad,
  odd: Odd,
) -> tuple[int, Example | None]:
  """Returns (index, example) of a position, or its replacement; (-1, None) leaves a gap."""
  for attempt in range(len(plan.source)):
    epoch, index = there
    if index < 0:
      break
    try:
      with images.noticing() as texts:
        example = _example(plan, epoch, index, record, bad)
      for text in texts:
        odd.setdefault(text, []).append(index)
      return index, example
    except BadExampleError:  # of another example, a part of this one
      raise
    except Exception as error:
      message = _describe(plan.source, index, record, error)
      if plan.on_error == "raise":
        raise _stop(message) from error
      bad[index] = message
    if plan.seed is None or len(bad) > plan.max_errors:
      break  # Evaluation replaces nothing; over the limit `make_chunk` raises.
    there, record = place_of(plan, position, attempt + 1), None
  return -1, None


def _example(plan: BatchPlan, epoch: int, index: int, record: Record | None, bad: Bad) -> Example:
  rng = None
  if plan.pp.random:
    key = np.random.SeedSequence((plan.seed or 0, epoch, index))
    rng = np.random.Generator(np.random.Philox(key))
  others = functools.partial(_another, plan, bad)
  if plan.cache is None:
    checked = _checked(plan.source, index, record)
    return _check_mask(plan.source, plan.pp(checked, rng, others))
  return plan.cache.rest(_cached(plan, index, record), rng, others)


def _cached(plan: BatchPlan, index: int, record: Record | None) -> Example:
  """Returns an example after the first, deterministic part of its preprocessing."""
  fixed, _, examples = plan.cache
  if index not in examples:
    checked = _checked(plan.source, index, record)
    examples[index] = _check_mask(plan.source, fixed(checked, None))
  return examples[index]


def _another(plan: BatchPlan, bad: Bad, before: Preprocess, rng: np.random.Generator) -> Example:
  """Returns an example, drawn by the generator of the one that it becomes a part of, after some of the operations.

  Where "skip" leaves it out, another is drawn.
  """
  others = functools.partial(_another, plan, bad)
  while True:
    index = int(rng.integers(len(plan.source)))
    record = None
    try:
      if plan.cache is None or index not in plan.cache.examples:
        record = plan.source[index]
      if plan.cache is not None:
        return before(_cached(plan, index, record), rng, others)
      return _check_mask(plan.source, before(_checked(plan.source, index, record), rng, others))
    except BadExampleError:
      raise
    except Exception as error:
      message = _describe(plan.source, index, record, error)
      if plan.on_error == "raise":
        raise _stop(message) from error
      bad[index] = message
      if len(bad) > min(plan.max_errors, len(plan.source) - 1):
        raise UserError("no other example is good enough to be a part of this one") from error


def _checked(source: Source, index: int, record: Record | None) -> Example:
  """Returns the input of preprocessing, a record without its id; checks that each label is one of the classes."""
  record = source[index] if record is None else record
  classes = source.num_classes
  for key in _LABELS & record.keys():
    label = record[key]
    if not all(0 <= k < classes for k in (label if isinstance(label, _SEVERAL) else (label,))):
      raise UserError(f"{key} is {label}; expected 0..{classes - 1}")
  record = {key: value for key, value in record.items() if key != "id"}
  # An array is read here, for there need not be a `decode`, which reads an encoded one.
  return annotations.read_mask(record) if isinstance(record.get("mask"), np.ndarray) else record


def _check_mask(source: Source, example: Example) -> Example:
  """Returns the example; a UserError if its decoded mask has a number that is neither a class nor NO_CLASS."""
  mask, classes = example.get("mask"), source.num_classes
  if not (isinstance(mask, np.ndarray) and mask.dtype.kind in "iu" and mask.size and classes):
    return example
  wrong = mask[((mask < 0) | (mask >= classes)) & (mask != annotations.NO_CLASS)]
  if wrong.size:
    numbers = np.unique(wrong).tolist()
    shown = ", ".join(map(str, numbers[:5])) + (" ..." if len(numbers) > 5 else "")
    raise UserError(
      f"the mask has the number{'s' * (len(numbers) > 1)} {shown}, {wrong.size / mask.size:.2%} of its pixels; expected"
      f" 0..{classes - 1}, or the one of no class, which is `ignore` of the data (default 255); `labels` of the data"
      " is what else numbers may stand for"
    )
  return example


def example_cache(source: Source, pp: Preprocess, mebibytes: int) -> ExampleCache | None:
  """Returns an empty cache if all examples fit into `mebibytes` MiB, judged by the size of the first one."""
  if not mebibytes:
    return None
  fixed, rest = pp.divide()
  try:
    with images.noticing():  # The warning comes when batches are made.
      first = fixed(_checked(source, 0, None), None)
  except Exception:  # Bad examples are reported where batches are made.
    return None
  size = sum(map(_size, first.values()))
  return ExampleCache(fixed, rest, {}) if size * len(source) <= mebibytes * 2**20 else None


def _size(value: Value) -> int:
  """Returns the bytes of one value of an example."""
  return len(value) if isinstance(value, bytes) else getattr(value, "nbytes", np.size(value) * 8)


def _describe(source: Source, index: int, record: Record | None, error: Exception) -> str:
  place = f" in {source.where}" if source.where else ""
  key = f" (id {record['id']!r}{place})" if record else ""
  notes = "".join(f" {note}" for note in getattr(error, "__notes__", ()))
  return (
    f"Bad example {index}{key} of data set {source.name!r} split {source.split!r}: "
    f"{type(error).__name__}: {error}{notes}"
  )


def _stop(fact: str) -> BadExampleError:
  """Returns the error that ends a run at a bad example."""
  error = BadExampleError(
    f"{fact}. Repair it, or leave out what is damaged: on_error='skip' in the section with its data"
    " (--config.input.on_error=skip, --config.evals.NAME.on_error=skip)."
  )
  error.fact = fact
  return error


def _stack(plan: BatchPlan, pairs: Sequence[tuple[int, Example | None]]) -> Batch:
  """Stacks examples by key, with zeros for gaps, and adds `_id` and `_mask`."""
  shape = next((example for _, example in pairs if example is not None), None) or _template(plan)
  gap = {key: np.zeros_like(value) for key, value in shape.items()}
  rows = [gap if example is None else example for _, example in pairs]
  batch = {key: _stack_key(key, [row[key] for row in rows]) for key in shape}
  batch["_id"] = np.array([index for index, _ in pairs], np.int64)
  if plan.seed is None:
    batch["_mask"] = (batch["_id"] >= 0).astype(np.float32)
  return batch


def _template(plan: BatchPlan) -> Example:
  """Returns any good example, for the shapes of a chunk without one."""
  for index in range(len(plan.source)):
    example = _prepare(plan, index, Place(0, index), None, {}, {})[1]
    if example is not None:
      return example
  raise UserError(f"No good example in {plan.source.name} {plan.source.split!r}.")


def _stack_key(key: str, values: Sequence[Value]) -> np.ndarray:
  if np.asarray(values[0]).dtype.kind in "SUO":
    kind = type(values[0]).__name__
    raise UserError(f"{key!r} is {kind}, not numbers; decode it, or `keep` others.")
  check_shapes(key, map(np.shape, values))
  return np.stack(values)


def check_shapes(key: str, shapes: Iterable[tuple[int, ...]]) -> None:
  """Raises a UserError where the values of a key have several shapes, and cannot be stacked."""
  different = sorted(set(shapes))
  if len(different) < 2:
    return
  if key == "boxes" or key.startswith("box_"):
    numbers = ", ".join(str(shape[0]) for shape in different[:3])
    raise UserError(
      f"Examples differ in the number of boxes ({key!r}): {numbers}; pad_boxes(NUMBER) in pp gives all the same, or"
      " `keep` other keys."
    )
  raise UserError(
    f"Examples differ in the shape of {key!r}: {different[:3]}; resize or crop them in pp. An evaluation of"
    " segmentation with a window takes each at its own size with batch_size=1."
  )


def check_limit(errors: Bad, plan: BatchPlan) -> None:
  """Raises a UserError when there are more than `plan.max_errors`."""
  if len(errors) > plan.max_errors:
    first = next(iter(errors.values()))
    raise UserError(
      f"{len(errors)} bad examples in {plan.source.name} {plan.source.split!r}, more than "
      f"max_errors={plan.max_errors}; the first: {first}"
    )
