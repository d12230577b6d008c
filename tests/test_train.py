"""The trainer's promises: resumes bit for bit, compiles each size once, stops at a loss that is not finite."""

import copy
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import errors, experiment, train as train_lib, weights
from flexivit_jax.devices import sharding
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

pytestmark = pytest.mark.faults

DATA = dict(name="synthetic", image_size=12, num_classes=3, num_examples=32)
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = dict(
  total_steps=6,
  log_every=2,
  input=dict(
    data=dict(DATA, split="train"), pp=f"decode|flip_lr|{PP[7:]}", batch_size=8, threads=0
  ),
  model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3), dropout=0.1),
  flexi=dict(seqhw=dict(v=(2, 3))),
  objective=dict(mixup_p=0.5),
  optim=dict(lr=1e-2, wd=1e-3, clip=1.0, schedule=dict(warmup_steps=2)),
  evals=dict(
    test=dict(
      data=dict(DATA, split="test"), pp=PP, batch_size=16, seqhw=(2, 3, 4), every_steps=3, threads=0
    )
  ),
  checkpoint=dict(every_steps=2, keep=None),
)


def changed(**values):
  return {**copy.deepcopy(CONFIG), **values}


def final(workdir):
  """All arrays of the newest checkpoint: parameters, optimizer state, step."""
  exp = experiment.from_config(CONFIG)
  checkpoints = Checkpoints(workdir / "checkpoints", keep=None)
  state = train_lib.preparation.first_state(exp, sharding.make_mesh())
  rest = {"step": state.step, "opt_state": state.opt_state}
  restored = checkpoints.restore(checkpoints.latest_step(), state.params, rest)
  checkpoints.close()
  return jax.tree.leaves(jax.device_get(restored[:2]))


def losses(workdir):
  rows = metrics_writer.read_rows(workdir / "metrics.jsonl")
  return [(r["step"], r["seqhw"], r["loss"], r["grad_norm"]) for r in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """An uninterrupted run."""
  return train_lib.train(CONFIG, tmp_path_factory.mktemp("whole"))


def same(a, b):
  assert all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@pytest.mark.full
def test_two_runs_of_one_seed_are_bit_identical(whole, tmp_path):
  again = train_lib.train(CONFIG, tmp_path)
  same(final(whole), final(again))
  assert losses(whole) == losses(again)


@pytest.mark.full
def test_another_seed_is_another_run(whole, tmp_path):
  other = train_lib.train(changed(seed=1), tmp_path)
  assert losses(whole) != losses(other)


# Before the first checkpoint, at it, after it and an evaluation, and before the last.
@pytest.mark.parametrize("stop", [3, *(pytest.param(n, marks=pytest.mark.full) for n in (1, 2, 5))])
def test_resumes_bit_for_bit_wherever_it_was_stopped(whole, tmp_path, train_until, stop, capsys):
  train_until(CONFIG, tmp_path, stop)
  train_lib.train(CONFIG, tmp_path)
  same(final(whole), final(tmp_path))
  assert losses(whole) == losses(tmp_path)
  if stop >= 2:
    assert f"resumed from {tmp_path / 'checkpoints'}" in capsys.readouterr().err


@pytest.mark.slow
def test_resumes_bit_for_bit_after_sigkill(whole, tmp_path):
  config = tmp_path / "config.py"
  config.write_text(
    f"import ml_collections\ndef get_config(arg=''): return ml_collections.ConfigDict({CONFIG!r})\n"
  )
  command = [sys.executable, "-m", "flexivit_jax.train", f"--config={config}"]
  workdir = tmp_path / "run"
  # Slower data, so that the kill comes in the middle of the run.
  slow = [*command, f"--workdir={workdir}", "--config.input.data.image_size=12"]
  process = subprocess.Popen(slow, env=os.environ, stderr=subprocess.DEVNULL)
  deadline = time.monotonic() + 120
  while not list(workdir.glob("checkpoints/[0-9]")) and time.monotonic() < deadline:
    time.sleep(0.005)
  process.send_signal(signal.SIGKILL)
  process.wait()
  done = subprocess.run(slow, env=os.environ, capture_output=True, text=True, check=True)
  assert "resumed from" in done.stderr
  fresh = [*command, f"--workdir={tmp_path / 'fresh'}"]
  subprocess.run(fresh, env=os.environ, capture_output=True, check=True)
  same(final(tmp_path / "fresh"), final(workdir))


def test_a_run_leaves_everything_that_was_promised(whole):
  rows = metrics_writer.read_rows(whole / "metrics.jsonl")
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
  assert {r["seqhw"] for r in rows} <= {2, 3}
  assert "test/top1/seqhw=4" in rows[2] and "test/top1/seqhw=4" in rows[5]
  assert sorted(int(p.name) for p in (whole / "checkpoints").glob("[0-9]*")) == [2, 4, 6]
  assert list((whole / "tb").iterdir())
  results = json.loads((whole / "eval.json").read_text())
  assert [r["seqhw"] for r in results["rows"]] == [2, 3, 4]
  assert results["trained_seqhw"] == [2, 3] and results["rows"][0]["n"] == 32
  assert json.loads((whole / "config.json").read_text())["total_steps"] == 6


def test_each_size_is_traced_once_and_before_step_one(tmp_path, monkeypatch):
  traced, drawn = [], []
  gradients, draw = train_lib.steps.gradients, train_lib.patch_schedule.draw

  def counting_gradients(state, batch, **kwargs):
    traced.append(kwargs["seqhw"])
    return gradients(state, batch, **kwargs)

  def counting_draw(flexi, *, step, **options):
    drawn.append((step, sorted(traced)))
    return draw(flexi, step=step, **options)

  monkeypatch.setattr(train_lib.steps, "gradients", counting_gradients)
  monkeypatch.setattr(train_lib.patch_schedule, "draw", counting_draw)
  train_lib.train(changed(total_steps=5), tmp_path)
  assert drawn[0] == (0, [2, 3])
  assert sorted(traced) == [2, 3]


def test_the_device_is_read_only_when_it_logs(tmp_path, monkeypatch):
  reads = []
  device_get = jax.device_get
  monkeypatch.setattr(jax, "device_get", lambda x: reads.append(1) or device_get(x))
  no_evals = changed(total_steps=8, log_every=4, evals={}, checkpoint=dict(every_steps=8))
  train_lib.train(no_evals, tmp_path)
  assert len(reads) == 2
  assert len(metrics_writer.read_rows(tmp_path / "metrics.jsonl")) == 8


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
  # The schedule is 0 at step 1 (warm-up), and makes the parameters overflow at step 2.
  bad = changed(
    optim=dict(lr=1e38, name="sgd", schedule=dict(decay_type="linear", warmup_steps=2)),
    checkpoint=dict(every_steps=1, keep=1),
    log_every=6,
    evals={},
  )
  with pytest.raises(errors.UserError, match=r"At step 2 \(seqhw=\d\) .*param_norm is (nan|inf)"):
    train_lib.train(bad, tmp_path)
  rows = metrics_writer.read_rows(tmp_path / "metrics.jsonl")
  assert [r["step"] for r in rows] == [1, 2]
  assert rows[-1]["param_norm"] is None  # NaN or infinity in strict JSON
  saved = [int(p.name) for p in (tmp_path / "checkpoints").glob("[0-9]*")]
  assert saved == [1]
  _, params = weights.load(tmp_path)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_a_checkpoint_of_another_model_is_refused_with_all_differences(whole, tmp_path):
  other = changed(total_steps=8, model=dict(CONFIG["model"], num_heads=4))
  with pytest.raises(
    errors.UserError, match=r"query/kernel: expected float32\[32,4,8\], got .*32,2,16"
  ):
    train_lib.train(other, whole, allow_config_change=True)


def test_the_checkpoint_is_the_model_for_prediction(whole):
  model, params = weights.load(whole)
  exp = experiment.from_config(CONFIG)
  assert model == exp.model
  logits, _ = model.apply({"params": params}, np.zeros((1, 12, 12, 3), np.float32), seqhw=4)
  assert logits.shape == (1, 3) and np.isfinite(logits).all()


def test_training_learns(tmp_path):
  easy = changed(total_steps=60, evals={}, objective={}, checkpoint=dict(every_steps=60))
  easy["model"]["dropout"] = 0.0
  train_lib.train(easy, tmp_path)
  loss = [r[2] for r in losses(tmp_path)]
  assert np.mean(loss[-5:]) < 0.5 * np.mean(loss[:5])


@pytest.mark.full
def test_accumulated_run_compiles_for_a_batch_that_is_divided(tmp_path):
  run = train_lib.train(changed(total_steps=2, accumulate=4, evals={}), tmp_path)
  assert len(losses(run)) == 2


def test_microbatches_that_do_not_divide_the_batch_are_refused():
  with pytest.raises(errors.UserError, match="accumulate"):
    experiment.from_config(changed(accumulate=3))


def test_sizes_that_do_not_divide_the_image_are_refused_before_anything_runs():
  with pytest.raises(errors.UserError, match="seqhw=5 does not divide"):
    experiment.from_config(changed(flexi=dict(seqhw=dict(v=(2, 5)))))


def test_a_skipped_image_is_counted(tmp_path):
  rng = np.random.default_rng(0)
  for name in "abc":
    folder = tmp_path / "images" / "train" / name
    folder.mkdir(parents=True)
    for i in range(4):
      Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).save(folder / f"{i}.png")
  (tmp_path / "images" / "train" / "b" / "2.png").write_bytes(b"not an image")
  data = dict(name="folder", data_dir=str(tmp_path / "images"), split="train")
  config = changed(input=dict(CONFIG["input"], data=data, on_error="skip"), evals={})
  train_lib.train(config, tmp_path / "run")
  rows = metrics_writer.read_rows(tmp_path / "run" / "metrics.jsonl")
  assert rows[-1]["data_errors"] == 1
  strict = changed(input=dict(CONFIG["input"], data=data), evals={})
  with pytest.raises(errors.UserError, match=r"train/b/2\.png.*'folder' split 'train'"):
    train_lib.train(strict, tmp_path / "strict")
