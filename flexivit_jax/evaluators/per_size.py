"""What every evaluator does: score at each patch size, each image read and decoded once for all sizes."""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, final

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from flexivit_jax import errors, heartbeat
from flexivit_jax.data import label_maps
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.evaluators import image_samples, image_scores, resampling
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.sums import Sums, means
from flexivit_jax.models import Model
from flexivit_jax.sizes import SeqHw, Size, SizeArgs, SizeKey, size_args, size_key, size_text
from flexivit_jax.trees import Json, Params, Tree


@final
class PerSize:
  """Evaluates a model at several patch sizes.

  Args:
    fn: `(params, batch, **size) -> Sums`, the masked sums over one batch at one patch size; pure. Where only
      `outputs` is used it may return anything.
    model: the model, whose patch sizes they are.
    batches: re-iterable, of `inputs` and "_mask".
    mesh: where it runs.
    sizes: static arguments of the model to evaluate at, see `sizes_of`.
    inputs: keys of the batch that it needs, "image" among them.
    once: `(frozen, batch) -> batch`, done once for all sizes before `fn`: a teacher's part; pure.
    frozen: arrays that `once` takes: a teacher's parameters.
    num_classes: of the labels, where there are any; default: the model's, 0 where it has none.
    label_map: what `fn` restricts logits and labels to, for the check that they fit; None: they are the same classes.
    resampled: for each name in `Sums.per_image`, the metric as a function of the values' means over images
      (`resampling.Resampled`): `intervals.mean` where it is a mean; an intersection over union divides two
      of them. The row gets its interval, and its value where `Sums.total` does not give it.
    scored: key of `Sums.per_image` that is 1 for an image that is right and 0 otherwise, beside "label", "predicted"
      and "_id" of batches that have it: `image_scores` then gives them. "": none.
    samples: how many images that were not right `pictures` gives, see `image_samples`; with `scored` alone.
  """

  def __init__(
    self,
    fn: Callable[..., Tree],
    model: Model,
    batches: Batches,
    mesh: Mesh | None,
    *,
    sizes: Sequence[SizeArgs],
    inputs: Sequence[str],
    once: Callable[[Tree, dict], dict] | None = None,
    frozen: Tree = (),
    num_classes: int | None = None,
    label_map: label_maps.LabelMap | None = None,
    resampled: Mapping[str, resampling.Resampled] | None = None,
    scored: str = "",
    samples: int = 0,
  ):
    self.resampled, self.scored, self._number = dict(resampled or {}), scored, samples
    self._scores: image_scores.ImageScores | None = None
    self._album, self._pictures = image_samples.Album(), dict[str, bytes]()
    self.fn, self.model, self.batches, self.mesh = fn, model, batches, mesh
    self.once, self.frozen = once and jax.jit(once), frozen
    self.inputs = (*inputs, "_mask")
    self.num_classes = getattr(model, "num_classes", 0) if num_classes is None else num_classes
    self.label_map = label_map
    self.sizes = {size_key(size): dict(size) for size in sizes}
    self._programs: dict[SizeKey, compilation.Program] = {}

  def check(self) -> None:
    """Reads the first batch; raises as `compile`."""
    self._first = self._model_inputs(next(iter(self.batches)))
    if "labels" in self._first:
      labels = self._first["labels"].shape[-1]
      check_classes(labels, self.num_classes, self.label_map)
    for size in self.sizes.values():
      self.model.grid(self._image_hw, **size)

  def compile(self, params: Params, report: Report = silent) -> None:
    """Compiles one program for each size; nothing is compiled later.

    Raises:
      UserError: if a size does not divide the image, or the labels are of another number of classes.
    """
    self.check()
    self.frozen = jax.device_put(
      sharding.replicate(self.frozen, self.mesh), sharding.replicated(self.mesh)
    )
    specs = sharding.specs(self._first, self.mesh)
    if self.once:
      specs = jax.eval_shape(self.once, self.frozen, specs)
      split = sharding.batch_split(self.mesh)
      specs = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split) for k, s in specs.items()}
    per_image = self.resampled or self._has_ids
    fn = functools.partial(_gathered, self.fn, self.mesh) if per_image else self.fn
    with jax.set_mesh(self.mesh) if self.mesh.size > 1 else contextlib.nullcontext():
      self._programs = compilation.compile_each(
        fn, (params, specs), self.sizes.values(), report=report
      )

  def run(self, params: Params) -> list[Row]:
    """Returns for each size {"seqhw", the mean of each metric, "n"}; accuracies are fractions.

    With tables also what `per_class` makes of "confusion"; with `resampled` also "intervals", (low, high) by metric;
    with `samples` also those, see `image_samples.row`.
    """
    sums: dict[SizeKey, list] = {key: [] for key in self.sizes}
    images: dict[SizeKey, list] = {key: [] for key in self.sizes}
    tables: dict[SizeKey, Tree] = {}
    seen = self._album.watched(self.batches) if self._number else self.batches
    for outputs in self.outputs(params, seen):
      for key, output in outputs.items():
        sums[key].append(output._replace(tables=None, per_image=None))
        images[key].append(output.per_image)
        if output.tables is not None:  # added at once: each is large
          both = [output.tables, *([tables[key]] if key in tables else [])]
          tables[key] = jax.jit(_added, out_shardings=sharding.replicated(self.mesh))(both)
    rows = self.rows(sums)
    if self.resampled:
      values = {k: resampling.of_batches(jax.device_get(parts)) for k, parts in images.items()}
      found = resampling.rows(values, self.resampled).values()
      rows = [{**row, **more, **row} for row, more in zip(rows, found, strict=True)]
    if self._has_ids:
      parts = {image_scores.size_name(self.names(self.sizes[k])): v for k, v in images.items()}
      distinct = len(parts) == len(images)  # two strides may have one grid
      self._scores = (
        image_scores.of_batches(jax.device_get(parts), self.scored) if distinct else None
      )
      rows = self._with_samples(rows)
    if not tables:
      return rows
    counted = (jax.device_get(tables[key])["confusion"] for key in self.sizes)
    return [row | per_class(counts) for row, counts in zip(rows, counted, strict=True)]

  def image_scores(self) -> image_scores.ImageScores | None:
    """Returns which images were right in the latest `run`, of all processes; None where no image has an "_id"."""
    return self._scores

  def _with_samples(self, rows: list[Row]) -> list[Row]:
    samples = image_samples.chosen(self._scores, self._number) if self._scores else []
    self._pictures = self._album.files(samples) if samples else {}
    names = map(image_scores.size_name, rows)
    return [
      row | ({"samples": image_samples.row(samples, name)} if self._pictures else {})
      for row, name in zip(rows, names, strict=True)
    ]

  def pictures(self) -> dict[str, bytes]:
    """Returns files of the samples of the latest `run`; rows name them in "samples"."""
    return self._pictures

  def rows(self, sums: Mapping[SizeKey, Sequence[Sums]]) -> list[Row]:
    """Returns for each size what names it, the means of its metrics over all batches, and "n", how many examples."""
    rows = []
    for key, parts in sums.items():
      n = round(sum(float(part.count) for part in jax.device_get(parts)))
      rows.append({**self.names(self.sizes[key]), **means(*parts), "n": n})
    return rows

  def outputs(self, params: Params, batches: Batches) -> Iterator[dict[SizeKey, Tree]]:
    """Yields for each batch what `fn` returns at each size, without waiting for the device.

    Args:
      params: of the model.
      batches: of the shapes of `self.batches`.
    """
    if not self._programs:
      self.compile(params)
    for batch in batches:
      on_device = self._on_device(self._model_inputs(batch))
      yield {key: self._programs[key].run(params, on_device) for key in self.sizes}
      heartbeat.beat()

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns for each size {"patch", "tokens", "gflops", "ms"}; call after `compile` or `run`.

    "ms" is the median time of a batch divided by its images; "gflops" two per multiply-add, of one image.
    """
    batch = self._on_device(self._first)
    n, h, w, channels = batch["image"].shape
    tower = getattr(self.model, "parts", {}).get("image", self.model)  # of two, that of images
    rows = []
    for key, size in self.sizes.items():
      program = self._programs[key].run
      times = (_seconds(program, params, batch) for _ in range(repeats))
      ms = statistics.median(times) * 1e3 / n
      patch, _, grid = self.model.grid((h, w), **size)
      gflops = 2 * tower.gmacs({"image": (h, w, channels)}, **size)
      patch_text = patch[0] if patch[0] == patch[1] else size_text(patch)
      rows.append({"patch": patch_text, "tokens": grid[0] * grid[1], "gflops": gflops, "ms": ms})
    return rows

  @property
  def _has_ids(self) -> bool:
    return bool(self.scored) and "_id" in self._first

  @property
  def _image_hw(self) -> tuple[int, int]:
    return self._first["image"].shape[1:3]

  def grid(self, size: SizeArgs) -> Size:
    """Returns the tokens (per column, per row) of the first batch's images."""
    return self.model.grid(self._image_hw, **size)[2]

  def names(self, size: SizeArgs) -> Json:
    """What tells rows apart: the grid under "seqhw", and the other static arguments under their names."""
    grid = self.grid(size)
    others: SizeArgs = {k: size[k] for k in ("stride", "depth") if k in size}
    return {"seqhw": size_text(grid) if grid[0] != grid[1] else grid[0], **others}

  def _on_device(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    arrays = sharding.put_batch(batch, self.mesh)
    if not self.once:
      return arrays
    made = self.once(self.frozen, arrays)
    return jax.device_put(made, sharding.batch_split(self.mesh))

  def _model_inputs(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = set(self.inputs) - set(batch)
    if missing:
      message = f"The evaluation's batches lack {sorted(missing)}, they have {sorted(batch)}"
      raise errors.UserError(f"{message}; mend its pp (onehot, keep).")
    ids = {"_id": batch["_id"].astype(np.int32)} if self.scored and "_id" in batch else {}
    return {k: batch[k] for k in self.inputs} | ids


def _gathered(
  fn: Callable[..., Sums], mesh: Mesh, params: Params, batch: dict[str, jax.Array], **size: Any
) -> Sums:
  """What `fn` returns, its values of each image whole on every device, with the mask: every process can read them."""
  sums = fn(params, batch, **size)
  per_image = {"_mask": batch["_mask"], **sums.per_image}
  whole = jax.lax.with_sharding_constraint(per_image, sharding.replicated(mesh))
  return sums._replace(per_image=whole)


def of_this_process(output: jax.Array) -> np.ndarray:
  """Returns this process's share of an array that is divided along its first axis."""
  return np.concatenate([np.asarray(shard.data) for shard in shards(output)])


def shards(output: jax.Array) -> list[Any]:
  """Returns the parts of an array on this process's devices, in the order of its first axis."""
  return sorted(output.addressable_shards, key=lambda shard: shard.index[0].start or 0)


def _added(tables: list[Tree]) -> Tree:
  return jax.tree.map(lambda *counts: sum(counts), *tables)


def per_class(counts: Int[np.ndarray, "rows k"]) -> Json:
  """What a row says of a table of `classification.confusion`.

  "confusion" are its counts; "top1_macro" is the mean of the accuracies of the classes that have examples, also called
  balanced accuracy; "unlabelled" are the examples without a label, if there are any: they are of no class.
  """
  table, rest = counts[:-1], int(counts[-1].sum())
  n = table.sum(axis=1)
  accuracies = table.diagonal()[n > 0] / n[n > 0]
  row = {"top1_macro": float(accuracies.mean()) if accuracies.size else 0.0}
  row |= {"unlabelled": rest} if rest else {}
  return {**row, "confusion": table.tolist()}


def check_classes(labels: int, expected: int, label_map: label_maps.LabelMap | None) -> None:
  """Raises a UserError if the labels are of another number of classes, or the label map does not fit them."""
  if label_map:
    if expected != label_map.model_classes or labels not in label_map.labels:
      known = " or ".join(str(n) for n in label_map.labels)
      raise errors.UserError(
        f"The labels have {labels} classes, the model {expected}; this label_map is of {known} classes and models of"
        f" {label_map.model_classes}. Mend onehot(...) in the evaluation's pp, or choose another label_map."
      )
  elif labels != expected:
    raise errors.UserError(
      f"The labels have {labels} classes, expected {expected}; mend onehot(...) in the evaluation's pp."
    )


def sizes_of(
  seqhw: Sequence[SeqHw] = (), stride: Sequence[int] = (), depth: Sequence[int] = ()
) -> list[SizeArgs]:
  """Returns the model's static arguments for what an evaluator's section lists.

  Args:
    seqhw: tokens per side, or (per column, per row).
    stride: pixels from one patch to the next, in the place of `seqhw`; the patch is then the kernel's own.
    depth: how many blocks run; combined with each of the others. Default: all blocks.

  Raises:
    UserError: both `seqhw` and `stride`, or neither.
  """
  if bool(seqhw) == bool(stride):
    raise errors.UserError(
      f"Got seqhw={tuple(seqhw)} and stride={tuple(stride)} of an evaluation; give one of them."
    )
  grids = [size_args(size) for size in seqhw] + [{"stride": int(s)} for s in stride]
  return [{**grid, "depth": int(k)} for grid in grids for k in depth] if depth else grids


def _seconds(program: Callable, *args: Tree) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - begin
