"""What probes share: frozen features of labelled images at every patch size, a classifier of them, and its rows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, final

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Integer

from flexivit_jax import errors
from flexivit_jax.devices import sharding
from flexivit_jax.evaluators.base import Batches, Report, Row, silent
from flexivit_jax.evaluators.per_size import PerSize, sizes_of
from flexivit_jax.evaluators.sums import Sums
from flexivit_jax.models import Model
from flexivit_jax.objectives.base import Batch
from flexivit_jax.sizes import SeqHw, SizeKey, size_name
from flexivit_jax.trees import Params

Classify = Callable[[np.ndarray], np.ndarray]  # features [n, d] -> the class of each, [n]


def features_step(
  params: Params, batch: Batch, *, model: Model, mesh: Mesh | None, **size: Any
) -> dict[str, jax.Array]:
  """The pre-logits, labels and mask of one batch, whole on every device, so that every process can read them."""
  _, out = model.apply({"params": params}, batch["image"], **size)
  features = {k: batch[k] for k in ("labels", "_mask")}
  features["features"] = out["pre_logits"].astype(jnp.float32)
  return jax.lax.with_sharding_constraint(features, sharding.replicated(mesh))


@final
class Probing:
  """An evaluator with the interface of `PerSize`, which makes the features; the rest comes after the last batch.

  The host holds the features of all images at all sizes, 4 * sizes * (training + test images) * width bytes: of
  ImageNet-1k (1,281,167 + 50,000) and a ViT-B at ten sizes 41 GB, at one 4.1 GB.

  Args:
    model: the model; its head, if it has one, is not used, so that the data may have other classes.
    batches: re-iterable, of "image", "labels" (one-hot or multi-hot) and "_mask": what is scored.
    mesh: where the features are made.
    train_batches: as `batches`, of the same shapes: what the classifier is fitted to.
    fit: training features [n, d] and labels [n, k] -> a classifier, and what to note in its row.
    num_classes: of the labels.
    seqhw, stride, depth: sizes to evaluate, see `per_size.sizes_of`.
  """

  def __init__(
    self,
    model: Model,
    batches: Batches,
    mesh: Mesh | None,
    *,
    train_batches: Batches,
    fit: Callable[[np.ndarray, np.ndarray], tuple[Classify, dict[str, Any]]],
    num_classes: int,
    seqhw: Sequence[SeqHw],
    stride: Sequence[int],
    depth: Sequence[int],
  ):
    headless = model.clone(num_classes=0)
    fn = functools.partial(features_step, model=headless, mesh=mesh)
    sizes, inputs = sizes_of(seqhw, stride, depth), ("image", "labels")
    self.features = PerSize(
      fn, headless, batches, mesh, sizes=sizes, inputs=inputs, num_classes=num_classes
    )
    self.train_batches, self.fit = train_batches, fit

  def check(self) -> None:
    """See `PerSize.check`."""
    self.features.check()

  def compile(self, params: Params, report: Report = silent) -> None:
    """Compiles one program for each size; see `PerSize.compile`."""
    self.features.compile(params, report)

  def run(self, params: Params) -> list[Row]:
    """Returns for each size {"seqhw", "top1", "n" (images scored)} and what `fit` notes; accuracies are fractions."""
    known, labels = gather(self.features, params, self.train_batches)
    check_seen(labels)
    asked, expected = gather(self.features, params, self.features.batches)
    sums, notes = {}, []
    for size in tuple(known):
      classify, noted = self.fit(known.pop(size), labels)
      right = hits(classify(asked.pop(size)), expected)
      sums[size] = [Sums({"top1": right.sum()}, len(right))]
      notes.append(noted)
    return [row | noted for row, noted in zip(self.features.rows(sums), notes, strict=True)]

  def costs(self, params: Params, repeats: int = 5) -> list[Row]:
    """Returns what the model without a head costs at each size; see `PerSize.costs`."""
    return self.features.costs(params, repeats)


def gather(
  features: PerSize, params: Params, batches: Batches
) -> tuple[dict[SizeKey, np.ndarray], np.ndarray]:
  """The features [n, d] at each size, and the labels [n, k] (bool), of the examples that are no padding.

  Raises:
    UserError: a feature that is not finite.
  """
  parts: dict[SizeKey, list[np.ndarray]] = {size: [] for size in features.sizes}
  labels = []
  for outputs in features.outputs(params, batches):
    found = jax.device_get(outputs)
    for size, output in found.items():
      parts[size].append(_finite(size, output["features"][output["_mask"] > 0]))
    first = next(iter(found.values()))
    labels.append(first["labels"][first["_mask"] > 0] > 0)
  # A size's parts are let go when they are joined: never all of the features twice.
  return {size: np.concatenate(parts.pop(size)) for size in tuple(parts)}, np.concatenate(labels)


def _finite(size: SizeKey, features: np.ndarray) -> np.ndarray:
  if not np.isfinite(features).all():
    message = f"Features at {size_name(dict(size))} are not finite: there is nothing to fit"
    raise errors.UserError(f"{message}; look at the checkpoint and the images.")
  return features


def check_seen(labels: Bool[np.ndarray, "n k"]) -> None:
  """Raises a UserError if there are fewer than two training images, or a class has none."""
  lacking = np.flatnonzero(~labels.any(axis=0))
  if len(labels) < 2 or len(lacking):
    raise errors.UserError(
      f"The probe has {len(labels)} training images and none of the classes {lacking[:5].tolist()};"
      " expected some of each: mend train_data."
    )


def hits(first: Integer[np.ndarray, "n"], labels: Bool[np.ndarray, "n k"]) -> Bool[np.ndarray, "n"]:
  """Whether the class that an example was given is one of its labels."""
  return np.take_along_axis(labels, first[:, None], axis=-1)[:, 0]
