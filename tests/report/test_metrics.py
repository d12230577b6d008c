"""Reports of metrics that the report has never heard of: the eval.json says how to read them."""

import html
import json
import re

import pytest

from flexivit_jax import cli, report
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import intervals
from flexivit_jax.evaluators.metrics import Metric
from flexivit_jax.report import pareto, plots, runs as runs_lib, tables

MIOU = Metric("miou", "max", "bootstrap", "%", "mIoU")
KL = Metric("kl", "min", "bootstrap", "nats", title="KL divergence from the teacher")
MSE = Metric("mse", "min")
GRIDS = (2, 4, 8)


def make_run(folder, declared, name="ours", trained=GRIDS, values=None, **over):
  """Three sizes; `values` of each metric from the coarsest on."""
  values = values or {
    "miou": (0.31, 0.42, 0.467),
    "kl": (2.1, 0.6, 0.03),
    "mse": (3e-5, 2e-5, 1e-5),
  }
  rows = []
  for i, grid in enumerate(GRIDS):
    row = {"seqhw": grid, "patch": 48 // grid, "tokens": grid**2, "gflops": 0.1 * grid**2, "n": 50}
    row |= {metric.name: values[metric.name][i] for metric in declared}
    boot = [metric.name for metric in declared if metric.interval == "bootstrap"]
    row |= {"intervals": {name: [0.9 * row[name], 1.25 * row[name]] for name in boot}}
    rows.append(row | over.pop("row", {}))
  stated = [metric.stated() for metric in declared]
  data = {"name": name, "metrics": stated, "trained_seqhw": trained, "rows": rows} | over
  folder.mkdir(parents=True)
  (folder / "eval.json").write_text(json.dumps(data))
  return folder


def words(page):
  """The text outside of figures and styles."""
  page = re.sub(r"<(svg|style).*?</\1>", "", page, flags=re.DOTALL)
  return html.unescape(re.sub(r"<[^>]*>", " ", page)).replace("\u00a0", " ")


def test_a_page_names_its_metric_everywhere(tmp_path):
  folder = make_run(tmp_path / "run", (MIOU, KL))
  page = report.report([folder], tmp_path / "out").read_text()
  text = words(page)
  assert "top-1" not in text.lower() and "accura" not in text.lower()
  for part in ("mIoU at every patch size", "mIoU against compute", "mIoU (%) at each patch size"):
    assert part in text
  assert "ours: 31.0–46.7 % at all 3 patch sizes." in text and "Lower is better" not in text
  assert "95 % bootstrap intervals of mIoU over the n images." in text
  assert "each line is the best point of all runs" in text
  assert "27.9–38.8" in text  # as the row has it
  assert 'aria-label="mIoU against GFLOPs"' in page and ">mIoU (%)<" in page
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert {"miou_vs_patch.png", "miou_vs_gflops.svg", "report.json"} <= names
  (data,) = json.loads((tmp_path / "out" / "report.json").read_text())
  assert data["metric"] == MIOU.stated()
  assert data["rows"][0]["interval"] == pytest.approx([0.9 * 0.467, 1.25 * 0.467])
  assert (data["rows"][0]["miou"], data["rows"][0]["kl"]) == (0.467, 0.03)


def test_lower_is_better_in_every_part_of_a_page(tmp_path):
  low = {"kl": (0.3, 0.08, 0.03)}
  paths = [make_run(tmp_path / "a", (KL,)), make_run(tmp_path / "b", (KL,), "low", (8,), low)]
  loaded = runs_lib.load(paths)
  assert tables.finding(loaded).replace("\u00a0", " ") == (
    "ours: 0.030–2.100 nats at all 3 patch sizes;"
    " low: 0.030 nats at its own patch size (6), 0.080–0.300 nats at the 2 others. Lower is better."
  )
  assert tables.text(loaded).splitlines()[0].startswith("kl in nats (lower is better)  patch 6")
  assert re.findall(r"<b>(.*?)</b>", tables.matrix(loaded)) == ["0.030", "0.030", "0.080", "0.300"]
  tints = re.findall(r'tint:(\d+)%">(?:<i.*?</i>)?(?:<b>)?([\d.]+)', tables.matrix(loaded))
  assert tints[0] == ("100", "0.030") and tints[2] == ("0", "2.100")
  beaten = pareto.dominated(loaded, "gflops")
  assert [beaten[pareto.Point(0, row)] for row in loaded[0].rows] == [False, True, True]
  assert not any(beaten[pareto.Point(1, row)] for row in loaded[1].rows)
  (front,) = pareto.fronts(loaded, "gflops").values()
  assert [(p.run, p.row.value) for p in front] == [(1, 0.3), (1, 0.08), (0, 0.03), (1, 0.03)]
  svg = plots.draw(loaded, "patch", plots.WIDE).page_svg
  assert "KL divergence from the teacher (nats), lower is better" in svg
  assert ">kl (nats), lower is better<" in plots.draw(loaded, "patch", plots.NARROW).page_svg


def test_of_many_runs_the_best_has_the_lowest_worst_value(tmp_path):
  worst = {"a": 0.4, "best": 0.1, "b": 0.2, "c": 0.8}
  runs = [
    make_run(tmp_path / k, (KL,), k, values={"kl": (v, 0.01, 0.01)}) for k, v in worst.items()
  ]
  assert tables.finding(runs_lib.load(runs)).replace("\u00a0", " ") == (
    "best is the best of 4 runs at its worst patch size: 0.100 nats; the others rise to"
    " 0.200–0.800 nats. Lower is better."
  )


def test_a_metric_without_intervals_has_no_column_and_no_band(tmp_path):
  loaded = runs_lib.load([make_run(tmp_path / "run", (MSE,))])
  assert "interval" not in tables.full(loaded) + tables.front(loaded, "gflops")
  assert [row.interval for row in loaded[0].rows] == [None] * 3
  assert "<td>1e-05</td>" in tables.front(loaded, "gflops")
  plots.draw(loaded, "gflops", plots.NARROW)


def test_a_fraction_of_images_has_the_binomial_interval(tmp_path):
  rate = Metric("recall", "max", "binomial", "%")
  (run,) = runs_lib.load([make_run(tmp_path / "run", (rate,), values={"recall": (0.2, 0.5, 0.8)})])
  assert [row.interval for row in run.rows] == [intervals.binomial(p, 50) for p in (0.8, 0.5, 0.2)]


def test_runs_of_different_headlines_are_refused_unless_a_metric_is_named(tmp_path, capsys):
  a, b = make_run(tmp_path / "a", (MIOU, KL)), make_run(tmp_path / "b", (KL, MIOU), "theirs")
  message = (
    r"different headline metrics.*ours: miou in % \(higher is better\); theirs: kl in nats \(lower is better\)\."
    r" .*give --metric with one that all of them have: miou, kl"
  )
  with pytest.raises(UserError, match=message):
    report.table([a, b])
  assert report.table([a, b], "kl").startswith("kl in nats")
  with pytest.raises(UserError, match=r"Make a report of each\.$"):
    report.table([a, make_run(tmp_path / "c", (MSE,))])
  with pytest.raises(UserError, match="different metrics of one name"):
    report.table([a, make_run(tmp_path / "d", (MIOU._replace(better="min"),))])
  with pytest.raises(UserError, match=r"Unknown metric of .*a/eval.json 'mse'; known: kl, miou"):
    report.table([a], "mse")
  assert cli.main(["report", str(a), str(b), "--out", str(tmp_path / "out")]) == 2
  assert "--metric" in capsys.readouterr().err


def test_an_old_file_of_accuracies_has_other_metrics_too(tmp_path):
  row = dict(seqhw=4, patch=8, tokens=16, gflops=1.0, top1=0.5, loss=1.25, top5=None, n=10)
  (tmp_path / "eval.json").write_text(json.dumps({"name": "old", "rows": [row]}))
  (run,) = runs_lib.load([tmp_path])
  assert (run.metric.name, [m.name for m in run.metrics]) == ("top1", ["top1", "loss"])
  (loss,) = runs_lib.load([tmp_path], "loss")
  assert (loss.rows[0].value, loss.rows[0].interval) == (1.25, None)
  assert tables.finding([loss]) == "old: 1.250\u00a0nats at patch size 8. Lower is better."
  with pytest.raises(UserError, match="known: loss, top1"):
    runs_lib.load([tmp_path], "top5")


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"metrics": []}, r"metrics is \[\]; expected one metric or more"),
    ({"metrics": [KL.stated()] * 2}, r"each with a name of its own"),
    ({"metrics": ["kl"]}, r"metrics\[0\] is 'kl'; expected an object"),
    ({"metrics": [{"better": "min"}]}, r"metrics\[0\].name is ''; expected a text"),
    ({"metrics": [{"name": "kl"}]}, r"metrics\[0\].better is None; expected 'max' or 'min'"),
    ({"metrics": [KL.stated() | {"interval": "normal"}]}, r"interval is 'normal'; expected"),
    ({"metrics": [KL.stated() | {"interval": "binomial"}]}, r"expected '%': a binomial"),
    ({"metrics": [KL.stated() | {"unit": "%"}]}, r"rows\[0\].kl is 2.1; expected"),
    ({"metrics": [MSE.stated()]}, r"'rows\[0\].mse' is missing"),
    ({"row": {"intervals": {"kl": [1.0]}}}, r"rows\[0\].intervals.kl is \[1.0\]; expected two"),
    ({"row": {"intervals": {"kl": [2.0, 1.0]}}}, r"expected the low end first"),
    ({"row": {"intervals": {"kl": [None, 1.0]}}}, r"intervals.kl is None; expected a number"),
    ({"row": {"intervals": 3}}, r"rows\[0\].intervals is 3; expected a dict"),
  ],
)
def test_what_a_file_says_of_its_metrics_is_checked(tmp_path, change, message):
  with pytest.raises(UserError, match=message):
    runs_lib.read(make_run(tmp_path / "run", (KL,), **change))


@pytest.mark.parametrize(
  ("values", "low", "high"),
  [
    ([0.03, 2.1], 0.0, 2.5),
    ([90.0, 100.0], 90.0, 100.0),
    ([0.00031, 0.00002], 0.0, 0.0004),
    ([-0.8, -0.1], -0.8, 0.0),
    ([-3.0, 4.0], -4.0, 4.0),
    ([0.0, 0.0], 0.0, 0.2),
    ([5.0], 4.0, 6.0),
    ([31_000.0, 2_100_000.0], 0.0, 2_500_000.0),
  ],
)
def test_the_axis_of_numbers_holds_them_with_few_round_ticks(values, low, high):
  first, last, ticks = plots.of_numbers(values)
  assert (first, last) == (pytest.approx(low), pytest.approx(high))
  assert first <= min(values) + 1e-9 and max(values) <= last + 1e-9
  assert 2 <= len(ticks) <= 9 and len(set(ticks.values())) == len(ticks)
  assert max(map(len, ticks.values())) <= 7


def test_counts_have_no_decimals():
  count = Metric("dropped", "min", title="boxes")
  assert [tables.number(count, value) for value in (0, 28, 1234, 0.5)] == [
    "0",
    "28",
    "1,234",
    "0.500",
  ]
