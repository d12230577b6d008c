"""Every published number says what it is, of which kind, and where it comes from."""

import collections
import csv
import pathlib

import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.paper import published

FOLDER = pathlib.Path(published.__file__).parent


@pytest.mark.parametrize("name", published.names())
def test_each_row_is_whole(name):
  rows = published.read(name)
  keys = [(r.model, r.setting, r.dataset, r.metric, r.patch, r.kind) for r in rows]
  assert rows and len(set(keys)) == len(keys)
  for row in rows:
    assert row.error is None or row.error > 0
    if row.unit == "%":
      assert 0 < row.value < 100


def test_what_is_known_of_the_paper_is_there():
  assert published.names() == [
    "bwconrad", "curriculum", "fig1", "fig2", "fig3", "fig7", "fig8", "fig9-12", "intro", "timm"
  ]  # fmt: skip
  fig2 = published.read("fig2")
  curve = {
    r.patch: r.value
    for r in fig2
    if (r.model, r.setting, r.kind) == ("FlexiViT-L", "i1k, 1200 epochs", "digitised")
  }
  assert sorted(curve) == [8, 10, 12, 15, 16, 20, 24, 30, 40, 48] and curve[48] == 77.75
  marks = [(r.setting[:6], r.metric, r.value) for r in fig2 if r.model == "EfficientNetV2"]
  assert ("mark 2", "latency", 3.2) in marks and ("mark 2", "top1", 85.1) in marks
  assert [r.value for r in fig2 if "its own grid" in r.setting] == [83.43, 85.07, 85.93]
  (gain,) = published.read("fig9-12")
  assert (gain.patch, gain.value, gain.error) == (None, 2.5, 0.5)  # 2 to 3


def rounding(value):
  """Half a unit of the last digit that was printed."""
  return 0.5 * 10.0 ** -len(f"{value:g}".partition(".")[2])


def same(one, other):
  """Whether two numbers are of one quantity; "i1k" alone, as in figure 1, is of the longest training."""
  keys = ("model", "dataset", "metric", "patch")
  setting = "i1k, 1200 epochs" if other.setting == "i1k" else other.setting
  return all(getattr(one, k) == getattr(other, k) for k in keys) and (
    one.metric == "latency" or one.setting == setting
  )


def known_twice():
  """Numbers that were read off, each with one of the same quantity that was not."""
  every = [(name, r) for name in published.names() for r in published.read(name)]
  read_off = [r for _, r in every if r.kind == "digitised"]
  rest = [(name, r) for name, r in every if r.kind != "digitised"]
  return [(name, one, other) for one in read_off for name, other in rest if same(one, other)]


def test_what_was_read_off_agrees_with_what_is_printed():
  found = known_twice()
  assert collections.Counter(name for name, _, _ in found) == {"fig1": 4, "fig2": 2, "timm": 9}
  for _, read_off, other in found:
    assert abs(read_off.value - other.value) <= read_off.error + rounding(other.value), other


def test_what_was_read_coarsely_says_so():
  """A percentage read as a whole number is off by a half or more; any by the 0.2 that checks against it allow."""
  with (FOLDER / "fig2.csv").open(newline="") as file:
    for row in csv.DictReader(file):
      if row["kind"] == "digitised" and row["unit"] == "%":
        assert float(row["error"]) >= (0.2 if "." in row["value"] else 0.5), row


def test_mistakes_are_named(tmp_path, monkeypatch):
  good = dict(
    zip(
      published.COLUMNS,
      ["m", "s", "d", "top1", "8", "80", "%", "", "printed", "paper", ""],
      strict=True,
    )
  )
  for change, message in (
    ({"source": ""}, "x.csv:2 lacks source"),
    ({"kind": "remembered"}, "kind.*remembered.*known: digitised"),
    ({"kind": "digitised"}, "digitised numbers have an error"),
    ({"error": "0.1"}, "digitised numbers have an error, printed ones have none"),
    ({"value": "eighty"}, "x.csv:2: could not convert"),
  ):
    with (tmp_path / "x.csv").open("w", newline="") as file:
      writer = csv.DictWriter(file, published.COLUMNS)
      writer.writeheader()
      writer.writerow(good | change)
    monkeypatch.setattr(published.resources, "files", lambda _: tmp_path)
    with pytest.raises(UserError, match=message):
      published.read("x")
  monkeypatch.undo()
  with pytest.raises(UserError, match=r"published item 'fig9'.*fig8"):
    published.read("fig9")


def test_the_files_are_part_of_the_package(repository):
  setup = (repository / "setup.cfg").read_text()
  assert (
    "flexivit_jax.paper.published = *.csv" in setup and "  flexivit_jax.paper.published\n" in setup
  )
