"""A step that was not finite is dumped, and made again bit for bit; one that may be skipped changes nothing."""

import copy
import json

import pytest

from flexivit_jax import cli, train as train_lib
from flexivit_jax.analyses import bad_step
from flexivit_jax.errors import UserError
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints

pytestmark = pytest.mark.faults

DATA = dict(name="synthetic", image_size=12, num_classes=3, num_examples=32)
CONFIG = dict(
  total_steps=6,
  log_every=4,
  input=dict(
    data=dict(DATA, split="train"),
    pp="decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=8,
    threads=0,
  ),
  model=dict(variant="mu", patch_size=(4, 4), posemb_size=(3, 3)),
  flexi=dict(seqhw=dict(v=(2, 3))),
  # The schedule is 0 at the first step (warm-up), then the parameters grow without bounds.
  optim=dict(lr=1e38, name="sgd", schedule=dict(decay_type="linear", warmup_steps=2)),
  checkpoint=dict(every_steps=1, keep=1),
)


def changed(**values):
  return {**copy.deepcopy(CONFIG), **values}


def test_the_bad_step_is_dumped_and_replayed(tmp_path, capsys):
  with pytest.raises(UserError, match=r"flexivit replay .*bad_step.json"):
    train_lib.train(CONFIG, tmp_path)
  dump = json.loads((tmp_path / "bad_step.json").read_text())
  assert dump["step"] == 2 and dump["measured"]["param_norm"] in ("inf", "nan")
  assert len(dump["ids"]) == 8 and set(dump["size"]) == {"seqhw"}
  capsys.readouterr()
  assert cli.main(["replay", str(tmp_path / "bad_step.json")]) == 0
  said = capsys.readouterr().out
  assert "from step 1 to step 2" in said
  assert "8 examples, those of the dump" in said and "as in the dump" in said
  assert "parameter before the step: 0 of" in said
  assert (
    "parameter after it: 0 of 24 not finite; the largest finite value is 1" in said
  )  # squared, it is too large


def test_a_step_of_several_batches_is_replayed_with_the_scale_of_its_update(tmp_path, capsys):
  with pytest.raises(UserError, match="At step 2"):
    train_lib.train(changed(token_budget={}), tmp_path)
  assert cli.main(["replay", str(tmp_path / "bad_step.json")]) == 0
  assert "as in the dump" in capsys.readouterr().out


def test_without_a_checkpoint_the_run_is_made_again_from_its_start(tmp_path, capsys):
  bad = changed(checkpoint=dict(every_steps=6))
  with pytest.raises(UserError, match="At step 2"):
    train_lib.train(bad, tmp_path)
  assert cli.main(["replay", str(tmp_path / "bad_step.json")]) == 0
  assert "from step 0 to step 2" in capsys.readouterr().out


def test_a_dump_and_a_save_that_cannot_be_written_do_not_hide_the_step(tmp_path, monkeypatch):
  def failing(self):
    raise UserError("The checkpoint in X cannot be written.")

  (tmp_path / "bad_step.json.tmp").symlink_to("/dev/full")
  monkeypatch.setattr(Checkpoints, "wait", failing)
  said = r"At step 2 .*param_norm is .*stopped. The checkpoint in X .*{}.* Lower optim.lr"
  with pytest.raises(
    UserError, match=said.format("bad_step.json cannot be written: No space left")
  ):
    train_lib.train(CONFIG, tmp_path)


def test_a_dump_that_is_none_is_an_error(tmp_path):
  (tmp_path / "bad_step.json").write_text("{}")
  with pytest.raises(UserError, match="cannot be replayed"):
    bad_step.look(tmp_path / "bad_step.json")


def test_steps_that_explode_are_skipped_and_counted(tmp_path):
  run = train_lib.train(changed(optim=dict(lr=0.1), skip_above=1e-6), tmp_path / "all")
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  assert [row["skipped"] for row in rows] == [1] * 6
  assert len({row["param_norm"] for row in rows}) == 1  # nothing has changed
  with pytest.raises(UserError, match=r"At step 3 .*3 steps in a row are skipped"):
    train_lib.train(changed(optim=dict(lr=0.1), skip_above=1e-6, skip_limit=3), tmp_path / "limit")


@pytest.mark.parametrize("text", ["null", "[]", "3", "hello", '{"step": 1}'])
def test_a_damaged_dump_is_one_line(tmp_path, text):
  (tmp_path / "bad_step.json").write_text(text)
  (tmp_path / "config.json").write_text("{}")
  with pytest.raises(UserError):
    bad_step.look(tmp_path / "bad_step.json")
