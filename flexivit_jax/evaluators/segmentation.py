"""Semantic segmentation at every patch size: one confusion matrix over the data set, at the resolution of its masks.

Pixels are counted on the host (`overlap`), while devices give their classes: of whole images that are all of one size,
or window by window (`windows`) of images of any size.
"""

import functools
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, Integer

from flexivit_jax import errors
from flexivit_jax.data import images
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators import ceilings, overlap, pictures, resampling, windows
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.per_size import PerSize, of_this_process, shards, sizes_of
from flexivit_jax.evaluators.windows import View
from flexivit_jax.models import Model
from flexivit_jax.models.segmenter import upsampled
from flexivit_jax.objectives.base import Batch
from flexivit_jax.running import distributed
from flexivit_jax.sizes import SeqHw, Size, SizeArgs, SizeKey, size_label
from flexivit_jax.trees import Params

METRICS = (
  Metric("miou", "max", "bootstrap", "%", "mIoU", "mean intersection over union"),
  Metric("pixel_accuracy", "max", "bootstrap", "%", "pixels", "pixel accuracy"),
  Metric("mean_accuracy", "max", "bootstrap", "%", "classes", "mean accuracy of the classes"),
  Metric("boundary_iou", "max", "bootstrap", "%", "boundary", "boundary IoU"),
  Metric(
    "ceiling",
    unit="%",
    title="mIoU of the classes' shares in each patch of the true masks",
    trained=False,
    ceiling_of="miou",
  ),
  Metric(
    "ceiling_constant",
    unit="%",
    label="a class a patch",
    title="mIoU of the commonest class of each patch of the true masks",
    trained=False,
    ceiling_of="miou",
  ),
)
_OF = {
  "miou": (overlap.REGIONS, overlap.mean_iou),
  "pixel_accuracy": (overlap.REGIONS, overlap.pixel_accuracy),
  "mean_accuracy": (overlap.REGIONS, overlap.mean_accuracy),
  "boundary_iou": (overlap.BANDS, overlap.mean_iou),
}
_LOG = logging.getLogger(__name__)


# --- whole images of one size ---


def whole_step(
  params: Params, batch: Batch, *, model: Model, view: View, hw: Size, mesh: Mesh, **size: Any
) -> Integer[Array, "n h w"]:
  """The classes of the pixels of images of one size, resized to `hw`; the scales are in the batch."""
  patch_hw = model.grid(batch["image"].shape[1:3], **size)[0]
  depth = {k: v for k, v in size.items() if k == "depth"}
  parts = []
  for scale in view.scales:
    args = size if scale == 1 else {"patch_hw": patch_hw, **depth}
    for flip in view.flips:
      x = batch[_key(scale)]
      logits = _logits(model, params, x[:, :, ::-1] if flip else x, args)
      parts.append(upsampled(logits[:, :, ::-1] if flip else logits, hw))
  classes = windows.classes(windows.joined(parts))
  return jax.lax.with_sharding_constraint(classes, sharding.batch_split(mesh))


def window_step(
  params: Params, batch: Batch, *, model: Model, mesh: Mesh, **size: Any
) -> Float[Array, "n h w k"]:
  """The logits of the pixels of windows."""
  logits = _logits(model, params, batch["image"], size)
  return jax.lax.with_sharding_constraint(logits, sharding.batch_split(mesh))


def _logits(model: Model, params: Params, image: Array, size: SizeArgs) -> Float[Array, "n h w k"]:
  return model.apply({"params": params}, image, **size)[1]["pixel_logits"].astype(jnp.float32)


def _key(scale: float) -> str:
  return "image" if scale == 1 else f"image_{scale:g}"


# An image, its mask, and the classes of its pixels at each size.
_Answer = tuple[np.ndarray, np.ndarray, dict[SizeKey, np.ndarray]]


@final
class Segmentation:
  """The evaluator; see `segmentation`."""

  def __init__(
    self,
    model: Model,
    batches: Batches,
    mesh: Mesh | None,
    sizes: Sequence[SizeArgs],
    view: View,
    windows_at_once: int,
    band: float,
    class_names: Sequence[str] | None,
    samples: int,
  ):
    self._number, self._samples = samples, list[pictures.Sample]()
    self._model, self._batches, self._mesh, self._sizes = model, batches, mesh, sizes
    self._view, self._at_once, self._band, self._names = view, windows_at_once, band, class_names
    self._hw: Size | None = None
    self._programs: PerSize | None = None
    self._warned = False
    self._ceilings: dict[SizeKey, dict[str, float]] = {}

  def check(self) -> None:
    """See `Evaluator.check`."""
    batch = next(iter(self._batches))
    hw = _checked(batch)
    for mask in batch["mask"]:
      overlap.truth(mask, self._model.num_classes, self._band)
    step, first = self._whole(batch, hw) if self._view.window is None else self._windows(batch, hw)
    inputs = [key for key in first if key != "_mask"]
    self._hw, self._first = hw, first
    self._programs = PerSize(
      step, self._model, [first], self._mesh, sizes=self._sizes, inputs=inputs
    )
    self._programs.check()

  def _whole(self, batch: Mapping[str, np.ndarray], hw: Size) -> tuple[Any, dict]:
    step = functools.partial(whole_step, model=self._model, view=self._view, hw=hw, mesh=self._mesh)
    return step, self._resized(batch, hw)

  def _windows(self, batch: Mapping[str, np.ndarray], hw: Size) -> tuple[Any, dict]:
    step = functools.partial(window_step, model=self._model, mesh=self._mesh)
    channels = batch["image"].shape[-1]
    devices = self._mesh.size if self._mesh else 1
    number = -(-self._at_once // devices) * devices // jax.process_count()
    image = np.zeros((number, *self._view.window, channels), np.float32)
    return step, {"image": image, "_mask": np.ones(number, np.float32)}

  def compile(self, params: Params, report: Report = silent) -> None:
    """See `Evaluator.compile`."""
    self.check()
    self._programs.compile(params, report)

  def run(self, params: Params) -> list[Row]:
    """Returns for each size the metrics, the ceilings of its patch (see `ceilings`), and "absent" (classes without a
    pixel in the masks), "n" (images), "intervals", by class "class_iou" (None: absent) and "class_pixels", and
    "samples", see `pictures`.

    Raises:
      UserError: masks with other numbers than classes, or without any pixel that counts; images of several sizes
        without a window.
    """
    if self._programs is None:
      self.compile(params)
    k = self._model.num_classes
    made: dict[SizeKey, list[np.ndarray]] = {key: [] for key in self._programs.sizes}
    best: dict[SizeKey, list[np.ndarray]] = {key: [] for key in self._programs.sizes}
    predict = self._predict_whole if self._view.window is None else self._predict_windows
    self._samples.clear()
    for image, mask, predicted in predict(params):
      if len(self._samples) < self._number:
        by_name = {self._size_name(key): classes for key, classes in predicted.items()}
        self._samples.append(pictures.Sample(image, mask, by_name))
      true = overlap.truth(mask, k, self._band)
      for key, classes in predicted.items():
        made[key].append(overlap.counts(true, classes))
        if not self._ceilings:  # those of the data, whatever the parameters are
          best[key].append(self._count_ceilings(true, key))
    counted = _of_all_processes(made, (k, 6))
    if not self._ceilings:
      self._ceilings = {
        key: _mean_ious(counts.reshape(-1, len(ceilings.KINDS), k, 3))
        for key, counts in _of_all_processes(best, (len(ceilings.KINDS) * k, 3)).items()
      }
    return self._rows(counted)

  def _count_ceilings(self, true: overlap.Truth, key: SizeKey) -> Int[np.ndarray, "_ 3"]:
    patch_hw = self._model.grid(self._first["image"].shape[1:3], **dict(key))[0]
    answers = ceilings.predicted(true.mask, self._view, patch_hw, true.num_classes)
    return np.concatenate([overlap.regions(true, answers[kind]) for kind in ceilings.KINDS])

  def pictures(self) -> dict[str, bytes]:
    """Returns files of the first images of the latest run, see `pictures`; rows name their own in "samples"."""
    made = (pictures.files(i, sample) for i, sample in enumerate(self._samples))
    return {name: data for files in made for name, data in files.items()}

  def _size_name(self, key: SizeKey) -> str:
    return size_label(self._programs.names(self._programs.sizes[key]))

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns what an image costs at each size, with all scales, or what one window costs; see `PerSize.costs`."""
    rows = self._programs.costs(params, repeats)
    if self._view.window is not None:
      return rows
    view, batch = self._view, self._first
    if view.scales == (1.0,) and not view.flip:
      return rows
    for row, size in zip(rows, self._sizes, strict=True):
      patch_hw = self._model.grid(batch["image"].shape[1:3], **size)[0]
      depth = {k: v for k, v in size.items() if k == "depth"}
      shapes = ({"image": batch[_key(scale)].shape[1:]} for scale in view.scales)
      each = (self._model.gmacs(shape, patch_hw=patch_hw, **depth) for shape in shapes)
      row["gflops"] = 2 * len(view.flips) * sum(each)
    return rows

  def _rows(self, counted: Mapping[SizeKey, Int[np.ndarray, "n k 6"]]) -> list[Row]:
    total = next(iter(counted.values())).sum(axis=0)
    pixels = total[:, overlap.TRUE]
    if not pixels.sum():
      n = len(next(iter(counted.values())))
      raise errors.UserError(
        f"No pixel of the {n} masks counts: all are of no class. Is ignore= of the data the value of a class?"
      )
    absent = np.flatnonzero(pixels == 0).tolist()
    self._warn(absent)
    values = {
      key: {name: counts[..., columns] for name, (columns, _) in _OF.items()}
      for key, counts in counted.items()
    }
    found = resampling.rows(values, {name: metric for name, (_, metric) in _OF.items()})
    rows = []
    for key, counts in counted.items():
      whole = counts.sum(axis=0, keepdims=True, dtype=np.float64)
      iou = overlap.iou_of_classes(whole[..., overlap.REGIONS])[0]
      of_classes = {
        "class_iou": [None if np.isnan(value) else float(value) for value in iou],
        "class_pixels": pixels.tolist(),
        "samples": [pictures.name_of(i, self._size_name(key)) for i in range(len(self._samples))],
      }
      names = self._programs.names(self._programs.sizes[key])
      best = self._ceilings[key]
      counts_of = {"absent": len(absent), "n": len(counts), **of_classes}
      rows.append({**names, **found[key], **best, **counts_of})
    return rows

  def _warn(self, absent: Sequence[int]) -> None:
    if absent and not self._warned and distributed.is_first():
      names = [self._names[k] if self._names else str(k) for k in absent]
      _LOG.warning(
        "%d of %d classes have no pixel in the masks, and are left out of means over classes: %s.",
        len(absent), self._model.num_classes, ", ".join(names),
      )  # fmt: skip
    self._warned = True

  # --- predictions of this process's images, one after the other ---

  def _predict_whole(self, params: Params) -> Iterator[_Answer]:
    waiting: list[Mapping[str, np.ndarray]] = []

    def batches() -> Iterator[dict[str, np.ndarray]]:
      for batch in self._batches:
        if (hw := _checked(batch)) != self._hw:
          raise errors.UserError(
            f"An image of {hw[0]} x {hw[1]} pixels (h x w) after others of {self._hw[0]} x {self._hw[1]}: images of"
            " several sizes are seen through a window. Give window= (with batch_size=1), or resize in pp."
          )
        waiting.append(batch)
        yield self._resized(batch, hw)

    for outputs in self._programs.outputs(params, batches()):
      batch = waiting.pop(0)
      predicted = {key: of_this_process(output) for key, output in outputs.items()}
      for i in np.flatnonzero(batch["_mask"] > 0):
        made = {key: classes[i] for key, classes in predicted.items()}
        yield batch["image"][i], batch["mask"][i], made

  def _predict_windows(self, params: Params) -> Iterator[_Answer]:
    queue = _Queue(self._view, self._first["image"].shape, self._model.num_classes)
    sizes = list(self._programs.sizes)

    def batches() -> Iterator[dict[str, np.ndarray]]:
      for batch in self._batches:
        _checked(batch)
        for i in np.flatnonzero(batch["_mask"] > 0):
          queue.add(batch["image"][i], batch["mask"][i], sizes)
        yield from queue.batches()
      yield from queue.batches(last=True)

    for outputs in self._programs.outputs(params, batches()):
      yield from queue.take({key: _on_one_device(output) for key, output in outputs.items()})

  def _resized(self, batch: Mapping[str, np.ndarray], hw: Size) -> dict[str, np.ndarray]:
    """What the program takes of a batch: its images at each scale."""
    made = {"_mask": batch["_mask"]}
    for scale in (1.0, *self._view.scales):
      new = self._view.size(hw, scale)
      made[_key(scale)] = np.stack([images.resize_image(x, new) for x in batch["image"]])
    return made


class _Waiting(NamedTuple):
  """An image of which not all windows are predicted: by size its canvases, one for each scale and direction."""

  image: np.ndarray
  mask: np.ndarray
  canvases: dict[SizeKey, list[windows.Canvas]]


class _Window(NamedTuple):
  """A window that waits: its pixels, and the canvas of its image where it belongs."""

  pixels: np.ndarray
  image: _Waiting
  canvas: int
  place: tuple[int, int]


@final
class _Queue:
  """Cuts images into windows and makes batches of these; puts what the model says of them together again.

  Args:
    view: how images are seen.
    shape: of this process's share of a batch of windows, [n, h, w, c].
    num_classes: number of logits.
  """

  def __init__(self, view: View, shape: tuple[int, ...], num_classes: int):
    self._view, self._shape, self._num_classes = view, shape, num_classes
    self._windows: list[_Window] = []  # that no batch has yet
    self._given: list[_Window] = []
    self._images: list[_Waiting] = []

  def add(self, image: np.ndarray, mask: np.ndarray, sizes: Sequence[SizeKey]) -> None:
    """Cuts an image."""
    view = self._view
    sizes_of_image = (view.size(image.shape[:2], scale) for scale in view.scales)
    seen = [(hw, flip) for hw in sizes_of_image for flip in view.flips]
    made = {
      key: [
        windows.Canvas(hw, view.window, view.stride, self._num_classes, flip) for hw, flip in seen
      ]
      for key in sizes
    }
    waiting = _Waiting(image, mask, made)
    self._images.append(waiting)
    for i, (hw, flip) in enumerate(seen):
      resized = images.resize_image(image, hw)
      resized = resized[:, ::-1] if flip else resized
      for y, x in next(iter(made.values()))[i].places:
        cut = resized[y : y + view.window[0], x : x + view.window[1]]
        self._windows.append(_Window(cut, waiting, i, (y, x)))

  def batches(self, *, last: bool = False) -> Iterator[dict[str, np.ndarray]]:
    """Yields full batches, on each process as many; at last also what is left."""
    n = self._shape[0]
    ready = -(-len(self._windows) // n) if last else len(self._windows) // n
    for _ in range(int(-distributed.smallest(-ready))):
      self._given, self._windows = self._windows[:n], self._windows[n:]
      image = np.zeros(self._shape, np.float32)
      mask = (np.arange(n) < len(self._given)).astype(np.float32)
      for row, window in zip(image, self._given, strict=False):
        row[...] = window.pixels
      yield {"image": image, "_mask": mask}

  def take(self, logits: Mapping[SizeKey, Array]) -> Iterator[_Answer]:
    """Takes what the model says of the latest batch; yields images that are whole, their masks, and the classes."""
    for i, (_, waiting, canvas, place) in enumerate(self._given):
      for key, output in logits.items():
        waiting.canvases[key][canvas].add(output, i, place)
    while self._images and all(c.is_full for c in next(iter(self._images[0].canvases.values()))):
      image, mask, canvases = self._images.pop(0)
      yield (
        image,
        mask,
        {key: windows.predicted(parts, mask.shape) for key, parts in canvases.items()},
      )


def _checked(batch: Mapping[str, np.ndarray]) -> Size:
  """Returns the pixels of a batch's images; raises a UserError where it has no masks of the same size."""
  if missing := sorted({"image", "mask", "_mask"} - set(batch)):
    raise errors.UserError(
      f"Segmentation needs {missing} in its batches, they have {sorted(batch)}: mend pp, keep('image', 'mask')."
    )
  image, mask = batch["image"].shape, batch["mask"].shape
  if mask != image[:3]:
    raise errors.UserError(
      f"Masks of shape {mask} and images of {image}; expected [n, h, w] and [n, h, w, c]."
    )
  return image[1], image[2]


def _on_one_device(output: jax.Array) -> Array:
  parts = shards(output)
  if len(parts) == 1:
    return parts[0].data
  device = jax.local_devices()[0]
  return jnp.concatenate([jax.device_put(shard.data, device) for shard in parts])


def _of_all_processes(
  made: Mapping[SizeKey, Sequence[np.ndarray]], shape: tuple[int, int]
) -> dict[SizeKey, Int[np.ndarray, "n _ _"]]:
  """Joins the counts of images of all processes, each of one shape, in the same order for all sizes."""
  found = {}
  for key, counts in made.items():
    mine, file = np.array(counts, np.int64).reshape(-1, *shape), io.BytesIO()
    np.save(file, mine)
    parts = [np.load(io.BytesIO(data)) for data in distributed.blobs(file.getvalue())]
    found[key] = np.concatenate(parts)
  return found


def _mean_ious(counts: Int[np.ndarray, "n kinds k 3"]) -> dict[str, float]:
  """The mIoU of each of `ceilings.KINDS`, by the name of the metric."""
  ious = overlap.mean_iou(counts.sum(axis=0, dtype=np.float64))
  constant, bilinear = map(float, ious)
  return {"ceiling": bilinear, "ceiling_constant": constant}


def _pair(size: int | Sequence[int], name: str) -> Size:
  h, w = (size, size) if isinstance(size, int) else size
  if min(h, w) < 1:
    raise errors.UserError(f"{name}={size}; expected pixels, 1 or more.")
  return int(h), int(w)


def segmentation(
  model: Model,
  batches: Batches,
  mesh: Mesh | None,
  *,
  seqhw: Sequence[SeqHw] = (),
  depth: Sequence[int] = (),
  short_side: int | None = None,
  window: int | Sequence[int] | None = None,
  window_stride: int | Sequence[int] | None = None,
  windows_at_once: int = 8,
  scales: Sequence[float] = (1.0,),
  flip: bool = False,
  boundary: float = 0.02,
  samples: int = 4,
  class_names: Sequence[str] | None = None,
) -> Segmentation:
  """Mean intersection over union and its kin at each patch size, of predictions at the resolution of the masks.

  Without a window all images have one size, and a batch of them is predicted at once. With a window they may have any;
  batches are then of images of one size each, as batch_size=1 makes them. Each image is decoded once for all sizes.

  Args:
    model: gives "pixel_logits".
    batches: re-iterable, of "image", "mask" int [n, h, w] (-1: the pixel counts for nothing) and "_mask".
    mesh: where it runs.
    seqhw, depth: sizes to evaluate, see `per_size.sizes_of`; those of a window where there is one.
    short_side: pixels to which the short side of an image is resized; None: that of the image. Masks are not resized.
    window: pixels of a window, an int or (h, w), as the crop of training; None: the whole image.
    window_stride: pixels from one window to the next; None: that of the window.
    windows_at_once: how many windows a batch has, over all devices; more where they are no multiple of the devices.
    scales: of the image; several: the mean of their probabilities. The patch keeps its pixels.
    flip: whether the mirrored image has part in that mean.
    boundary: width of the band of "boundary_iou" along contours: pixels, or below 1 a share of the image's diagonal.
    samples: how many of the first images are kept to look at, see `pictures`.
    class_names: of the data.

  Raises:
    UserError: a model without "pixel_logits" or without classes; sizes that make no sense; later, see
      `Segmentation.run`.
  """
  if "pixel_logits" not in model.outputs:
    raise errors.UserError(
      f"A {type(model).__name__} gives no class to pixels (it gives {sorted(model.outputs)}); expected an output"
      " 'pixel_logits', as model.name='segmenter' has it."
    )
  if model.num_classes < 1:
    raise errors.UserError(f"The model has {model.num_classes} classes; expected 1 or more.")
  if not scales or min(scales) <= 0:
    raise errors.UserError(f"scales={tuple(scales)}; expected numbers above 0.")
  if boundary <= 0 or windows_at_once < 1 or samples < 0:
    raise errors.UserError(
      f"boundary={boundary}, windows_at_once={windows_at_once}, samples={samples}; expected pixels or a share above 0,"
      " 1 or more, 0 or more."
    )
  if short_side is not None and short_side < 1:
    raise errors.UserError(f"short_side={short_side}; expected pixels, 1 or more.")
  pixels = None if window is None else _pair(window, "window")
  stride = pixels if window_stride is None else _pair(window_stride, "window_stride")
  if stride and not pixels:
    raise errors.UserError(f"window_stride={window_stride} without a window; give window=, too.")
  if stride and pixels and (stride[0] > pixels[0] or stride[1] > pixels[1]):
    raise errors.UserError(
      f"window_stride={window_stride} of windows of {pixels}: pixels between them would not be seen; expected at most"
      " the window."
    )
  view = View(short_side, pixels, stride, tuple(map(float, scales)), flip)
  sizes = sizes_of(seqhw, (), depth)
  return Segmentation(
    model, batches, mesh, sizes, view, windows_at_once, boundary, class_names, samples
  )
