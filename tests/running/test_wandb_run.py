"""Weights & Biases as one more place for metrics, with a stand-in for its package."""

import copy
import sys
import types

import pytest

from flexivit_jax import errors, experiment, train as train_lib
from flexivit_jax.running import metrics_writer, wandb_run

DATA = dict(name="synthetic", image_size=8, num_classes=3, num_examples=16)
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = dict(
  total_steps=4,
  log_every=1,
  input=dict(data=dict(DATA, split="train"), pp=PP, batch_size=8, threads=0),
  model=dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2)),
  flexi=dict(seqhw=dict(v=(2,))),
  optim=dict(lr=1e-2),
  checkpoint=dict(every_steps=2),
  wandb=dict(project="flowers", tags=("a", "b")),
)


class Server:
  """Runs by their id: what was logged at which step; refuses steps that go back, as wandb does."""

  def __init__(self):
    self.runs, self.inits, self.broken, self.finished = {}, [], set(), 0

  def module(self):
    return types.SimpleNamespace(init=self.init)

  def init(self, **given):
    if "init" in self.broken:
      raise ConnectionError("no network")
    self.inits.append(given)
    rows = self.runs.setdefault(given["id"], {})
    server = self

    class Run:
      step = max(rows, default=-1) + 1

      def log(self, values, step):
        if "log" in server.broken:
          raise ConnectionError("no network")
        assert step >= max(rows, default=0)
        rows.setdefault(step, {}).update(values)

      def finish(self):
        server.finished += 1

    return Run()


@pytest.fixture
def server(monkeypatch):
  found = Server()
  monkeypatch.setitem(sys.modules, "wandb", found.module())
  return found


def settings(**changes):
  return {**copy.deepcopy(CONFIG), **changes}


def test_a_run_that_is_resumed_goes_on_with_the_same_id_and_each_row_is_there_once(
  server, tmp_path, train_until
):
  train_until(settings(), tmp_path / "run", 3)  # step 3 is logged and lost
  train_lib.train(settings(), tmp_path / "run")
  first, second = server.inits
  assert first["id"] == second["id"] and second["resume"] == "allow"
  assert first["project"] == "flowers" and first["name"] == "run" and first["tags"] == ["a", "b"]
  (rows,) = server.runs.values()
  written = metrics_writer.read_rows(tmp_path / "run" / "metrics.jsonl")
  assert [row["step"] for row in written] == sorted(rows) == [1, 2, 3, 4]
  assert [row["loss"] for row in written] == [rows[step]["loss"] for step in sorted(rows)]
  assert server.finished == 2
  assert not any(isinstance(v, str) for row in rows.values() for v in row.values())


def test_a_run_that_begins_anew_is_another_run_there(server, tmp_path):
  for begun in (False, False, True):
    wandb_run.open_run(tmp_path, {}, begun)
  ids = [given["id"] for given in server.inits]
  assert ids[0] != ids[1] == ids[2]


@pytest.mark.parametrize("broken", ["init", "log"])
def test_without_network_training_goes_on_and_it_is_said_once(server, tmp_path, caplog, broken):
  server.broken.add(broken)
  opening = {"Weights & Biases": lambda: wandb_run.open_run(tmp_path, {}, False)}
  with metrics_writer.MetricsWriter(tmp_path, tensorboard=False, others=opening) as writer:
    for step in range(3):
      writer.write(step, {"loss": 1.0})
  assert [r["step"] for r in metrics_writer.read_rows(tmp_path / "metrics.jsonl")] == [0, 1, 2]
  said = [r.getMessage() for r in caplog.records]
  assert (
    len(said) == 1 and "Weights & Biases: ConnectionError: no network. Training goes on" in said[0]
  )


@pytest.mark.parametrize("folder", [False, True])
def test_without_the_package_one_line_says_so_before_anything_is_made(
  monkeypatch, tmp_path, folder
):
  # A folder of that name, which earlier runs leave behind, is a package without content.
  monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb") if folder else None)
  with pytest.raises(errors.UserError, match=r"(?s)^[^\n]*`pip install wandb`[^\n]*$"):
    train_lib.train(settings(), tmp_path / "run")
  assert not (tmp_path / "run").exists()
  experiment.from_config(settings())  # `flexivit plan` and others need no such package


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (dict(wandb=dict(projct="x")), r"'wandb.projct'.*Did you mean 'wandb.project'"),
    (dict(wandb=dict(tags="x")), r"wandb.tags is 'x'; expected a tuple"),
    (dict(wandb=dict(mode="onlin")), r"wandb.mode is 'onlin'; expected 'online' or 'offline'"),
    (dict(wandb=True), r"wandb is True; expected a section of keys and values"),
    (dict(logger="wandb"), r"Unknown config key 'logger'.*give wandb=dict\(project=...\)"),
    (dict(class_weights="balanced"), r"'class_weights'\. Give objective\.class_weights"),
    (dict(evals=dict(t=dict(type="confusion"))), r"a confusion matrix is per_class=True"),
  ],
)
def test_what_a_config_gets_wrong_is_named(changes, message):
  wrong = settings(**changes)
  with pytest.raises(errors.UserError, match=message):
    experiment.from_config(wrong)
