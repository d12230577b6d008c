"""Pages of masks and boxes in headless Chromium: at each size what predict says, by keyboard and by axe's rules."""

import collections

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import boxes, masks, predictor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["masks", "boxes"])
def shown(request, tmp_path_factory, save_kind):
  """(kind, its page, what predict says at the sizes 3 and 6)."""
  folder, kind = tmp_path_factory.mktemp("shown"), request.param
  low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  Image.fromarray(low).resize((48, 32), Image.Resampling.BICUBIC).save(folder / "photo.png")
  file = save_kind(folder, kind)
  given = ["demo", file, "--static", folder / "page", "--images", folder / "photo.png"]
  assert cli.main([str(one) for one in given]) in (None, 0)
  answers_of = masks.answers if kind == "masks" else boxes.answers
  inputs = [Input(str(folder / "photo.png"))]
  ((_, answers),) = answers_of(predictor.load(file, whole=True), inputs, [3, 6], batch_size=1)
  return kind, (folder / "page" / "index.html").as_uri(), answers


def listed(kind, answer):
  """The names and numbers of the list."""
  if kind == "masks":
    return [(row.name, f"{100 * row.share:.1f} %") for row in answer.rows]
  rest = [(f"and {len(answer.found) - 10} more",)] if len(answer.found) > 10 else []
  return [*((one.name, f"{100 * one.score:.1f} %") for one in answer.found[:10]), *rest]


def differs(kind, one, finest):
  """Whether a size says something else than the finest."""
  if kind == "masks":
    return np.mean(one.mask == finest.mask) < 0.9
  return collections.Counter(d.number for d in one.found) != collections.Counter(
    d.number for d in finest.found
  )


def pixels(page):
  """The photo as it is drawn."""
  return page.evaluate("document.getElementById('canvas').toDataURL()")


def test_each_size_shows_what_predict_says(shown, browser, opened, top_of, wait_for):
  kind, url, answers = shown
  with opened(browser, url, offline=True) as (page, said):
    page.wait_for_selector("#top li")
    page.focus("#size")
    for key, answer in zip(("Home", "End"), answers, strict=True):
      page.keyboard.press(key)
      wait_for(lambda answer=answer: top_of(page) == listed(kind, answer))
      row = page.locator("#all tr[aria-current=true] td").all_inner_texts()
      name, value = listed(kind, answer)[0]
      assert row[3] == f"{name}, {value}"
      if kind == "boxes":
        assert row[4] == str(len(answer.found))
        assert f"{len(answer.found)} boxes" in page.get_attribute("#canvas", "aria-label")
      else:
        assert row[4] == f"{100 * np.mean(answer.mask == answers[-1].mask):.1f} %"
    assert page.inner_text("#disagree").endswith(": 8 px.") == differs(kind, *answers)
    assert said == []


def test_what_is_drawn_can_be_taken_away(shown, browser, opened, wait_for):
  _, url, _ = shown
  with opened(browser, url, offline=True) as (page, _):
    page.wait_for_selector("#top li")
    wait_for(lambda: ": " in page.get_attribute("#canvas", "aria-label"))
    before = pixels(page)
    page.uncheck("#drawn")
    wait_for(lambda: pixels(page) != before)
    page.check("#drawn")
    wait_for(lambda: pixels(page) == before)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_by_axe_at_two_widths(shown, browser, opened, width, scheme):
  axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
  given = dict(viewport={"width": width, "height": 900}, color_scheme=scheme)
  with opened(browser, shown[1], **given) as (page, _):
    page.wait_for_selector("#top li")
    found = axe.run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


SLOW = """
asks = [];
const quick = fetch;
fetch = async (path, given) => {
  asks.push(path);
  await new Promise((done) => setTimeout(done, 500));
  return quick(path, given);
};
null
"""


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_a_photo_given_to_a_server_gets_what_predict_says(
  kind, tmp_path, save_kind, serving, browser, opened, top_of, wait_for
):
  save_kind(tmp_path, kind).rename(tmp_path / "model.npz")
  low = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
  Image.fromarray(low).resize((48, 32), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
  answers_of = masks.answers if kind == "masks" else boxes.answers
  loaded, inputs = (
    predictor.load(tmp_path / "model.npz", whole=True),
    [Input(str(tmp_path / "photo.png"))],
  )
  ((_, answers),) = answers_of(loaded, inputs, [3, 6], batch_size=1)
  with serving(tmp_path) as (url, _), opened(browser, url) as (page, said):
    page.evaluate(SLOW)
    page.set_input_files("#file", tmp_path / "photo.png")
    # The slider asks for a size while the page, which asks for all, waits for another.
    wait_for(lambda: page.evaluate("asks.some((path) => path.startsWith('predict'))"))
    page.focus("#size")
    page.keyboard.press("Home")
    page.wait_for_selector("#top li")
    for key, answer in zip(("Home", "End"), answers, strict=True):
      page.keyboard.press(key)
      wait_for(lambda answer=answer: top_of(page) == listed(kind, answer))
      value = (
        str(len(answer.found))
        if kind == "boxes"
        else f"{100 * np.mean(answer.mask == answers[-1].mask):.1f} %"
      )
      wait_for(
        lambda value=value: page.inner_text("#all tr[aria-current=true] td:last-child") == value
      )
    assert page.inner_text("#disagree").endswith(": 8 px.") == differs(kind, *answers)
    asked = page.evaluate("asks.filter((path) => path.startsWith('predict'))")
    assert sorted(asked) == ["predict?seqhw=3", "predict?seqhw=6"]  # each once
    assert said == []
