"""Both forms of the demo page in headless Chromium: by keyboard, without a network, and by axe's rules."""

import csv
import subprocess
import sys

import pytest

from flexivit_jax import cli

pytestmark = pytest.mark.slow
SIZES = (2, 3, 4, 6)


@pytest.fixture
def at_each_size_by_keyboard(folder, expected, top_of, wait_for):
  """Moves the slider through its stops; at each the page must say what `predict` says of photo.png."""

  def check(page):
    page.focus("#size")
    page.keyboard.press("Home")
    for at, size in enumerate(SIZES):
      if at:
        page.keyboard.press("ArrowRight")
      (wanted,) = expected(folder / "model.npz", [folder / "photo.png"], size)
      wait_for(lambda wanted=wanted: top_of(page) == wanted)
      said = page.get_attribute("#size", "aria-valuetext")
      assert said == f"patches of {24 // size} pixels, {size * size} tokens"
      assert "measured" in page.inner_text("#facts")

  return check


def test_the_file_shows_what_predict_says_by_keyboard(
  folder, browser, opened, at_each_size_by_keyboard
):
  given = [
    "demo",
    folder / "model.npz",
    "--static",
    folder / "page",
    "--images",
    folder / "photo.png",
  ]
  assert cli.main([str(one) for one in given]) in (None, 0)
  url = (folder / "page" / "index.html").as_uri()
  with opened(browser, url, offline=True) as (page, said):
    page.wait_for_selector("#top li")
    at_each_size_by_keyboard(page)
    assert not page.locator("#file").is_visible()
    page.check("#relevance")
    assert said == []


def test_a_chosen_photo_gets_predicts_answers(
  folder, browser, server, opened, wait_for, at_each_size_by_keyboard
):
  with opened(browser, server) as (page, said):
    page.set_input_files("#file", folder / "photo.png")
    page.wait_for_selector("#top li")
    at_each_size_by_keyboard(page)
    page.check("#relevance")
    page.fill("#budget", "100000")
    page.click("#choose")
    wait_for(lambda: "Patches of 4 px" in page.inner_text("#chosen"))
    assert said == []
    (folder / "no.jpg").write_text("no image")
    page.set_input_files("#file", folder / "no.jpg")
    wait_for(lambda: page.inner_text("#status").startswith("no.jpg: not an image"))
    (folder / "no.jpg").write_bytes((folder / "photo.png").read_bytes())
    page.set_input_files("#file", folder / "no.jpg")  # the same file again
    wait_for(lambda: page.locator("#photos button").count() == 2)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_by_axe_at_two_widths(folder, browser, server, opened, width, scheme):
  axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
  with opened(browser, server, viewport={"width": width, "height": 900}, color_scheme=scheme) as (
    page,
    _,
  ):
    page.set_input_files("#file", folder / "photo.png")
    page.wait_for_selector("#top li")
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_without_javascript_it_says_what_it_needs(browser, server, opened):
  with opened(browser, server, java_script_enabled=False) as (page, _):
    assert "This page needs JavaScript" in page.inner_text("body")


def test_the_time_from_the_slider_to_the_answer_is_measured(
  folder, tmp_path, repository, server, browser
):
  del browser  # only whether there is one
  tool, out = repository / "tools" / "bench" / "page.py", tmp_path / "page.csv"
  given = [server, folder / "photo.png", "--repeats=2", f"--csv={out}"]
  subprocess.run([sys.executable, tool, *given], check=True, timeout=120)  # its own event loop
  with out.open() as file:
    rows = [{name: int(value) for name, value in row.items()} for row in csv.DictReader(file)]
  assert [row["tokens"] for row in rows] == [size * size for size in SIZES]
  assert all(0 < row["cold_ms"] <= row["cold_worst_ms"] < 10_000 for row in rows)
  assert all(0 < row["warm_ms"] <= row["warm_worst_ms"] for row in rows)


def test_our_resize_in_javascript_is_within_one_grey_level(folder, tmp_path, repository, browser):
  del browser  # only whether there is one
  tool, out = repository / "tools" / "bench" / "canvas.py", tmp_path / "canvas.csv"
  given = [folder / "model.npz", folder / "photo.png", "--image_size=24", "--seqhw=2,6"]
  subprocess.run([sys.executable, tool, *given, f"--csv={out}"], check=True, timeout=120)
  with out.open() as file:
    rows = [row for row in csv.DictReader(file) if row["way"] == "bilinear"]
  assert [row["seqhw"] for row in rows] == ["2", "6"]
  assert {row["largest_difference"] for row in rows} <= {"0", "1"}
