"""Every evaluator has the interface that those who evaluate expect, and states its metrics."""

import inspect

from flexivit_jax.evaluators import (
  detection,
  embedding_distance,
  per_size,
  probing,
  retrieval,
  segmentation,
  teacher,
  zero_shot,
)
from flexivit_jax.evaluators.base import Evaluator
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.registry import EVALUATORS, METRICS, metrics_of


def test_what_the_functions_of_the_registry_return_are_evaluators():
  assert METRICS.keys() == EVALUATORS.keys()
  for make in EVALUATORS.values():
    cls = inspect.signature(make).return_annotation
    assert cls in (
      detection.Detection,
      embedding_distance.EmbeddingDistance,
      per_size.PerSize,
      probing.Probing,
      retrieval.Retrieval,
      segmentation.Segmentation,
      teacher.Once,
      zero_shot.ZeroShot,
    )
    for name in ("check", "compile", "run", "costs"):
      want, got = (list(inspect.signature(getattr(c, name)).parameters) for c in (Evaluator, cls))
      assert got == want, (cls, name)


def test_metrics_are_told_apart_and_only_a_fraction_has_a_binomial_interval():
  for declared in METRICS.values():
    names = [metric.name for metric in declared]
    assert names and len(set(names)) == len(names)
    assert not any(set("/@ ") & set(name) for name in names)
    assert all(metric.unit == "%" for metric in declared if metric.interval == "binomial")


def test_options_add_metrics_and_the_headline_is_of_the_labels_where_there_are_some():
  def names(**section):
    return [metric.name for metric in metrics_of(section)]

  assert names() == ["top1", "top5", "loss"]
  assert names(per_class=True) == ["top1", "top5", "loss", "top1_macro"]
  assert names(type="distance") == ["agree1", "agree5", "kl", "logsoftmax_euclidean"]
  assert names(type="distance", labels=True)[:3] == ["top1", "top5", "agree1"]


def test_a_metric_is_written_as_what_it_is_and_states_what_a_report_needs():
  rate, far = Metric("rate", unit="%", label="r"), Metric("far", "min", "bootstrap")
  assert (rate.text(0.123), far.text(0.123456)) == ("12.3%", "0.1235")
  assert (rate.short, rate.long, far.short, far.long) == ("r", "r", "far", "far")
  assert (rate.merit(0.5), far.merit(0.5)) == (0.5, -0.5)
  assert far.stated() == {"name": "far", "better": "min", "interval": "bootstrap"}
  assert rate.stated() == {
    "name": "rate", "better": "max", "interval": None, "unit": "%", "label": "r"
  }  # fmt: skip
