"""Top-1, top-5 and loss at every patch size, each image read and decoded once for all sizes."""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import compilation, errors, losses, metrics, sharding
from flexivit_jax.models import flexivit

Size = int | tuple[int, int]


def eval_step(
  params: Any, batch: dict[str, jax.Array], *, model: nn.Module, loss: str, **size: Any
) -> metrics.Sums:
  """Masked sums over one batch of top1, top5 and loss at one patch size."""
  logits, _ = model.apply({"params": params}, batch["image"], **size)
  logits, labels = logits.astype(jnp.float32), batch["labels"]
  k = min(5, logits.shape[-1])
  hits = (
    jnp.take_along_axis(labels, jax.lax.top_k(logits, k)[1], axis=-1) > 0
  )  # right: any of the labels
  values = {
    "top1": hits[:, 0] * 1.0,
    "top5": hits.any(axis=-1) * 1.0,
    "loss": losses.LOSSES[loss](logits, labels),
  }
  return metrics.masked_sums(values, batch["_mask"])


class Classification:
  """Evaluates a model on labelled images at several patch sizes.

  Args:
    model: the model; its first output are logits.
    batches: re-iterable, of "image", "labels" (one-hot or multi-hot) and "_mask".
    seqhw: sizes to evaluate: tokens per side, or (per column, per row).
    loss: a name in `losses.LOSSES`.
  """

  def __init__(
    self,
    model: nn.Module,
    batches: Iterable[dict],
    mesh: Any,
    *,
    seqhw: Sequence[Size],
    loss: str = "softmax_xent",
  ):
    if loss not in losses.LOSSES:
      raise errors.unknown("loss", loss, losses.LOSSES)
    self.model, self.batches, self.mesh, self.loss = model, batches, mesh, loss
    self.sizes = {size: static(size) for size in seqhw}
    self._programs: dict[tuple, compilation.Program] = {}

  def compile(self, params: Any, report: Callable = lambda size, program: None) -> None:
    """Compiles one program for each size; nothing is compiled later.

    Raises:
      UserError: if a size does not divide the image, or the labels are not the model's.
    """
    self._first = self._model_inputs(next(iter(self.batches)))
    classes = self._first["labels"].shape[-1]
    if classes != self.model.num_classes:
      raise errors.UserError(
        f"The labels have {classes} classes, the model {self.model.num_classes};"
        " mend onehot(...) in the evaluation's pp."
      )
    for size in self.sizes.values():
      flexivit.which_patch(self._first["image"].shape[1:3], self.model.patch_size, **size)
    fn = functools.partial(eval_step, model=self.model, loss=self.loss)
    specs = sharding.specs(self._first, self.mesh)
    self._programs = compilation.compile_each(
      fn, (params, specs), self.sizes.values(), report=report
    )

  def run(self, params: Any) -> list[dict[str, Any]]:
    """Returns for each size {"seqhw", "top1", "top5", "loss", "n"}; top-1 and top-5 are fractions."""
    if not self._programs:
      self.compile(params)
    sums: dict[Size, list] = {size: [] for size in self.sizes}
    for batch in self.batches:
      on_device = sharding.put_batch(self._model_inputs(batch), self.mesh)
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
    batch = sharding.put_batch(self._first, self.mesh)
    n, h, w = batch["image"].shape[:3]
    rows = []
    for size, kwargs in self.sizes.items():
      program = self._programs[compilation.size_key(kwargs)].run
      ms = statistics.median(_seconds(program, params, batch) for _ in range(repeats)) * 1e3 / n
      grid = size if isinstance(size, tuple) else (size, size)
      patch = (h // grid[0], w // grid[1])
      gflops = 2 * flexivit.gmacs(self.model, (h, w), grid, batch["image"].shape[3])
      patch_text = patch[0] if patch[0] == patch[1] else size_text(patch)
      rows.append({"patch": patch_text, "tokens": grid[0] * grid[1], "gflops": gflops, "ms": ms})
    return rows

  def _model_inputs(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    missing = {"image", "labels", "_mask"} - set(batch)
    if missing:
      message = f"The evaluation's batches lack {sorted(missing)}, they have {sorted(batch)}"
      raise errors.UserError(f"{message}; mend its pp (onehot, keep).")
    return {k: batch[k] for k in ("image", "labels", "_mask")}


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
