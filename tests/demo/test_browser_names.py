"""The demo page of two towers in headless Chromium: names that are typed, by answers that the test gives."""

import json
import urllib.parse

import numpy as np
import pytest

from flexivit_jax.demo import content

pytestmark = pytest.mark.slow
URL = "http://demo.test/"


@pytest.fixture
def page(browser, save_small, tmp_path):
  """A page whose server says the first name at the size 2, and the last one at 4."""
  from flexivit_jax.inference import predictor

  loaded = predictor.load(save_small(tmp_path))
  said = content.about(loaded.model, "m", (24, 24, 3), [2, 4])
  said |= {"server": True, "names": ["a dog", "a cat"], "most_bytes": 2**20}

  def answer(route):
    query = dict(urllib.parse.parse_qsl(urllib.parse.urlparse(route.request.url).query))
    names = [one.strip() for one in query["names"].split(",")]
    number = 0 if query["seqhw"] == "2" else len(names) - 1
    top = [{"class": number, "name": names[number], "probability": 0.75}]
    route.fulfill(body=json.dumps({"top": top, "ms": 1.0}), content_type="application/json")

  with browser.new_context(bypass_csp=True) as context:
    page = context.new_page()
    page.route(URL, lambda route: route.fulfill(body=content.html(said), content_type="text/html"))
    page.route(URL + "predict**", answer)
    png = content.picture_files.png(np.zeros((24, 24, 3)))
    page.route(URL + "prepared", lambda route: route.fulfill(body=png, content_type="image/png"))
    page.goto(URL)
    yield page


def test_the_table_and_the_photo_say_the_class_of_the_names_that_are_typed(page, wait_for):
  def classes():
    return page.locator("#all tr td:nth-child(5)").all_inner_texts()

  page.set_input_files("#file", {"name": "p.png", "mimeType": "image/png", "buffer": b"p"})
  wait_for(lambda: classes() == ["a dog", "a cat"])
  assert page.inner_text("#disagree") == "Other than the finest size: 12 px."
  assert page.get_attribute("#canvas", "aria-label").endswith(": a cat")
  page.fill("#names", "a bird")
  page.keyboard.press("Tab")
  wait_for(lambda: classes() == ["a bird", "a bird"])
  assert page.inner_text("#disagree") == "All sizes agree."
