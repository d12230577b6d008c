"""A model over many image files, in batches of one shape: what `predict` and `embed` share."""

import collections
import contextlib
import functools
import hashlib
import itertools
import os
import stat
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent import futures
from typing import Any, NamedTuple

import jax
import msgpack
import numpy as np
from jaxtyping import Array, Float32, UInt8
from PIL import Image

from flexivit_jax import data, errors, sizes, trees, weights
from flexivit_jax.data import class_names
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import programs, whole_images
from flexivit_jax.models import Model, vit_part
from flexivit_jax.running import distributed, processes
from flexivit_jax.sizes import Patch, SeqHw, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import model_records

Prepare = Callable[[str | bytes], np.ndarray]  # of a path, or of the bytes of a file
Result = programs.Result
NOT_FINITE = "the model's output is not finite; are its weights whole?"
_ROUND = 8  # batches of each device between two exchanges of processes
_THREADS = min(8, os.cpu_count() or 1)


class Loaded(NamedTuple):
  """A model that is ready for image files.

  Attributes:
    model, params, record: see `weights.load_with_record`, or for models of parts `weights.tasks.load`.
    name: what the user called it.
    prepare: path, or bytes of a file -> what the model takes of one image, [h, w, c].
    pp: the preprocessing that `prepare` does.
  """

  model: Any  # a `Model`, a FlexiViT unless the whole is asked for
  params: Params
  record: Json
  name: str
  prepare: Prepare
  pp: str = ""


class Outcome(NamedTuple):
  """What became of one file: the model's outputs at each size, or why there are none."""

  file: str
  outputs: tuple[np.ndarray, ...] = ()
  error: str | None = None
  ms: tuple[float, ...] = ()


def load(
  checkpoint: str | os.PathLike[str],
  image_size: int | None = None,
  *,
  texts: bool = False,
  whole: bool = False,
  **loading: Any,
) -> Loaded:
  """Loads a model and finds out how its images are prepared.

  Of a model that gives something for each pixel, no image is cropped or padded: every pixel of the file gets an answer.
  Of a detector, none is cropped; its FlexiViT alone takes them so, too, where its run resizes none.

  Args:
    checkpoint: what `weights.load` takes.
    image_size: pixels a side for weights that do not say; default that of a fixed model, or 240 as in the paper. Of a
      model that gives masks, pixels of the shorter side, whatever the weights say.
    texts: both towers, see `weights.towers.load`; else of two towers the one of images.
    whole: a model of other parts, a Segmenter or a detector, as it is; else its FlexiViT.
    **loading: see `weights.load`.

  Raises:
    UserError: it cannot be loaded; `image_size` where the weights say it; a model of other than 1 or 3 channels.
  """
  read: Callable[..., tuple[Model, Params, Json]] = weights.load_with_record
  if whole and weights.tasks.is_whole(checkpoint):
    read = weights.tasks.load
  elif texts:
    read = weights.towers.load
  model, params, record = read(checkpoint, **loading)
  part = vit_part(model)
  channels = (params[part] if part else params)["embedding"]["kernel"].shape[2]
  if channels not in (1, 3):
    raise errors.UserError(
      f"{checkpoint} takes images of {channels} channels; image files have 3, or 1 where they are grey."
      " Call the model in Python (weights.load) on arrays of your own."
    )
  pp, notes = preparation(model, record, image_size)
  record = record | {"notes": [*record["notes"], *notes]}
  return Loaded(model, params, record, str(checkpoint), preparer(pp, channels), pp)


def gives_masks(model: Model) -> bool:
  """Tells whether a model gives scores of every pixel, "pixel_logits"."""
  return "pixel_logits" in model.outputs


def gives_boxes(model: Model) -> bool:
  """Tells whether a model gives boxes and their scores, "pred_boxes" and "class_logits"."""
  return "pred_boxes" in model.outputs


def preparation(model: Model, record: Json, image_size: int | None = None) -> tuple[str, list[str]]:
  """Returns how images are prepared for a model, see `load`, and notes on what differs from its own preprocessing."""
  if gives_masks(model):
    return whole_images.of_all_pixels(record, image_size)
  if gives_boxes(model) or (_is_of_detector(record) and not whole_images.is_sized(record)):
    return whole_images.uncut(record, image_size)
  return weights.preparation(record, image_size), []


def _is_of_detector(record: Json) -> bool:
  """Whether this is the FlexiViT alone of a detector of ours."""
  return model_records.left_out("owl_vit") in record.get("notes", ())


def sizes_of(text: str | None, loaded: Loaded) -> tuple[SeqHw, ...]:
  """Returns the sizes that --seqhw names; "all" are those that the model was trained at.

  Raises:
    UserError: it names none, or "all" of a model that does not say.
  """
  trained_at = sizes.trained(loaded.record)
  shown = ",".join(str(size_text(size)) for size in trained_at)
  if text is None:
    of = f"{loaded.name} was trained at {shown}" if trained_at else "e.g. --seqhw=8"
    raise errors.UserError(f"Give --seqhw, the tokens per side: more is finer and slower; {of}.")
  lacking = f"{loaded.name} does not say at which sizes it was trained"
  return tuple(dict.fromkeys(sizes.parse(text, trained_at, lacking)))


def names_of(loaded: Loaded) -> list[str]:
  """Returns the names of a model's classes, "" for each of a model that has none."""
  of, k = f"the checkpoint {loaded.name}", loaded.model.num_classes
  return [*(class_names.of_record(loaded.record, k, of).names or [""] * k)]


# --- one image ---


def fitting(loaded: Loaded, sizes: Sequence[SeqHw | Patch]) -> Loaded:
  """Returns the model for images of their own shapes: one that a size does not divide is an error of its file."""

  def prepare(source: str | bytes) -> np.ndarray:
    image = loaded.prepare(source)
    for size in sizes:
      loaded.model.grid(image.shape[:2], **size_args(size))
    return image

  return loaded._replace(prepare=prepare)


def preparer(pp: str, channels: int) -> Prepare:
  """Returns the function that reads and prepares one file, given by its path or its bytes.

  Files are decoded upright, as their EXIF orientation says, unless the string says otherwise, and into grey for a model
  of one channel (ITU-R 601 luma, as Pillow's "L"). What an evaluation does with labels, captions and boxes is left out.
  """
  parsed = _of_images(data.parse(pp))
  decoders = data.OPS["decode"], data.OPS["decode_inception_crop"]
  if not any(op.function in decoders for op in parsed.ops):
    parsed = data.parse(f"decode|{pp}")
  parsed = parsed.upright()
  if channels == 1:
    ops = (
      op._replace(function=_in_grey) if op.function is decoders[0] else op for op in parsed.ops
    )
    parsed = parsed._replace(ops=tuple(ops))
  return functools.partial(_prepare, parsed, channels)


def no_files(path: str | bytes) -> np.ndarray:
  """The `Prepare` of a model whose images come from elsewhere."""
  raise ValueError(f"{path!r}: this model takes no files here")


def of_images(pp: str) -> str:
  """Returns the operations of a string that an image file alone can have."""
  return "|".join(op.text for op in _of_images(data.parse(pp)).ops)


def _of_images(parsed: data.Preprocess) -> data.Preprocess:
  """Returns it without what makes labels, boxes, tokens and queries, which an image file does not have."""
  ops = (op for op in parsed.ops if op.inkey is not None or op.function is data.OPS["copy"])
  return parsed._replace(ops=tuple(ops))


def _in_grey(encoded: bytes, *args: Any, **kwargs: Any) -> UInt8[np.ndarray, "h w 1"]:
  rgb = data.OPS["decode"](encoded, *args, **kwargs)
  return np.asarray(Image.fromarray(rgb).convert("L"))[..., None]


def _prepare(
  prepare: data.Preprocess, channels: int, source: str | bytes
) -> Float32[np.ndarray, "h w c"]:
  encoded, name = (source, "") if isinstance(source, bytes) else (_read(source), source)
  example = prepare({"image": encoded, "id": name}, np.random.default_rng(0))
  image = example["image"]
  if image.ndim != 3 or image.shape[-1] != channels:
    raise ValueError(f"prepared as {image.shape}; expected {channels} channels")
  return image


def _read(path: str) -> bytes:
  if not stat.S_ISREG(os.stat(path).st_mode):  # A pipe would be waited for, for ever.
    raise ValueError("neither a file nor a folder")
  with open(path, "rb") as file:
    return file.read()


def attempt(prepare: Prepare, source: str | bytes) -> np.ndarray | str:
  """Returns the image, or why there is none; the reason names no path."""
  try:
    return prepare(source)
  except OSError as e:
    return e.strerror.lower() if e.strerror else f"not a whole image: {e}"
  except Exception as e:  # Damaged files raise nearly everything.
    return str(e) or type(e).__name__


# --- many ---


class _Batch(NamedTuple):
  """Files in the order of the inputs; those without an error are the rows of `image`, which is padded with zeros."""

  files: list[Input]
  rows: list[np.ndarray]


def outcomes(
  loaded: Loaded,
  fn: Callable[[Result], Array],
  inputs: Sequence[Input],
  sizes: Sequence[SeqHw | Patch],
  *,
  batch_size: int | None = None,
  timed: bool = False,
  way: programs.Way = programs.PLAIN,
) -> Generator[Outcome, None, None]:
  """Yields what the model makes of each file, in the order of the inputs.

  Every batch has the same shape, the last one padded, and one program runs for all of them, so that an answer does not
  depend, to the bit, on what else is asked. Only a few batches are in memory. Several
  devices take turns. Several processes divide the files, in rounds of `_ROUND` batches for each device; every process
  gets all outcomes.

  Args:
    loaded: the model.
    fn: what is wanted of the model's result (logits, intermediates): an array [n, d]; pure.
    inputs: files; those with an error are passed on.
    sizes: at each of these.
    batch_size: images at a time; default 4 on CPUs, 32 elsewhere.
    timed: measure milliseconds an image at each size, once: the median of five passes, by the images of a batch.
    way: what runs it.

  Raises:
    UserError: a size that does not divide the images.
  """
  n = checked_batch_size(batch_size)
  calls = [programs.call(loaded, fn, size, way) for size in sizes]
  times: dict[tuple[int, ...], tuple[float, ...]] = {}  # by the shape of an image
  devices = jax.local_devices()
  params = [jax.device_put(loaded.params, d) for d in devices] if devices[1:] else [loaded.params]
  some = functools.partial(
    _outcomes, loaded.model, params, loaded.prepare, calls, sizes, n, timed, times
  )
  if not distributed.is_on():
    yield from some(inputs)
    return
  share = _ROUND * n * len(params)
  for begin in range(0, len(inputs), share * jax.process_count()):
    mine = begin + share * jax.process_index()
    yield from _of_all(functools.partial(some, inputs[mine : mine + share]))


def _of_all(call: Callable[[], Iterable[Outcome]]) -> Iterator[Outcome]:
  """Yields the outcomes of all processes, in their order."""
  rows = [
    (file, [(a.dtype.name, a.shape, a.tobytes()) for a in outputs], error, ms)
    for file, outputs, error, ms in distributed.each(lambda: list(call()), "its images")
  ]
  packed = msgpack.packb(rows, unicode_errors="surrogateescape")
  for blob in distributed.blobs(packed):
    for file, outputs, error, ms in msgpack.unpackb(blob, unicode_errors="surrogateescape"):
      arrays = tuple(
        np.frombuffer(raw, np.dtype(name)).reshape(shape) for name, shape, raw in outputs
      )
      yield Outcome(file, arrays, error, tuple(ms))


def agree(loaded: Loaded, inputs: Sequence[Input], **others: object) -> None:
  """Checks that all processes have the same model, files and settings.

  Args:
    loaded: the model.
    inputs: the files.
    **others: what else the answers depend on.

  Raises:
    UserError: names the processes that differ, and in what; raised on all processes.
  """
  if distributed.is_on():
    names = "\n".join(path for path, _ in inputs).encode("utf-8", "surrogateescape")
    listing = f"{len(inputs)} files, sha256 {hashlib.sha256(names).hexdigest()[:16]}"
    processes.agree_on({"model": trees.digest(loaded.params), "images": listing, **others})


def _outcomes(
  model: Model,
  params: Sequence[Params],
  prepare: Prepare,
  calls: Sequence[Callable],
  sizes: Sequence[SeqHw | Patch],
  n: int,
  timed: bool,
  times: dict[tuple[int, ...], tuple[float, ...]],
  inputs: Iterable[Input],
) -> Generator[Outcome, None, None]:
  """What this process makes of files; `times` are filled by the shape of an image.

  `params` are one copy for each device, and the batches take turns on these: every batch is of one shape on one device,
  so that no answer depends on how many there are.
  """
  waiting: collections.deque[tuple[list[Input], Sequence[Array], tuple[float, ...]]] = (
    collections.deque()
  )
  turns = itertools.cycle(params)
  with contextlib.closing(_batches(inputs, prepare, n)) as batches:
    for batch in batches:
      shape = batch.rows[0].shape if batch.rows else ()
      if shape and shape not in times:
        for size in sizes:
          model.grid(shape[:2], **size_args(size))
        images = np.zeros((n, *shape), np.float32)
        times[shape] = tuple(_ms(call, params[0], images) for call in calls) if timed else ()
      results = _run(next(turns), calls, batch.rows, n) if shape else ()
      waiting.append((batch.files, results, times.get(shape, ())))
      if len(waiting) == len(params):
        yield from _by_file(*waiting.popleft())
  while waiting:
    yield from _by_file(*waiting.popleft())


def checked_batch_size(batch_size: int | None) -> int:
  """Returns it, or the default; raises a UserError where it is below 1."""
  n = default_batch_size() if batch_size is None else batch_size
  if n < 1:
    raise errors.UserError(f"--batch_size={n}; expected 1 or more.")
  return n


def default_batch_size() -> int:
  """On a CPU four images at a time are as fast as more (docs/predict.md), and padding costs little."""
  return 4 if jax.default_backend() == "cpu" else 32


def _run(
  params: Params, calls: Sequence[Callable], rows: Sequence[np.ndarray], n: int
) -> tuple[Array, ...]:
  """Starts the programs on the device of the parameters, and does not wait for them."""
  images = np.zeros((n, *rows[0].shape), np.float32)
  images[: len(rows)] = rows
  return tuple(call(params, images) for call in calls)


def _by_file(
  files: Iterable[Input], results: Sequence[Array], ms: tuple[float, ...]
) -> Iterator[Outcome]:
  row, arrays = 0, [np.asarray(result) for result in results]
  for path, error in files:
    if error is not None:
      yield Outcome(path, error=error)
      continue
    outputs = tuple(output[row] for output in arrays)
    row += 1
    if all(np.isfinite(output).all() for output in outputs):
      yield Outcome(path, outputs, ms=ms)
    else:
      yield Outcome(path, error=NOT_FINITE)


def _ms(program: Callable, params: Params, images: np.ndarray) -> float:
  """Milliseconds an image."""
  jax.block_until_ready(program(params, images))  # compiles
  times = []
  for _ in range(5):
    begin = time.perf_counter()
    jax.block_until_ready(program(params, images))
    times.append(time.perf_counter() - begin)
  return float(np.median(times)) * 1e3 / len(images)


def _batches(inputs: Iterable[Input], prepare: Prepare, n: int) -> Generator[_Batch, None, None]:
  """Yields batches of up to `n` images of one shape, and what could not be read between them."""
  batch = _Batch([], [])
  with contextlib.closing(prepared(inputs, prepare, n)) as stream:
    for path, image in stream:
      other = isinstance(image, np.ndarray) and batch.rows and image.shape != batch.rows[0].shape
      if other or len(batch.rows) == n or len(batch.files) >= 4 * n:
        yield batch
        batch = _Batch([], [])
      if isinstance(image, str):
        batch.files.append(Input(path, image))
      else:
        batch.files.append(Input(path))
        batch.rows.append(image)
  if batch.files:
    yield batch


def prepared(
  inputs: Iterable[Input], prepare: Prepare, n: int
) -> Generator[tuple[str, np.ndarray | str], None, None]:
  """Yields (path, image or why there is none) in order; threads prepare two batches of n in advance."""
  ahead = 2 * n + _THREADS
  with futures.ThreadPoolExecutor(_THREADS) as pool:
    waiting: collections.deque[tuple[str, futures.Future]] = collections.deque()
    try:
      for path, error in inputs:
        work = pool.submit(attempt, prepare, path) if error is None else pool.submit(str, error)
        waiting.append((path, work))
        if len(waiting) > ahead:
          yield _result(*waiting.popleft())
      while waiting:
        yield _result(*waiting.popleft())
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _result(path: str, work: futures.Future) -> tuple[str, np.ndarray | str]:
  return path, work.result()
