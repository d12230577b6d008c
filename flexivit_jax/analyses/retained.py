"""What `flexivit flexify` measured of each size, as the values of a profile: where images have no labels."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from flexivit_jax import errors, weights
from flexivit_jax.analyses import profiling
from flexivit_jax.evaluators import metrics, registry
from flexivit_jax.inference import predictor, shapes
from flexivit_jax.sizes import SeqHw, from_text, size_text
from flexivit_jax.trees import Json

NAME = "retention.json"
# The metrics of retention.json. The first of `_ORDER` that its rows have stands for accuracy.
_BOXES = metrics.Metric("kept", unit="%", title="boxes of the original that are found")
_METRICS = {
  metric.name: metric
  for section in ({"type": "distance", "labels": True}, {"type": "embedding_distance"})
  for metric in registry.metrics_of(section)
} | {"kept": _BOXES}
_ORDER = ("top1", "agree1", "neighbours", "kept")


def beside(checkpoint: str | os.PathLike[str]) -> pathlib.Path | None:
  """Returns the file that `flexivit flexify` wrote beside a file of weights; None: there is none."""
  found = pathlib.Path(checkpoint).parent / NAME
  return found if found.is_file() and pathlib.Path(checkpoint).is_file() else None


def given(
  path: pathlib.Path, loaded: predictor.Loaded, metric: str = ""
) -> tuple[metrics.Metric, dict[SeqHw, profiling.Value]]:
  """Returns the metric, and what each size gives by it.

  Args:
    path: of retention.json.
    loaded: the model that it is of.
    metric: its name; "": top-1 where the held-out images had labels, else the agreement with the original.

  Raises:
    UserError: it is damaged, or of other weights; no such metric.
  """
  try:
    scores = json.loads(path.read_text("utf-8"))
    rows: list[Mapping[str, Any]] = scores.get("after", scores["before"])
    names = {
      key: _METRICS[key] for key in (*_ORDER, *rows[0]) if key in rows[0] and key in _METRICS
    }
    digest = scores.get("weights")
    found = names.get(metric) if metric else next(iter(names.values()))
    values = (
      {}
      if found is None
      else {from_text(str(r["seqhw"])): profiling.of_row(r, found) for r in rows}
    )
  except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration) as e:
    raise errors.UserError(f"{path} is damaged ({e!r}); run `flexivit flexify` again.") from e
  if digest != weights.towers.digest(loaded.model, loaded.params):
    raise errors.UserError(
      f"{path} does not say that it is of the weights in {loaded.name}; run `flexivit flexify` again, or give images"
      " with labels: --data name=folder data_dir=photos split=val."
    )
  if found is None:
    raise errors.unknown("metric", metric, names)
  return found, values


def profile(
  path: pathlib.Path, loaded: predictor.Loaded, asked: profiling.Asked, **tell: Any
) -> profiling.Profile:
  """Measures what each size costs here, and takes what it gives from retention.json.

  Args:
    path: of that file.
    loaded: the model.
    asked: what to measure; no sizes: all that the file has.
    **tell: see `profiling.timed`.

  Raises:
    UserError: see `given`; a size that it does not have; another way than float32.
  """
  metric, values = given(path, loaded, asked.metric)
  asked = asked._replace(seqhw=asked.seqhw or tuple(values))
  if lacking := [size for size in asked.seqhw if size not in values]:
    known = [str(size_text(size)) for size in values]
    raise errors.unknown(f"size of {path}", size_text(lacking[0]), known)
  profiling.check_float32(asked.ways, metric.name)
  of_ways = {(size, way): values[size] for size in asked.seqhw for way in asked.ways}
  data: Json = {"name": f"held-out images of {NAME}", "split": "", "n": values[asked.seqhw[0]].n}
  return profiling.timed(
    loaded, metric, of_ways, asked, shapes.common(loaded.prepare, loaded.name), data, **tell
  )
