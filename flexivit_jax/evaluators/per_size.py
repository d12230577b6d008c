"""What every evaluator does: score at each patch size, each image read and decoded once for all sizes."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import flax.linen as nn
import jax
import numpy as np

from flexivit_jax import compilation, errors, metrics, sharding
from flexivit_jax.models import flexivit

Size = int | tuple[int, int]


@final
class PerSize:
  """Evaluates a model at several patch sizes.

  Args:
    fn: `(params, batch, **size) -> metrics.Sums`, the masked sums over one batch at one patch size; pure.
    model: the model, whose patch sizes they are.
    batches: re-iterable, of `inputs` and "_mask".
    mesh: where it runs.
    seqhw: sizes to evaluate: tokens per side, or (per column, per row).
    inputs: keys of the batch that it needs, "image" among them.
    once: `(frozen, batch) -> batch`, done once for all sizes before `fn`: a teacher's part; pure.
    frozen: arrays that `once` takes: a teacher's parameters.
  """

  def __init__(
    self,
    fn: Callable[..., metrics.Sums],
    model: nn.Module,
    batches: Iterable[dict],
    mesh: Any,
    *,
    seqhw: Sequence[Size],
    inputs: Sequence[str],
    once: Callable[[Any, dict], dict] | None = None,
    frozen: Any = (),
  ):
    self.fn, self.model, self.batches, self.mesh = fn, model, batches, mesh
    self.once, self.frozen = once and jax.jit(once), frozen
    self.inputs = (*inputs, "_mask")
    self.sizes = {size: static(size) for size in seqhw}
    self._programs: dict[tuple, compilation.Program] = {}

  def compile(self, params: Any, report: Callable = lambda size, program: None) -> None:
    """Compiles one program for each size; nothing is compiled later.

    Raises:
      UserError: if a size does not divide the image, or the labels are not the model's.
    """
    self._first = self._model_inputs(next(iter(self.batches)))
    if "labels" in self._first:
      check_classes(self._first["labels"].shape[-1], self.model.num_classes)
    for size in self.sizes.values():
      flexivit.which_patch(self._first["image"].shape[1:3], self.model.patch_size, **size)
    self.frozen = jax.device_put(self.frozen, sharding.replicated(self.mesh))
    specs = sharding.specs(self._first, self.mesh)
    if self.once:
      specs = jax.eval_shape(self.once, self.frozen, specs)
      split = sharding.batch_split(self.mesh)
      specs = {k: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=split) for k, s in specs.items()}
    self._programs = compilation.compile_each(
      self.fn, (params, specs), self.sizes.values(), report=report
    )

  def run(self, params: Any) -> list[dict[str, Any]]:
    """Returns for each size {"seqhw", the mean of each metric, "n"}; accuracies are fractions."""
    if not self._programs:
      self.compile(params)
    sums: dict[Size, list] = {size: [] for size in self.sizes}
    for batch in self.batches:
      on_device = self._on_device(self._model_inputs(batch))
      for size, kwargs in self.sizes.items():
        sums[size].append(self._programs[compilation.size_key(kwargs)].run(params, on_device))
    rows = []
    for size, parts in sums.items():
      n = round(sum(float(part.count) for part in jax.device_get(parts)))
      rows.append({"seqhw": size_text(size), **metrics.means(*parts), "n": n})
    return rows

  def costs(self, params: Any, repeats: int = 5) -> list[dict[str, Any]]:
    """Returns for each size {"patch", "tokens", "gflops", "ms"}; call after `compile` or `run`.

    "ms" is the median time of a batch divided by its images; "gflops" two per multiply-add, of one image.
    """
    batch = self._on_device(self._first)
    n, h, w = batch["image"].shape[:3]
    rows = []
    for size, kwargs in self.sizes.items():
      program = self._programs[compilation.size_key(kwargs)].run
      times = (_seconds(program, params, batch) for _ in range(repeats))
      ms = statistics.median(times) * 1e3 / n
      grid = size if isinstance(size, tuple) else (size, size)
      patch = (h // grid[0], w // grid[1])
      gflops = 2 * flexivit.gmacs(self.model, (h, w), grid, batch["image"].shape[3])
      patch_text = patch[0] if patch[0] == patch[1] else size_text(patch)
      rows.append({"patch": patch_text, "tokens": grid[0] * grid[1], "gflops": gflops, "ms": ms})
    return rows

  def _on_device(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    arrays = sharding.put_batch(batch, self.mesh)
    if not self.once:
      return arrays
    made = self.once(self.frozen, arrays)
    return jax.device_put(made, sharding.batch_split(self.mesh))

  def _model_inputs(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = set(self.inputs) - set(batch)
    if missing:
      message = f"The evaluation's batches lack {sorted(missing)}, they have {sorted(batch)}"
      raise errors.UserError(f"{message}; mend its pp (onehot, keep).")
    return {k: batch[k] for k in self.inputs}


def check_classes(labels: int, model: int) -> None:
  """Raises a UserError if the labels are not of the model's number of classes."""
  if labels != model:
    raise errors.UserError(
      f"The labels have {labels} classes, the model {model}; mend onehot(...) in the evaluation's pp."
    )


def static(size: Size) -> dict[str, Any]:
  """The model's static argument for a size: tokens per side, or (per column, per row)."""
  return {"grid_hw": tuple(size)} if isinstance(size, (tuple, list)) else {"seqhw": int(size)}


def size_text(size: Size) -> int | str:
  """An integer as it is, a pair as "HxW"."""
  return f"{size[0]}x{size[1]}" if isinstance(size, (tuple, list)) else int(size)


def _seconds(program: Callable, *args: Any) -> float:
  begin = time.perf_counter()
  jax.block_until_ready(program(*args))
  return time.perf_counter() - begin
