import csv
import html.parser
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import intervals
from flexivit_jax.report import (
  compared,
  page,
  pareto,
  plots,
  report,
  runs as runs_lib,
  table,
  tables,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "report_of_accuracies.html"
GRIDS = (2, 3, 4, 6, 8)
FLEXI = (0.951, 0.967, 0.975, 0.978, 0.972)
FIXED = (0.083, 0.121, 0.228, 0.431, 0.979)


def make_row(grid=8, rate=0.9, **over):
  row = {"seqhw": grid, "patch": 24 // grid, "tokens": grid**2, "gflops": 0.003 * grid**2}
  row |= {"ms": 0.1 * grid, "top1": rate, "top5": 0.99, "loss": 2 * (1 - rate), "n": 360}
  return row | over


def make_run(
  folder: Path, name="FlexiViT", top1=FLEXI, trained=GRIDS, rows=None, facts=(), **over
) -> Path:
  rows = [make_row(g, t) for g, t in zip(GRIDS, top1, strict=True)] if rows is None else rows
  data = {"name": name, "rows": rows, "trained_seqhw": trained, "dataset": "digits"} | over
  data |= {"split": "test", "step": 1500, "params": 1203978, "device": "cpu", "jax": "0.10.2"}
  data |= dict(facts)
  folder.mkdir(parents=True)
  (folder / "eval.json").write_text(json.dumps(data))
  return folder


@pytest.fixture
def demo(tmp_path):
  return [
    make_run(tmp_path / "flexi"),
    make_run(tmp_path / "fixed", "vit fixed at patch 3", FIXED, (8,)),
  ]


class Page(html.parser.HTMLParser):
  """Collects the text, ids, references and tags of a page; fails on tags that do not pair up."""

  VOID = ("meta", "br", "img", "link", "input")

  def __init__(self, path: Path):
    super().__init__()
    self.text, self.ids, self.refs, self.tags, self.open = "", [], [], [], []
    self.feed(path.read_text())
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.ids += [v for k, v in attrs if k == "id"]
    self.refs += [v for k, v in attrs if k in ("href", "src", "xlink:href")]
    self.refs += re.findall(r"url\(([^)]*)\)", " ".join(v or "" for _, v in attrs))
    if tag not in self.VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in self.VOID:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    self.text += data


def test_files_and_json(demo, tmp_path):
  path = report(demo, tmp_path / "new" / "out")
  assert path == tmp_path / "new" / "out" / "report.html"
  stems = ("accuracy_vs_patch", "accuracy_vs_gflops")
  images = {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg", "csv")}
  assert {p.name for p in path.parent.iterdir()} == {
    "report.html",
    "report.json",
    "differences.csv",
  } | images
  for stem in stems:
    assert (path.parent / f"{stem}.png").read_bytes().startswith(b"\x89PNG")
  data = json.loads((path.parent / "report.json").read_text())
  assert [run["name"] for run in data] == ["FlexiViT", "vit fixed at patch 3"]
  # Rows come out ordered by patch, with what is computed of them, otherwise exactly as they went in.
  for row in data[0]["rows"]:
    assert row.pop("interval") == list(intervals.binomial(row["top1"], 360))
    assert row.pop("dominated").keys() == {"gflops", "ms"}
  assert data[0]["rows"] == [make_row(g, t) for g, t in zip(GRIDS[::-1], FLEXI[::-1], strict=True)]


def test_each_figure_has_its_points_as_csv(demo, tmp_path):
  folder = report(demo, tmp_path).parent
  data = json.loads((folder / "report.json").read_text())
  for axis in plots.AXES:
    rows = [*csv.DictReader((folder / f"accuracy_vs_{axis}.csv").read_text().splitlines())]
    expected = [(run["name"], row) for run in data for row in run["rows"]]
    assert len(rows) == len(expected)
    for (name, row), written in zip(expected, rows, strict=True):
      assert (written["run"], float(written["top1"])) == (name, row["top1"])
      assert float(written[axis]) == row[axis]
      assert [float(written["low"]), float(written["high"])] == row["interval"]


def test_the_page_of_accuracies_is_the_one_before_other_metrics_had_pages(demo):
  loaded = runs_lib.load(demo)
  nothing = dict.fromkeys(plots.AXES, plots.Drawing("", "<svg ></svg>", b""))
  sections = compared.section(compared.compare(loaded))
  text = page.render(loaded, wide=nothing, narrow=nothing, command="made here", sections=sections)
  body = re.sub(r"<svg.*?</svg>\s*", "", text[text.index("<main>") :], flags=re.DOTALL)
  assert body == GOLDEN.read_text(encoding="utf-8")


def test_report_is_deterministic(demo, tmp_path):
  first = report(demo, tmp_path / "a", command="make demo").parent
  second = report(demo, tmp_path / "b", command="make demo").parent
  for file in first.iterdir():
    assert file.read_bytes() == (second / file.name).read_bytes(), file.name


def test_page_needs_no_other_file_and_no_network(demo, tmp_path):
  path = report(demo, tmp_path / "out")
  page = Page(path)
  assert page.tags.count("svg") == 4
  assert not {"link", "script", "img", "iframe"} & set(page.tags)
  assert "://" not in path.read_text() and "@import" not in path.read_text()
  assert len(page.ids) == len(set(page.ids))
  assert page.refs and {ref.removeprefix("#") for ref in page.refs} <= set(page.ids)


def test_page_says_what_was_measured(demo, tmp_path):
  text = Page(report(demo, tmp_path / "out", command="make demo")).text
  for part in ("digits", "step 1,500", "1,203,978 parameters", "cpu", "jax 0.10.2", "make demo"):
    assert part in text
  low, high = intervals.binomial(0.083, 360)
  assert f"{100 * low:.1f}–{100 * high:.1f}" in text


def test_colours_follow_the_scheme(demo, tmp_path):
  page = report(demo, tmp_path / "out").read_text()
  assert "prefers-color-scheme: dark" in page
  charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
  # Every colour in a chart is a variable of the page, else it would not change in the dark.
  assert re.findall(r"#[0-9a-f]{6}\b", charts) == []
  assert set(re.findall(r"var\(--(\w+)\)", charts)) <= set(re.findall(r"--(\w+): #", page))


@pytest.mark.parametrize(
  ("top1", "trained", "expected"),
  [
    (FLEXI, GRIDS, "95.1–97.8 % at all 5 patch sizes."),
    (FLEXI, None, "95.1–97.8 % at all 5 patch sizes."),
    (FIXED, (8,), "97.9 % at its own patch size (3), 8.3–43.1 % at the 4 others."),
    (
      FIXED,
      (6, 8),
      "43.1–97.9 % at the 2 patch sizes it was trained at, 8.3–22.8 % at the 3 others.",
    ),
    (
      FIXED,
      (2, 3, 4, 6),
      "8.3–43.1 % at the 4 patch sizes it was trained at, 97.9 % at the other.",
    ),
    (FIXED, (5,), "8.3–97.9 % at 5 patch sizes, trained at none of them."),
    ((0.1,) * 5, GRIDS, "10.0 % at all 5 patch sizes."),
  ],
)
def test_finding(tmp_path, top1, trained, expected):
  runs = runs_lib.load([make_run(tmp_path / "run", "X", top1, trained)])
  assert tables.finding(runs).replace("\u00a0", " ") == f"X: {expected}"


def test_finding_of_many_runs_compares_their_worst_sizes(tmp_path):
  rates = {"a": 0.2, "b": 0.5, "best": 0.7, "c": 0.1}
  runs = [make_run(tmp_path / k, k, (0.98, 0.97, v, 0.9, 0.95)) for k, v in rates.items()]
  found = tables.finding(runs_lib.load(runs)).replace("\u00a0", " ")
  assert found == (
    "best is the best of 4 runs at its worst patch size: 70.0 %; the others fall to 10.0–50.0 %."
  )


def test_table(demo):
  assert table(demo).splitlines() == [
    "top-1 in %            patch 3   patch 4   patch 6   patch 8   patch 12",
    "grid                      8x8       6x6       4x4       3x3        2x2",
    "----------------------------------------------------------------------",
    "FlexiViT                 97.2*     97.8*     97.5*     96.7*      95.1*",
    "vit fixed at patch 3     97.9*     43.1      22.8      12.1        8.3",
    "* trained at this size",
  ]


def test_best_of_each_column_is_bold(demo):
  runs = runs_lib.load(demo)
  assert re.findall(r"<b>(.*?)</b>", tables.matrix(runs)) == [
    "97.8",
    "97.5",
    "96.7",
    "95.1",
    "97.9",
  ]
  bold = re.findall(r"<b>(.*?)</b>", tables.full(runs))
  assert sorted(bold) == sorted(["97.9", "0.042", *["4", "0.0120", "0.200"] * 2])


def test_marker_is_hollow_where_not_trained(demo):
  runs = runs_lib.load(demo)
  both = plots.draw(runs, "patch", plots.WIDE).page_svg
  assert "trained size" in both and "not trained" in both
  hollow = f"fill: {plots.PAPER}; stroke: {plots.COLORS[1]}"
  assert both.count(hollow) == 4 and f"fill: {plots.COLORS[1]}; stroke: {plots.COLORS[1]}" in both
  assert "not trained" not in plots.draw(runs[:1], "patch", plots.WIDE).page_svg


@pytest.mark.parametrize("size", [plots.WIDE, plots.NARROW])
def test_every_patch_size_has_a_tick_label(tmp_path, size):
  grids = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
  rows = [make_row(g, patch=240 // g) for g in grids]
  svg = plots.draw(runs_lib.load([make_run(tmp_path / "r", rows=rows)]), "patch", size).page_svg
  words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
  assert {str(240 // g) for g in grids} <= set(words)


def test_odd_runs_are_reported(tmp_path):
  """One row, rectangles, other size sets, no ms, long names, chance level: all in one report."""
  sizes = (("2x4", "12x6"), ("4x2", "6x12"), (8, "3x3"))
  rows = [make_row(seqhw=grid, patch=patch, ms=None) for grid, patch in sizes]
  for row in rows:
    del row["top5"]
  evil = "<script>alert('x')</script> & $\\frac{$ " + "a long name " * 9
  runs = [
    make_run(tmp_path / "one", "one", rows=[make_row(8, 0.1)], trained=None),
    make_run(tmp_path / "rect", "rect", rows=rows, trained=["2x4"]),
    make_run(tmp_path / "evil", evil, (0.0, 1.0, 0.1, 0.1, 0.1), (2,)),
    *(make_run(tmp_path / f"r{i}", f"run {i}") for i in range(4)),
  ]
  path = report(runs, tmp_path / "out")
  page = Page(path)
  assert "script" not in page.tags and "12×6" in page.text
  data = json.loads((path.parent / "report.json").read_text())
  found = [(r["patch"], r["seqhw"], r["ms"], "top5" in r) for r in data[1]["rows"]]
  assert found == [(3, 8, None, False), ("6x12", "4x2", None, False), ("12x6", "2x4", None, False)]
  assert table(runs).count("\n") == 10


def test_markers_are_explained_only_where_both_are_seen(tmp_path):
  runs = runs_lib.load([make_run(tmp_path / "unknown", trained=None)])
  assert "trained" not in plots.draw(runs, "patch", plots.WIDE).page_svg


def test_a_run_may_be_its_eval_json(demo):
  assert runs_lib.load([demo[0] / "eval.json"]) == runs_lib.load([demo[0]])


def test_equal_names_get_their_folders(tmp_path):
  runs = [make_run(tmp_path / p) for p in ("a/x", "b/x", "c")] + [make_run(tmp_path / "d", "Y")]
  names = [run.name for run in runs_lib.load(runs)]
  assert len(set(names)) == 4 and names[3] == "Y"
  assert [name.endswith(f"{p})") for name, p in zip(names, ("a/x", "b/x", "/c"), strict=False)] == [
    True
  ] * 3
  assert [run.name for run in runs_lib.load(runs[1:3])] == ["FlexiViT (x)", "FlexiViT (c)"]


def test_depths_are_curves_of_their_own(tmp_path):
  rows = [make_row(g, 0.02 * k + 0.05 * g, depth=k) for g in (4, 8) for k in (10, 2)]
  deep = make_run(tmp_path / "deep", rows=rows)
  paths = [deep, make_run(tmp_path / "other", rows=rows[1:2]), make_run(tmp_path / "whole")]
  runs = runs_lib.load(paths)
  assert [(run.name, [row.patch for row in run.rows]) for run in runs] == [
    ("FlexiViT depth=2 (deep)", [3, 6]),
    ("FlexiViT depth=10", [3, 6]),
    ("FlexiViT depth=2 (other)", [6]),
    ("FlexiViT", [3, 4, 6, 8, 12]),
  ]
  assert [row.value for row in runs[0].rows] == [rows[3]["top1"], rows[1]["top1"]]
  assert runs_lib.to_json(runs[1])["rows"] == [rows[2], rows[0]]
  assert "depth" not in runs_lib.to_json(runs[3])["rows"][0]
  assert table([deep]).splitlines()[3:5] == [
    "FlexiViT depth=2      44.0*     24.0*",
    "FlexiViT depth=10     60.0*     40.0*",
  ]
  with pytest.raises(UserError, match="patch 3 at seqhw 8 and depth 2 has more than one row"):
    table([make_run(tmp_path / "twice", rows=[*rows, rows[-1]])])


def test_strides_are_told_apart_by_their_grids(tmp_path):
  rows = [make_row(g, 0.1 * g, patch=6, stride=18 // (g - 1)) for g in (2, 4, 7)]
  (run,) = runs_lib.load([make_run(tmp_path / "run", rows=rows)])
  assert [(row.patch, row.seqhw, row.value) for row in run.rows] == [
    (6, g, 0.1 * g) for g in (2, 4, 7)
  ]


# --- the Pareto front ---


def make_points(folder, name, points, **over):
  """A run whose rows are (gflops, ms, top1); made up so that each has its own grid."""
  rows = [
    make_row(grid, top1, patch=60 // grid, gflops=gflops, ms=ms)
    for grid, (gflops, ms, top1) in zip((2, 3, 4, 5, 6), points, strict=False)
  ]
  return make_run(folder / name.replace(" ", "_"), name, rows=rows, facts=over)


@pytest.fixture
def two(tmp_path):
  """Fronts by hand: in compute a 1, b 2, a 4; in time b 0.5, a 1, a 4. b's last is a's with a worse time."""
  first = [(1.0, 1.0, 0.70), (2.0, 2.0, 0.60), (4.0, 4.0, 0.90)]
  second = [(1.5, None, 0.70), (2.0, 0.5, 0.65), (2.0, 9.0, 0.80), (4.0, 5.0, 0.90)]
  return [make_points(tmp_path, "a", first), make_points(tmp_path, "b", second)]


def marks(runs, cost):
  found = pareto.dominated(runs, cost)
  return [[found.get(pareto.Point(i, r)) for r in run.rows[::-1]] for i, run in enumerate(runs)]


def test_points_that_others_dominate(two):
  runs = runs_lib.load(two)
  # Equal in both (the last of a and of b, in compute) does not dominate; equal in one, better in the other does.
  assert marks(runs, "gflops") == [[False, True, False], [True, True, False, False]]
  assert marks(runs, "ms") == [[False, True, False], [None, False, True, True]]


def test_fronts_go_from_cheap_to_dear(two, tmp_path):
  runs = runs_lib.load(two)
  found = {
    cost: [(p.run, getattr(p.row, cost), p.row.value) for p in front]
    for cost in ("gflops", "ms")
    for front in pareto.fronts(runs, cost).values()
  }
  assert found["gflops"] == [(0, 1.0, 0.7), (1, 2.0, 0.8), (0, 4.0, 0.9), (1, 4.0, 0.9)]
  assert found["ms"] == [(1, 0.5, 0.65), (0, 1.0, 0.7), (0, 4.0, 0.9)]
  path = report(two, tmp_path / "out")
  text = Page(path).text
  assert "Which run and patch size to use" in text and "by time" in text
  low, high = intervals.binomial(0.8, 360)
  assert f"2.00b154×480.0{100 * low:.1f}–{100 * high:.1f}" in text
  rows = json.loads((path.parent / "report.json").read_text())[1]["rows"][::-1]
  assert [r["dominated"] for r in rows] == [
    {"gflops": True, "ms": None}, {"gflops": True, "ms": False},
    {"gflops": False, "ms": True}, {"gflops": False, "ms": True},
  ]  # fmt: skip
  assert tables.full(runs).count(tables.DOMINATED) == 3 + 3
  assert "▼ dominated: another point" in text and "Only points of the same" not in text


def test_other_data_and_devices_are_not_compared(two, tmp_path):
  best = [(0.1, 0.1, 0.99)]
  data = make_points(tmp_path, "other data", best, dataset="mnist")
  split = make_points(tmp_path, "other split", best, split="train")
  runs = runs_lib.load([*two, data, split])
  assert marks(runs, "gflops")[:2] == [[False, True, False], [True, True, False, False]]
  assert list(pareto.groups(runs, "gflops")) == [
    ("digits", "test"), ("mnist", "test"), ("digits", "train")
  ]  # fmt: skip
  device = make_points(tmp_path, "other device", best, device="TPU v3")
  runs = runs_lib.load([*two, device])
  assert marks(runs, "ms")[:2] == [[False, True, False], [None, False, True, True]]
  assert marks(runs, "gflops") == [[True] * 3, [True] * 4, [False]]
  text = Page(report([*two, device], tmp_path / "out")).text
  assert "digits · test · TPU v3" in text and "Only points of the same data set" in text


def test_depths_and_strides_are_points_like_others(tmp_path):
  rows = [make_row(8, 0.9, depth=k, gflops=0.1 * k) for k in (2, 3)]
  rows += [make_row(4, 0.5, depth=2, gflops=0.05)]
  strided = [make_row(g, 0.1 * g, patch=6, stride=18 // (g - 1), gflops=0.1) for g in (2, 7)]
  paths = [make_run(tmp_path / "deep", rows=rows), make_run(tmp_path / "s", "S", rows=strided)]
  runs = runs_lib.load(paths)
  assert [run.name for run in runs] == ["FlexiViT depth=2", "FlexiViT depth=3", "S"]
  (front,) = pareto.fronts(runs, "gflops").values()
  assert [(p.run, p.row.seqhw, p.row.value) for p in front] == [(0, 4, 0.5), (2, 7, 0.1 * 7), (0, 8, 0.9)]  # fmt: skip
  report(paths, tmp_path / "out")


def test_small_markers_are_explained_where_there_are_some(two, tmp_path):
  for size in (plots.WIDE, plots.NARROW):
    assert "dominated" in plots.draw(runs_lib.load(two), "gflops", size).page_svg
    assert "dominated" not in plots.draw(runs_lib.load(two), "patch", size).page_svg
  alone = make_points(tmp_path, "alone", [(1.0, None, 0.5), (2.0, None, 0.6)])
  runs = runs_lib.load([alone])
  assert "dominated" not in plots.draw(runs, "gflops", plots.WIDE).page_svg
  text = Page(report([alone], tmp_path / "out")).text
  assert "dominated" not in text and "by compute" in text and "by time" not in text


def test_missing_runs_say_to_evaluate_first(tmp_path):
  with pytest.raises(UserError, match=r"nowhere does not exist; run `flexivit eval` first"):
    table([tmp_path / "nowhere"])
  with pytest.raises(UserError, match=r"eval\.json is missing; run `flexivit eval` first"):
    table([tmp_path])
  with pytest.raises(UserError, match="No run given"):
    table([])


def test_one_run_twice_is_an_error(demo):
  with pytest.raises(UserError, match="more than once"):
    table([demo[0], demo[0] / "eval.json"])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"name": "x"}', '{"rows": []}'])
def test_malformed_files_are_named(tmp_path, content):
  (tmp_path / "eval.json").write_text(content)
  with pytest.raises(UserError, match=re.escape(str(tmp_path / "eval.json"))):
    table([tmp_path])


@pytest.mark.parametrize("key", ["seqhw", "patch", "tokens", "gflops", "top1", "loss", "n"])
def test_missing_keys_are_named(tmp_path, key):
  row = make_row()
  del row[key]
  with pytest.raises(UserError, match=rf"eval\.json: the key 'rows\[1\]\.{key}' is missing"):
    table([make_run(tmp_path / "r", rows=[make_row(4), row])])


@pytest.mark.parametrize(
  ("key", "value"),
  [
    ("top1", 97.5),
    ("top1", -0.1),
    ("top1", "0.9"),
    ("top1", None),
    ("top1", True),
    ("top5", 2),
    ("ms", -1),
    ("gflops", 0),
    ("loss", []),
    ("n", 0),
    ("n", 1.5),
    ("depth", 0),
    ("depth", "2"),
    ("tokens", -1),
    ("tokens", 10**400),
    ("ms", 1e300),
    ("seqhw", 0),
    ("seqhw", "8by6"),
    ("patch", 2.5),
    ("patch", "0x3"),
  ],
)
def test_impossible_values_are_named(tmp_path, key, value):
  with pytest.raises(UserError, match=rf"rows\[0\]\.{key} is {re.escape(repr(value))}; expected"):
    table([make_run(tmp_path / "r", rows=[make_row(**{key: value})])])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_is_refused(tmp_path, value):
  with pytest.raises(UserError, match="expected finite numbers"):
    table([make_run(tmp_path / "r", rows=[make_row(loss=value)])])


def test_other_refusals(tmp_path):
  with pytest.raises(UserError, match="patch 3 at seqhw 8 has more than one row"):
    table([make_run(tmp_path / "a", rows=[make_row(), make_row()])])
  with pytest.raises(UserError, match="trained_seqhw is"):
    table([make_run(tmp_path / "b", trained=["eight"])])
  with pytest.raises(UserError, match="rows is"):
    table([make_run(tmp_path / "c", rows=[])])


def test_nothing_is_written_when_a_run_is_refused(demo, tmp_path):
  with pytest.raises(UserError):
    report([*demo, tmp_path / "nowhere"], tmp_path / "out")
  assert not (tmp_path / "out").exists()


def test_spread_keeps_labels_apart_and_below_the_top():
  levels, heights = [0.98, 0.97, 0.1, 0.975, 0.1], [0.1, 0.05, 0.1, 0.1, 0.2]
  placed = plots.spread(levels, heights)
  spans = sorted((m - h / 2, m + h / 2) for m, h in zip(placed, heights, strict=True))
  assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(spans))
  assert spans[-1][1] <= 1 + max(heights) / 2 + 1e-12
  assert plots.spread([0.5, 0.2], [0.1, 0.1]) == [0.5, 0.2]


@pytest.mark.parametrize("name", ["FlexiViT", "vit fixed at patch 3", "x" * 99, "ab " * 40])
def test_wrapped_names_fit(name):
  lines = plots.wrap(name.strip(), 13).split("\n")
  assert len(lines) <= 3 and max(map(len, lines)) <= 13


def test_names_break_between_words():
  name = "FlexiViT, distilled, from weights"
  assert plots.wrap(name, 18) == "FlexiViT,\ndistilled,\nfrom weights"


def test_importing_the_report_does_not_load_matplotlib():
  code = "import sys, flexivit_jax.report as r; print('matplotlib' in sys.modules)"
  run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
  assert run.stdout.strip() == "False"


def make_cascade(gflops=0.1, top1=0.976, **over):
  row = {
    "cascade": "4>8",
    "sizes": [4, 8],
    "signal": "margin",
    "risk": "lost",
    "alpha": 0.02,
    "delta": 0.05,
  }
  row |= {"shares": [0.75, 0.25], "gflops": gflops, "ms": 0.5, "top1": top1, "n": 360}
  return row | over


def test_cascades_are_a_series_beside_single_sizes(demo, tmp_path):
  cascades = [
    make_cascade(),
    make_cascade(0.15, 0.979, ms=0.7, sizes=[2, 4, 8], shares=[0.5, 0.25, 0.25]),
  ]
  demo[0] = make_run(tmp_path / "with", cascades=cascades)
  out = tmp_path / "out"
  text = Page(report(demo, out)).text
  assert "4→8" in text and "margin, lost 0.02" in text
  runs = runs_lib.load(demo)
  assert [row.tokens for row in runs[0].cascades] == [32, 28]
  fronts = pareto.fronts(runs, "gflops")
  on_front = [p.row.cascade for p in next(iter(fronts.values())) if p.row.cascade]
  assert on_front == ["4→8", "2→4→8"]
  assert pareto.dominated(runs, "gflops")[pareto.Point(0, runs[0].rows[0])]  # the finest size
  data = json.loads((out / "report.json").read_text())
  assert data[0]["cascades"][0]["dominated"] == {"gflops": False, "ms": False}
  drawn = [plots.draw(runs, axis, plots.WIDE).page_svg for axis in plots.AXES]
  assert ["cascades" in svg for svg in drawn] == [False, True]
  assert "FlexiViT, cascade 4>8 by margin, lost 0.02: 97.6 %, 0.100 GFLOPs, 0.500 ms" in table(demo)


def test_another_metric_has_no_cascades(tmp_path):
  run = make_run(tmp_path / "run", cascades=[make_cascade()])
  assert runs_lib.read(run, "loss").cascades == ()


@pytest.mark.parametrize(
  ("over", "key"),
  [
    ({"sizes": [4, "x"]}, "sizes"),
    ({"shares": [1.0]}, "shares"),
    ({"shares": [1.0, 2.0]}, "shares"),
    ({"top1": 1.2}, "top1"),
    ({"ms": None}, "ms"),
    ({"signal": 3}, "signal"),
  ],
)
def test_a_damaged_cascade_is_refused(tmp_path, over, key):
  with pytest.raises(UserError, match=rf"cascades\[0\]\.{key}"):
    runs_lib.read(make_run(tmp_path / "run", cascades=[make_cascade(**over)]))
