"""Every published number says what it is, of which kind, and where it comes from."""

import csv
import pathlib

import pytest

from flexivit_jax import published
from flexivit_jax.errors import UserError

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
  assert published.names() == ["bwconrad", "fig1", "fig2", "fig3", "fig8", "intro", "timm"]
  fig2 = published.read("fig2")
  curve = {
    r.patch: r.value
    for r in fig2
    if (r.model, r.setting, r.kind) == ("FlexiViT-L", "i1k, 1200 epochs", "digitised")
  }
  assert sorted(curve) == [8, 10, 12, 15, 16, 20, 24, 30, 40, 48] and curve[48] == 77.75
  # The digitised row at patch 16 agrees with what timm measured there, within what both may be off by.
  timm = {
    (r.model, r.setting): r.value
    for r in published.read("timm")
    if r.dataset == "imagenet2012/validation" and r.metric == "top1"
  }
  found = {
    (r.model, r.setting): r
    for r in fig2
    if r.patch == 16 and r.metric == "top1" and r.model.startswith("Flexi")
  }
  assert len(timm) == 9
  for key, value in timm.items():
    assert abs(found[key].value - value) <= found[key].error + 0.2


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
    ({"error": "0.1"}, "digitised numbers have an error, and only they"),
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


def test_the_files_are_part_of_the_package():
  setup = (FOLDER.parent.parent / "setup.cfg").read_text()
  assert "flexivit_jax.published = *.csv" in setup and "  flexivit_jax.published\n" in setup
