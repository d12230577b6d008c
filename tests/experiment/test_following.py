"""What a run does about a metric: the best checkpoint beside the newest, early stopping, wherever it is cut short."""

import copy
import json

import jax
import numpy as np
import pytest

from flexivit_jax import errors, train as train_lib, weights
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.evaluators.registry import EVALUATORS, METRICS
from flexivit_jax.experiment import monitor
from flexivit_jax.experiment.evaluating import Evaluating
from flexivit_jax.running import metrics_writer
from flexivit_jax.running.checkpoint import Checkpoints, load_params
from flexivit_jax.weights import verification

DATA = dict(name="synthetic", image_size=8, num_classes=3, num_examples=24)
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = dict(
  total_steps=10,
  log_every=2,
  input=dict(data=dict(DATA, split="train"), pp=PP, batch_size=8, threads=0),
  model=dict(
    width=8,
    depth=1,
    mlp_dim=16,
    num_heads=2,
    pool_type="gap",
    patch_size=(4, 4),
    posemb_size=(2, 2),
  ),
  flexi=dict(seqhw=dict(v=(2,))),
  optim=dict(lr=1e-2, schedule=dict(warmup_steps=2)),
  evals=dict(
    test=dict(
      data=dict(DATA, split="test"), pp=PP, batch_size=24, seqhw=(2, 4), every_steps=2, threads=0
    )
  ),
  checkpoint=dict(every_steps=3, keep=None, best="test/loss"),
)
# Nothing is ever better by so much: evaluations at steps 2, 4 and 6, then it ends.
EARLY = dict(early_stopping=dict(metric="test/loss", patience=2, min_delta=100.0))


def changed(**values):
  return {**copy.deepcopy(CONFIG), **values}


def arrays(workdir):
  """Of the newest checkpoint and of the best; with their steps."""
  found = {}
  for name in ("checkpoints", "best"):
    params, record = load_params(workdir / name)
    leaves = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    found[name] = record["step"], leaves, record.get("best")
  return found


def same(a, b):
  for name, (step, leaves, best) in arrays(a).items():
    other_step, other_leaves, other_best = arrays(b)[name]
    assert (step, best) == (other_step, other_best), name
    assert all(np.array_equal(leaves[k], other_leaves[k]) for k in leaves | other_leaves)


def rows(workdir):
  return metrics_writer.read_rows(workdir / "metrics.jsonl")


def losses(workdir):
  return {
    r["step"]: (r["test/loss/seqhw=2"] + r["test/loss/seqhw=4"]) / 2
    for r in rows(workdir)
    if "test/loss/seqhw=2" in r
  }


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
  """A run that ends early, never interrupted."""
  return train_lib.train(changed(**EARLY), tmp_path_factory.mktemp("ended") / "run")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run that does not end early."""
  return train_lib.train(changed(), tmp_path_factory.mktemp("whole") / "run")


def test_the_best_checkpoint_is_that_of_the_best_value_in_the_record_of_metrics(whole):
  found = losses(whole)
  assert sorted(found) == [2, 4, 6, 8, 10]
  step, _, best = arrays(whole)["best"]
  assert step == min(found, key=lambda step: found[step])
  assert best == {"metric": "test/loss", "mode": "min", "value": pytest.approx(found[step])}
  assert [p.name for p in (whole / "best").glob("[0-9]*")] == [str(step)]
  assert arrays(whole)["checkpoints"][0] == 10


def test_the_best_checkpoint_is_read_like_any_other_and_verified(whole, tmp_path):
  _, leaves, _ = arrays(whole)["best"]
  step = arrays(whole)["best"][0]
  for path in (whole / "best", whole / "best" / str(step)):
    model, params = weights.load(path)
    assert model.num_classes == 3
    found = {jax.tree_util.keystr(k): v for k, v in jax.tree_util.tree_leaves_with_path(params)}
    assert all(np.array_equal(leaves[k], found[k]) for k in leaves | found)
    assert [name for name, _ in verification.verify(path)] == [str(whole / "best" / str(step))]
  checked = verification.verify(whole)
  assert [name for name, _ in checked][-1].endswith(f"best/{step}") and len(checked) == 5
  assert {problem for _, problem in checked} == {None}


def test_a_run_ends_early_and_says_why(ended, capsys):
  assert sorted(losses(ended)) == [2, 4, 6]
  assert rows(ended)[-1]["step"] == 6
  assert sorted(int(p.name) for p in (ended / "checkpoints").glob("[0-9]*")) == [3, 6]
  written = json.loads((ended / "eval.json").read_text())
  assert written["step"] == 6
  assert written["metrics"] == [metric.stated() for metric in METRICS["classification"][:3]]
  before = {p: p.stat().st_mtime_ns for p in (ended / "checkpoints").rglob("*")}
  train_lib.train(changed(**EARLY), ended)  # the same command does not go on
  said = capsys.readouterr().err
  assert "early stopping after step 6: in 2 evaluations test/loss has not become better" in said
  assert "compiled train" not in said
  assert before == {p: p.stat().st_mtime_ns for p in (ended / "checkpoints").rglob("*")}


def test_up_to_where_it_ends_a_run_is_the_one_that_does_not_end_early(ended, whole):
  keys = ("loss", "grad_norm", "schedule")
  short, long = ([[r[k] for k in keys] for r in rows(run)] for run in (ended, whole))
  assert short == long[:6]


@pytest.mark.slow
def test_more_patience_goes_on_to_the_end_that_it_would_have_had(whole, tmp_path):
  train_lib.train(changed(**EARLY), tmp_path)
  train_lib.train(changed(early_stopping=9), tmp_path)
  same(whole, tmp_path)


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stop", [3, *(pytest.param(n, marks=SLOW) for n in (1, 2, 4, 5))])
def test_a_run_that_is_cut_short_ends_at_the_same_step_with_the_same_best(
  ended, tmp_path, train_until, stop
):
  train_until(changed(**EARLY), tmp_path, stop)
  train_lib.train(changed(**EARLY), tmp_path)
  same(ended, tmp_path)
  assert losses(ended) == losses(tmp_path)


class CutError(Exception):
  """Stands for a kill."""


@pytest.mark.slow
@pytest.mark.parametrize("step", [4, 6])
@pytest.mark.parametrize(
  "where", ["before the best", "before the row", "before the checkpoint", "after it"]
)
def test_so_does_one_that_is_killed_around_an_evaluation(ended, tmp_path, monkeypatch, step, where):
  target, name, before = {
    "before the best": (Evaluating, "_see", True),
    "before the row": (Evaluating, "_write_rows", True),
    "before the checkpoint": (train_lib, "_save", True),
    "after it": (train_lib, "_save", False),
  }[where]
  original = getattr(target, name)

  def killed(*args, **kwargs):
    steps = [a for a in args if type(a) is int] + [
      int(a.step) for a in args if hasattr(a, "params")
    ]
    if before and step in steps:
      raise CutError
    found = original(*args, **kwargs)
    if step in steps:
      raise CutError
    return found

  config = changed(**EARLY)
  config["checkpoint"] = dict(CONFIG["checkpoint"], every_steps=2)
  with monkeypatch.context() as patch:
    patch.setattr(target, name, killed)
    with pytest.raises(CutError):
      train_lib.train(config, tmp_path)
  train_lib.train(config, tmp_path)
  same(ended, tmp_path)
  assert losses(ended) == losses(tmp_path)


@pytest.mark.slow
def test_with_the_other_mode_the_worst_is_kept(tmp_path):
  config = changed(total_steps=4, evals=dict(test=dict(CONFIG["evals"]["test"], every_steps=1)))
  config["checkpoint"] = dict(every_steps=4, best="test/loss@4", best_mode="max")
  train_lib.train(config, tmp_path)
  worst = max(rows(tmp_path), key=lambda row: row["test/loss/seqhw=4"])
  assert arrays(tmp_path)["best"][0] == worst["step"]


@pytest.mark.slow
def test_another_metric_begins_anew_and_a_new_run_too(tmp_path, train_until, capsys):
  config = changed(total_steps=6)
  train_until(config, tmp_path, 5)
  assert arrays(tmp_path)["best"][0] == 4
  other = changed(total_steps=6, checkpoint=dict(CONFIG["checkpoint"], best="test/top1@2"))
  train_lib.train(other, tmp_path)
  assert "is the best by test/loss; the next evaluation of test/top1@2" in capsys.readouterr().err
  assert arrays(tmp_path)["best"][2]["metric"] == "test/top1@2"
  (tmp_path / "checkpoints").rename(tmp_path / "elsewhere")
  train_until(config, tmp_path, 1)
  assert "of an earlier run, and deleted" in capsys.readouterr().err
  assert not list((tmp_path / "best").glob("[0-9]*"))


@pytest.mark.slow
def test_a_best_checkpoint_that_is_damaged_is_named_and_replaced(tmp_path, train_until, capsys):
  config = changed(total_steps=6)
  train_until(config, tmp_path, 3)
  file = max((tmp_path / "best" / "2").rglob("*"), key=lambda p: p.stat().st_size)
  file.write_bytes(file.read_bytes()[:-1])
  assert [bool(problem) for _, problem in verification.verify(tmp_path)][-1:] == [True]
  train_lib.train(config, tmp_path)
  assert "The next evaluation takes its place." in capsys.readouterr().err
  checkpoints = Checkpoints(tmp_path / "best", read_only=True)
  checkpoints.verify(checkpoints.latest_step())
  checkpoints.close()


@pytest.mark.slow
def test_an_evaluation_that_is_gone_by_runs_as_often_as_checkpoints_are_saved(tmp_path):
  config = changed(total_steps=4, early_stopping=3, checkpoint=dict(every_steps=2))
  del config["evals"]["test"]["every_steps"]
  train_lib.train(config, tmp_path)
  assert sorted(losses(tmp_path)) == [2, 4]


# --- what a config may say ---

EVALS = {
  "test": dict(seqhw=(2, (4, 6), (8, 8)), depth=(1, 3)),
  "probe": dict(type="knn", seqhw=(2,)),
  "far": dict(type="distance", stride=(5, 10)),
  "old": dict(type="teacher"),
}


@pytest.mark.parametrize(
  ("text", "expected"),
  [
    ("test/top1", ("test", "top1", None, "max")),
    ("test/loss@2", ("test", "loss", "2", "min")),
    ("test/top5@4x6 depth=3", ("test", "top5", "4x6 depth=3", "max")),
    ("test/top5@8", ("test", "top5", "8", "max")),
    ("probe/top1", ("probe", "top1", None, "max")),
    ("far/kl@stride=10", ("far", "kl", "stride=10", "min")),
  ],
)
def test_metrics(text, expected):
  metric = monitor.parse("here", text, EVALS)
  assert tuple(metric) == expected and str(metric) == text


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("top1", r"here is 'top1'; expected EVALUATOR/METRIC.* e.g. 'test/top1'"),
    ("test/top1/seqhw=2", r"expected EVALUATOR/METRIC or EVALUATOR/METRIC@SIZE"),
    ("tst/top1", r"Unknown evaluator in here 'tst'.*Did you mean 'test'"),
    ("test/top2", r"Unknown metric in here 'top2'; known: loss, top1, top5"),
    ("test/top1_macro", r"needs per_class=True"),
    ("test/top1@3", r"Unknown size in here '3'; known: 2"),
    ("test/top1@", r"Unknown size in here ''"),
    ("far/top1", r"Unknown metric in here 'top1'; known: agree1, agree5, kl.*needs labels=True"),
    ("old/top1", r"training changes nothing that a 'teacher' measures"),
  ],
)
def test_bad_metrics(text, message):
  with pytest.raises(errors.UserError, match=message):
    monitor.parse("here", text, EVALS)


def test_a_metric_without_an_evaluation_is_an_error():
  with pytest.raises(errors.UserError, match=r"here needs an evaluation"):
    monitor.parse("here", "test/top1", {})


@pytest.mark.parametrize("given", [dict(patience=0), dict(min_delta=-1.0), dict(min_delta=np.inf)])
def test_bad_early_stopping(given):
  with pytest.raises(errors.UserError, match=r"expected 1 or more, and a finite number >= 0"):
    monitor.early_stopping(evals=EVALS, **given)


def test_early_stopping_counts_the_evaluations_since_the_last_that_was_better_by_so_much():
  early = monitor.early_stopping(evals=EVALS, metric="test/top1@2", patience=2, min_delta=0.1)
  state, ends = {}, []
  for step, value in enumerate([0.5, 0.55, 0.7, float("nan"), 0.79, 0.81]):
    found = [{"seqhw": 2, "top1": value}, {"seqhw": 3, "top1": 9.0}]
    state = early.update(state, step, found)
    ends.append(early.ends(state))
  assert ends == [False, False, False, False, True, False]
  other = early._replace(metric=early.metric._replace(name="top5"))
  assert not other.ends({**state, "bad": 9}) and early.ends({**state, "bad": 9})


def test_an_evaluator_may_declare_any_metric_and_which_way_is_better(monkeypatch):
  declared = (Metric("mse", "min"), Metric("miou", "max", "bootstrap", "%"))
  monkeypatch.setitem(METRICS, "knn", declared)
  assert monitor.parse("here", "probe/mse", EVALS).mode == "min"
  assert monitor.parse("here", "probe/miou@2", EVALS).mode == "max"
  early = monitor.early_stopping(evals={"test": EVALS["probe"]}, patience=1)
  assert str(early.metric) == "test/mse"
  state = early.update({}, 1, [{"seqhw": 2, "mse": 0.5}])
  state = early.update(state, 2, [{"seqhw": 2, "mse": 0.25}])
  assert state["best_step"] == 2 and not early.ends(state)
  assert early.ends(early.update(state, 3, [{"seqhw": 2, "mse": 0.375}]))


def test_every_evaluator_says_its_metrics(whole):
  assert METRICS.keys() == EVALUATORS.keys()
  found = {key.split("/")[1] for row in rows(whole) for key in row if key.startswith("test/")}
  assert found == set(monitor.metrics_of({}))
