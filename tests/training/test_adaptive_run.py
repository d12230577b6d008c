"""Runs whose sizes follow the losses, or a curriculum, resume bit for bit wherever they were stopped."""

import copy

import jax
import numpy as np
import pytest

from flexivit_jax import experiment, train as train_lib
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import preparation
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

STEPS = 12
# Strongly: so that draws after step 3 tell one history of losses from another.
ADAPTIVE = dict(seqhw=dict(v=(2, 3), adapt=dict(every=3, power=20.0, floor=0.05)))
CURRICULUM = dict(seqhw=dict(v=(3, 2), stages="coarse_to_fine"))
CONFIG = dict(
  total_steps=STEPS,
  input=dict(
    data=dict(name="synthetic", image_size=12, num_classes=3, num_examples=32, split="train"),
    pp="decode|flip_lr|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=8,
    threads=0,
  ),
  model=dict(
    width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(4, 4), posemb_size=(3, 3), dropout=0.1
  ),
  objective=dict(mixup_p=0.5),
  optim=dict(lr=1e-2, clip=1.0),
)


def config(flexi, save_every):
  return copy.deepcopy(CONFIG) | dict(flexi=flexi, checkpoint=dict(every_steps=save_every))


def final(settings, workdir):
  """All arrays of the last checkpoint, and the state of the schedule in it."""
  exp = experiment.from_config(settings)
  checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
  state = preparation.first_state(exp, sharding.make_mesh())
  assert checkpoints.latest_step() == STEPS
  rest = {"step": state.step, "opt_state": state.opt_state}
  *arrays, record = checkpoints.restore(STEPS, state.params, rest)
  checkpoints.close()
  return jax.tree.leaves(jax.device_get(arrays)), record["schedule"]


def history(workdir):
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  return [(r["step"], r["seqhw"], r["loss"], r["grad_norm"]) for r in rows]


def check_same(a, b, settings):
  assert history(a) == history(b) and len(history(a)) == STEPS
  (left, schedule), (right, other) = final(settings, a), final(settings, b)
  assert schedule == other
  for x, y in zip(left, right, strict=True):
    np.testing.assert_array_equal(x, y, strict=True)
  return schedule


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run with adaptive sizes, saved at its end only."""
  return train_lib.train(config(ADAPTIVE, STEPS), tmp_path_factory.mktemp("whole"))


# Before, at and after a change of the probabilities; resumed at steps 5, 6 and 6.
@pytest.mark.parametrize(
  ("stop", "save_every"), [(6, 2), pytest.param(7, 1, marks=pytest.mark.full)]
)
def test_adaptive_sizes_resume_bit_for_bit(whole, tmp_path, train_until, capsys, stop, save_every):
  settings = config(ADAPTIVE, save_every)
  train_until(settings, tmp_path, stop)
  train_lib.train(settings, tmp_path)
  assert f"resumed from {tmp_path / 'checkpoints'}" in capsys.readouterr().err
  schedule = check_same(whole, tmp_path, settings)
  assert schedule["seqhw"]["probs"][0] != 0.5  # they did follow the losses


@pytest.mark.full
def test_a_curriculum_resumes_bit_for_bit(tmp_path, train_until):
  settings = config(CURRICULUM, 2)
  train_lib.train(settings, tmp_path / "whole")
  assert [row[1] for row in history(tmp_path / "whole")] == [2] * 6 + [3] * 6
  train_until(settings, tmp_path / "run", 7)
  train_lib.train(settings, tmp_path / "run")
  check_same(tmp_path / "whole", tmp_path / "run", settings)
