"""The evaluator that docs/architecture.md shows: a run and its report go by a metric that they have never heard of."""

import json
import pathlib
import re

import pytest

from flexivit_jax import cli, report, train as train_lib
from flexivit_jax.evaluators.registry import EVALUATORS, METRICS
from flexivit_jax.running import metrics_writer

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "architecture.md"
DATA = dict(name="synthetic", image_size=8, num_classes=3, num_examples=24)
PP = "decode|value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = dict(
  total_steps=6,
  input=dict(data=dict(DATA, split="train"), pp=PP, batch_size=8, threads=0),
  model=dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(4, 4), posemb_size=(2, 2)),
  flexi=dict(seqhw=dict(v=(2,))),
  optim=dict(lr=1e-2),
  evals=dict(
    test=dict(
      type="brier", data=dict(DATA, split="test"), pp=PP, batch_size=9, seqhw=(2, 4), every_steps=1,
      threads=0,
    )
  ),
  checkpoint=dict(best="test/brier@2"),
  early_stopping=dict(patience=2, min_delta=9.0),
)  # fmt: skip


@pytest.mark.full
def test_the_metric_of_the_page_is_followed_written_and_drawn(tmp_path, monkeypatch, capsys):
  (code,) = re.findall(r"```python\n(.*?METRICS.*?)```", PAGE.read_text(), re.DOTALL)
  written = {}
  exec(code, written)
  monkeypatch.setitem(EVALUATORS, "brier", written["brier"])
  monkeypatch.setitem(METRICS, "brier", written["METRICS"])
  run = train_lib.train(CONFIG, tmp_path / "run")
  said = capsys.readouterr().err
  assert "in 2 evaluations test/brier has not become better" in said
  values = [row["test/brier/seqhw=2"] for row in metrics_writer.read_rows(run / "metrics.jsonl")]
  (best,) = (run / "best").glob("[0-9]*")
  assert len(values) == 3 and values.index(min(values)) + 1 == int(best.name)
  assert f"step 1: test brier 2: {values[0]:.4g}" in said
  data = json.loads((run / "eval.json").read_text())
  assert data["metrics"] == [
    {"name": "brier", "better": "min", "interval": "bootstrap", "title": "Brier score"}
  ]
  for row in data["rows"]:
    low, high = row["intervals"]["brier"]
    assert low < row["brier"] < high
  page = report.report([run], tmp_path / "out").read_text()
  assert "<h1>Brier score at every patch size</h1>" in page and "Lower is better" in page
  assert cli.main(["report", str(run), "--metric", "top1", "--out", str(tmp_path / "no")]) == 2
