"""Metrics made of values of each image, and their intervals by a bootstrap over the images, at every size."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float, Integer

from flexivit_jax.evaluators import intervals
from flexivit_jax.sizes import SizeKey
from flexivit_jax.trees import Json

# Means [r, ...] over images of their values [n, ...], in r resamples, to the metric of each resample.
Resampled = Callable[[Float[np.ndarray, "r ..."]], Float[np.ndarray, "r"]]


def of_batches(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Joins the values [n, ...] of batches; only of images whose "_mask" [n] is not 0."""
  real = np.concatenate([part["_mask"] for part in parts]) > 0
  names = [name for name in parts[0] if name != "_mask"]
  return {name: np.concatenate([part[name] for part in parts])[real] for name in names}


def rows(
  sizes: Mapping[SizeKey, Mapping[str, np.ndarray]], metrics: Mapping[str, Resampled]
) -> dict[SizeKey, Json]:
  """Returns for each size the metrics by name, and "intervals": (low, high) by name.

  The resamples are the same for all sizes and metrics. They do not depend on the order of the images, which batches and
  processes decide.

  Args:
    sizes: for each the values [n, ...] of the n images by the name of the metric, the images in one order for all.
    metrics: by name, see `Resampled`.
  """
  values = {(size, name): sizes[size][name] for size in sizes for name in metrics}
  columns = [v.reshape(len(v), -1).astype(np.float64) for v in values.values()]
  n, ends = len(columns[0]), np.cumsum([column.shape[1] for column in columns])
  table = np.concatenate(columns, axis=1)
  # The draws go by place: any order that follows from the values themselves will do.
  direction = np.random.Generator(np.random.Philox(0)).normal(size=table.shape[1])
  table = table[np.argsort(table @ direction, kind="stable")]

  def statistic(drawn: Integer[np.ndarray, "r n"]) -> Float[np.ndarray, "r m"]:
    means = np.split(drawn @ table / n, ends[:-1], axis=1)
    shaped = (
      mean.reshape(-1, *v.shape[1:]) for mean, v in zip(means, values.values(), strict=True)
    )
    made = (metrics[name](mean) for (_, name), mean in zip(values, shaped, strict=True))
    return np.stack([*made], axis=1)

  with np.errstate(invalid="ignore"):  # values of a model that diverged
    whole = statistic(np.ones((1, n), np.int64))[0]
    low, high = intervals.bootstrap(statistic, n)
  found: dict[SizeKey, Json] = {size: {"intervals": {}} for size in sizes}
  for i, (size, name) in enumerate(values):
    found[size][name] = float(whole[i])
    found[size]["intervals"][name] = (float(low[i]), float(high[i]))
  return found
