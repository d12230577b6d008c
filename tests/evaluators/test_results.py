"""Tables of results: the headline first, whatever the evaluator measured."""

import pytest

from flexivit_jax import errors
from flexivit_jax.evaluators import distance, results
from flexivit_jax.evaluators.metrics import Metric

COST = dict(seqhw=8, patch=3, tokens=64, gflops=1.5, ms=2.0)


def test_the_headline_comes_first_and_accuracies_are_percent():
  row = COST | dict(loss=0.25, top5=1.0, top1=0.5, n=10)
  assert results.metrics_of(row) == ["top1", "top5", "loss"]
  head, line = results.table([row]).splitlines()
  assert head.split() == ["seqhw", "patch", "tokens", "GFLOPs", "ms", "top-1", "top-5", "loss", "n"]
  assert line.split() == ["8", "3", "64", "1.5", "2", "50.00%", "100.00%", "0.25", "10"]


def test_stride_and_depth_are_columns_and_no_metrics():
  row = dict(seqhw=3, stride=3, depth=2, patch=6, tokens=9, gflops=1.5, ms=2.0, top1=0.5, n=10)
  assert results.metrics_of(row) == ["top1"]
  head, line = results.table([row]).splitlines()
  columns = ["seqhw", "stride", "depth", "patch", "tokens", "GFLOPs", "ms", "top-1", "n"]
  assert head.split() == columns
  assert line.split() == ["3", "3", "2", "6", "9", "1.5", "2", "50.00%", "10"]


def test_other_metrics_and_missing_times_have_a_place():
  row = {k: v for k, v in COST.items() if k != "ms"} | dict(kl=0.5, agree5=1.0, agree1=0.9, n=3)
  assert results.metrics_of(row, distance.METRICS) == ["agree1", "agree5", "kl"]
  head, line = results.table([row], distance.METRICS).splitlines()
  assert head.split() == ["seqhw", "patch", "tokens", "GFLOPs", "agree1", "agree5", "kl", "n"]
  assert line.split() == ["8", "3", "64", "1.5", "90.00%", "100.00%", "0.5", "3"]


def test_the_declared_headline_is_first_and_notes_are_last():
  declared = (Metric("miou", "max", "bootstrap", "%", "mIoU"), Metric("mse", "min"))
  row = COST | dict(noted=7, mse=0.25, miou=0.5, n=3, intervals={"miou": [0.4, 0.6]})
  assert results.metrics_of(row, declared) == ["miou", "mse", "noted"]
  head, line = results.table([row], declared).splitlines()
  assert head.split()[-4:] == ["mIoU", "mse", "noted", "n"]
  assert line.split()[-4:] == ["50.00%", "0.25", "7", "3"]


def test_rows_as_csv_have_all_columns_and_empty_cells(tmp_path):
  results.write_csv(tmp_path / "rows.csv", [{"a": 1, "b": None}, {"a": 2, "c": "x, y"}])
  assert (tmp_path / "rows.csv").read_text() == 'a,b,c\n1,,\n2,,"x, y"\n'


def test_rows_are_added_to_the_columns_of_a_file(tmp_path):
  file = tmp_path / "rows.csv"
  results.append_csv(file, [{"n": 1, "ms, forward": 2.5}])
  results.append_csv(file, [{"ms, forward": "3.50", "n": 2}, {"n": 3}])
  assert file.read_text() == 'n,"ms, forward"\n1,2.5\n2,3.50\n3,\n'
  with pytest.raises(
    errors.UserError, match=r"column of .*rows.csv 'ms forward'.*Did you mean 'ms, forward'"
  ):
    results.append_csv(file, [{"n": 4}, {"ms forward": 4}])
  assert file.read_text().count("\n") == 4
