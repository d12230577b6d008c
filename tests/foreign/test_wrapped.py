"""Any nest of dicts and prefixes in any of torch's kinds of files gives the arrays of the bare one."""

import argparse
import collections
import datetime
import decimal
import fractions
import pathlib
import types

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings

from flexivit_jax import weights
from flexivit_jax.errors import UserError

torch = pytest.importorskip("torch", reason="needs torch: make test-convert")

LEVELS = ("state_dict", "model", "model_state_dict", "module", "teacher", "ema", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "visual.trunk.", "student.")
BESIDE = {
  "epoch": 3,
  "args": argparse.Namespace(lr=1e-3, out=pathlib.PurePosixPath("runs")),
  "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 1e-3}]},
  "best_acc": np.float64(0.5),
  "hyper_parameters": {"name": "vit"},
  "rng": torch.get_rng_state(),
}
SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".pth.tar", ".ckpt", ".PTH")


@settings(
  deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
  levels=st.lists(st.sampled_from(LEVELS), max_size=3),
  prefixes=st.lists(st.sampled_from(PREFIXES), max_size=3),
  beside=st.sets(st.sampled_from(sorted(BESIDE)), max_size=3),
  suffix=st.sampled_from(SUFFIXES),
)
def test_any_nest_is_the_bare_model(tmp_path, timm_state_dict, levels, prefixes, beside, suffix):
  tensors = {name: torch.from_numpy(array) for name, array in timm_state_dict().items()}
  torch.save(tensors, tmp_path / "bare.pth")
  content = {"".join(prefixes) + name: tensor for name, tensor in tensors.items()}
  for level in levels:
    content = {level: content, **{name: BESIDE[name] for name in beside}}
  path = tmp_path / f"weights{suffix}"
  torch.save(content, path)
  _, want = weights.load(tmp_path / "bare.pth", num_heads=4)
  _, got, record = weights.load_with_record(path, num_heads=4)
  jax.tree.map(np.testing.assert_array_equal, got, want)
  for word in (*levels, *prefixes):
    assert word in " ".join(record["notes"])


@pytest.mark.parametrize(
  "value",
  [
    types.SimpleNamespace(lr=1e-3, sizes=[1, 2]),
    datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    datetime.date(2026, 1, 2),
    (slice(1, 2), range(3), frozenset([1]), decimal.Decimal("0.1"), fractions.Fraction(1, 3)),
    [np.float32(1), np.int64(2), np.bool_(True), np.zeros(3)],
    collections.Counter("ab"),
    torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(2)], lr=1.0), 1).state_dict(),
  ],
)
def test_harmless_values_beside_weights_do_not_stand_in_the_way(tmp_path, timm_state_dict, value):
  tensors = {name: torch.from_numpy(array) for name, array in timm_state_dict().items()}
  content = {"state_dict": tensors, "more": value, "args": argparse.Namespace(x=value)}
  torch.save(content, tmp_path / "w.pth")
  model, _ = weights.load(tmp_path / "w.pth", num_heads=4)
  assert model.num_classes == 7


class Config:
  """A class of somebody's training code."""


@pytest.mark.parametrize(
  "content", [lambda s: {"model": s, "config": Config()}, lambda s: Config()]
)
def test_a_class_that_is_no_tensor_is_named_with_what_to_do(tmp_path, timm_state_dict, content):
  tensors = {name: torch.from_numpy(array) for name, array in timm_state_dict().items()}
  torch.save(content(tensors), tmp_path / "w.pth")
  with pytest.raises(UserError, match=rf"{__name__}\.Config.* save its weights alone"):
    weights.load(tmp_path / "w.pth")
