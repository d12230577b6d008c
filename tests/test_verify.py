"""`flexivit verify` looks at everything that a run or an export holds."""

import jax
import numpy as np
import pytest

from flexivit_jax import cli, train as train_lib, trees, verify, weights
from flexivit_jax.errors import UserError

DATA = dict(name="synthetic", image_size=12, num_classes=3, num_examples=16)
CONFIG = dict(
  total_steps=2,
  input=dict(
    data=dict(DATA, split="train"),
    pp="decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=8,
    threads=0,
  ),
  model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3)),
  flexi=dict(seqhw=dict(v=(2, 3))),
  optim=dict(lr=1e-2),
  checkpoint=dict(every_steps=1, keep=None),
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  return train_lib.train(CONFIG, tmp_path_factory.mktemp("run"))


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  return path


def largest(folder):
  return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_a_run_is_all_its_checkpoints(run, capsys):
  assert cli.main(["verify", str(run)]) == 0
  lines = capsys.readouterr().out.splitlines()
  steps = [str(run / "checkpoints" / step) for step in "12"]
  assert lines == [f"{step}: as it was written" for step in steps]
  assert verify.verify(run / "checkpoints" / "2") == [(steps[1], None)]
  path = flip(largest(run / "checkpoints" / "2"))
  assert cli.main(["verify", str(run)]) == 2
  said = capsys.readouterr()
  assert path.name in said.out and said.err == f"flexivit: error: Damaged: {steps[1]}.\n"
  flip(path)


def test_weights_of_a_damaged_checkpoint_are_not_loaded(run):
  path = flip(largest(run / "checkpoints" / "2"))
  with pytest.raises(UserError, match="has other bytes than were written"):
    weights.load(run)
  flip(path)
  weights.load(run)


def test_an_export_and_weights_are_checked(run, tmp_path):
  out = tmp_path / "model.zip"
  assert cli.main(["export", str(run), str(out), "--seqhw=2", "--no-verify"]) == 0
  assert verify.verify(out) == [(str(out), None)]
  flip(out)
  ((name, problem),) = verify.verify(out)
  assert name == str(out) and problem
  _, params = weights.load(run)
  file = tmp_path / "weights.npz"
  np.savez(file, **{k: np.asarray(v) for k, v in trees.flatten(jax.device_get(params)).items()})
  assert verify.verify(file) == [(str(file), None)]
  flip(file)
  assert verify.verify(file)[0][1]


def test_what_is_not_there_is_said(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    verify.verify(tmp_path / "none")
