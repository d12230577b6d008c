"""`flexivit verify` looks at everything that a run or an export holds."""

import functools
import shutil

import jax
import numpy as np
import pytest

from flexivit_jax import cli, train as train_lib, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import folders, verification
from flexivit_jax.weights.export import onnx as onnx_folder, saved_model

pytestmark = pytest.mark.faults

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
  assert verification.verify(run / "checkpoints" / "2") == [(steps[1], None)]
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
  assert verification.verify(out) == [(str(out), None)]
  flip(out)
  ((name, problem),) = verification.verify(out)
  assert name == str(out) and problem
  _, params = weights.load(run)
  file = tmp_path / "weights.npz"
  np.savez(file, **{k: np.asarray(v) for k, v in trees.flatten(jax.device_get(params)).items()})
  assert verification.verify(file) == [(str(file), None)]
  flip(file)
  assert verification.verify(file)[0][1]


def damages(path, rng, flips):
  """Yields what is done to a file, with it in that state; it is as it was afterwards."""
  content = path.read_bytes()
  for bit in rng.integers(8 * len(content), size=flips):
    flipped = bytearray(content)
    flipped[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(flipped)
    yield f"bit {bit}"
  path.write_bytes(content[: rng.integers(len(content))])
  yield "truncated"
  path.unlink()
  yield "deleted"
  path.write_bytes(content)


def written(to, run, out):
  command = ["convert", "--to", to, "--seqhw=2"] if to in ("timm", "transformers") else None
  command = command or ["export", "--to", to, "--seqhw=2,3"]
  given = [str(run), str(out), "--image_size=12", "--no-verify"]
  assert cli.main([command[0], *given, *command[1:]]) == 0
  return out


@pytest.mark.parametrize("kind", ["npz", "zip"])
def test_each_damage_to_a_written_file_is_found(run, tmp_path, kind):
  """Also in what no part of an archive is made of: dates and the like, most of which lie at its end."""
  out, rng = tmp_path / f"out.{kind}", np.random.default_rng(0)
  command = ["convert"] if kind == "npz" else ["export", "--seqhw=2", "--image_size=12"]
  assert cli.main([command[0], str(run), str(out), "--no-verify", *command[1:]]) == 0
  content = out.read_bytes()
  anywhere, at_the_end = (
    rng.integers(len(content), size=40),
    len(content) - rng.integers(2000, size=80),
  )
  for position in (*anywhere, *(at_the_end - 1)):
    flipped = bytearray(content)
    flipped[position] ^= 1 << rng.integers(8)
    out.write_bytes(flipped)
    assert verification.verify(out)[0][1], position
  for length in rng.integers(len(content), size=10):
    out.write_bytes(content[:length])
    assert verification.verify(out)[0][1], length
  out.write_bytes(content)
  assert verification.verify(out) == [(str(out), None)]


LOADERS = dict(
  timm=weights.load,
  transformers=weights.load,
  onnx=onnx_folder.read_record,
  saved_model=functools.partial(folders.read_export, format_=saved_model.FORMAT),
)


@pytest.mark.parametrize(
  "to",
  [
    "timm",
    "transformers",
    *(pytest.param(n, marks=pytest.mark.convert) for n in ("onnx", "saved_model")),
  ],
)
def test_each_damage_to_each_file_of_a_written_folder_is_found(run, tmp_path, to, capsys):
  """Those of 30 bits, a truncation and a deletion a file, by `verify`, which names the file, and by loading."""
  out, rng = written(to, run, tmp_path / "out"), np.random.default_rng(0)
  assert cli.main(["verify", str(out)]) == 0
  assert capsys.readouterr().out.endswith(f"{out}: as it was written\n")
  every = [p for p in out.rglob("*") if p.is_file()]
  assert len(every) >= 4
  for path in every:
    if not path.stat().st_size:
      continue
    for what in damages(path, rng, flips=30):
      ((_, problem),) = verification.verify(out)
      assert problem is not None and path.name in str(problem), (path, what)
      with pytest.raises(UserError, match=path.name):
        LOADERS[to](out)
  LOADERS[to](out)
  (out / "README.md").write_text("of the Hub's")
  assert cli.main(["verify", str(out)]) == 2
  assert "README.md was not there when it was written" in capsys.readouterr().out
  LOADERS[to](out)


@pytest.mark.parametrize("to", ["timm", "transformers"])
def test_a_folder_of_others_can_be_loaded_and_not_compared(run, tmp_path, to, capsys):
  out = written(to, run, tmp_path / "out")
  for name in (folders.MANIFEST, folders.RECORD):
    (out / name).unlink()
  *given, record = weights.load_with_record(out)
  assert folders.unknown(out) in record["notes"]
  weights.save_npz(tmp_path / "again.npz", *given, record)
  assert verification.verify(tmp_path / "again.npz")[0][1] is None
  shutil.copy(out / "model.safetensors", tmp_path)
  for path in (out, tmp_path / "model.safetensors"):
    if path == out or to == "timm":
      capsys.readouterr()
      assert cli.main(["verify", str(path)]) == 2
      said = capsys.readouterr()
      assert f"No checksums were written beside {path.name}" in said.out
      assert said.err == f"flexivit: error: Nothing to compare with: {path}.\n"


def test_what_is_not_there_is_said(tmp_path):
  with pytest.raises(UserError, match="does not exist"):
    verification.verify(tmp_path / "none")


def test_a_run_before_its_first_save_is_not_called_damaged(tmp_path):
  (tmp_path / "checkpoints" / "1.orbax-checkpoint-tmp").mkdir(parents=True)
  with pytest.raises(UserError, match="has no checkpoint that is complete"):
    verification.verify(tmp_path)
