"""Every evaluator has the interface that those who evaluate expect, and states its metrics."""

import inspect

from flexivit_jax.evaluators import per_size, probing, teacher
from flexivit_jax.evaluators.base import Evaluator
from flexivit_jax.evaluators.registry import EVALUATORS, METRICS


def test_what_the_functions_of_the_registry_return_are_evaluators():
  assert METRICS.keys() == EVALUATORS.keys()
  for make in EVALUATORS.values():
    cls = inspect.signature(make).return_annotation
    assert cls in (per_size.PerSize, probing.Probing, teacher.Once)
    for name in ("check", "compile", "run", "costs"):
      want, got = (list(inspect.signature(getattr(c, name)).parameters) for c in (Evaluator, cls))
      assert got == want, (cls, name)
