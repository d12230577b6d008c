"""Both forms of the demo page in headless Chromium: by keyboard, without a network, and by axe's rules."""

import contextlib
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.inference import predictions

pytestmark = pytest.mark.slow
SIZES = (2, 3, 4, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_small):
  folder = tmp_path_factory.mktemp("browser")
  save_small(
    folder, ["cat", "dog", "Löwe", "<b>bold</b>", "a, b", "x", "y"], SIZES, width=32, depth=2
  )
  rng = np.random.default_rng(0)
  Image.fromarray(rng.integers(0, 256, (40, 52, 3), np.uint8)).save(folder / "photo.png")
  return folder


@pytest.fixture(scope="module")
def browser():
  sync_api = pytest.importorskip("playwright.sync_api")
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    pytest.skip("no Chromium is installed")
  with sync_api.sync_playwright() as started:
    yield started.chromium.launch(executable_path=path, args=["--no-sandbox"])


@contextlib.contextmanager
def opened(browser, url, **options):
  """A page that may reach its own address alone, and what it says to the console."""
  context = browser.new_context(bypass_csp=True, **options)  # waiting for a condition needs eval

  def own_alone(route):
    known = route.request.url.startswith((url, "data:", "blob:"))
    route.continue_() if known else route.abort()

  context.route("**", own_alone)
  page, said = context.new_page(), []
  page.on("console", lambda message: said.append(message.text))
  page.on("pageerror", lambda error: said.append(str(error)))
  page.goto(url)
  yield page, said
  context.close()


def wait_for(what, seconds=10.0):
  """Waits until `what()` is true."""
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end, f"not within {seconds} s"
    time.sleep(0.02)


@pytest.fixture(scope="module")
def server(folder):
  command = [sys.executable, "-m", "flexivit_jax", "serve", str(folder / "model.npz"), "--demo"]
  process = subprocess.Popen(
    [*command, "--port=0", "--batches=1"], stdout=subprocess.PIPE, text=True
  )
  url = process.stdout.readline().split()[-1] + "/"
  for _ in range(600):
    with contextlib.suppress(OSError):
      if urllib.request.urlopen(url + "ready").status == 200:
        break
    time.sleep(0.1)
  yield url
  process.terminate()
  assert process.wait(30) == 0
  process.stdout.close()


def top_of(page):
  names = page.locator("#top .name").all_inner_texts()
  return [*zip(names, page.locator("#top .p").all_inner_texts(), strict=True)]


def expected(folder, size):
  (row,) = predictions.predict([folder / "photo.png"], folder / "model.npz", size, batch_size=1)
  return [(name, f"{100 * p:.1f} %") for _, name, p in row.top]


def at_each_size_by_keyboard(page, folder):
  page.focus("#size")
  page.keyboard.press("Home")
  for at, size in enumerate(SIZES):
    if at:
      page.keyboard.press("ArrowRight")
    wanted = expected(folder, size)
    wait_for(lambda wanted=wanted: top_of(page) == wanted)
    said = page.get_attribute("#size", "aria-valuetext")
    assert said == f"patches of {24 // size} pixels, {size * size} tokens"
    assert "measured" in page.inner_text("#facts")


def test_the_file_shows_what_predict_says_by_keyboard(folder, browser):
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
  with opened(browser, url) as (page, said):
    page.wait_for_selector("#top li")
    at_each_size_by_keyboard(page, folder)
    assert not page.locator("#file").is_visible()
    page.check("#relevance")
    assert said == []


def test_a_dropped_photo_gets_predicts_answers(folder, browser, server):
  with opened(browser, server) as (page, said):
    page.set_input_files("#file", folder / "photo.png")
    page.wait_for_selector("#top li")
    at_each_size_by_keyboard(page, folder)
    page.check("#relevance")
    page.fill("#budget", "100000")
    page.click("#choose")
    wait_for(lambda: "Patches of 4 px" in page.inner_text("#chosen"))
    assert said == []
    (folder / "no.jpg").write_text("no image")
    page.set_input_files("#file", folder / "no.jpg")
    wait_for(lambda: page.inner_text("#status").startswith("no.jpg: not an image"))


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_and_names_by_axe_at_two_widths(folder, browser, server, width, scheme):
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


def test_without_javascript_it_says_what_it_needs(browser, server):
  with opened(browser, server, java_script_enabled=False) as (page, _):
    assert "This page needs JavaScript" in page.inner_text("body")


def test_a_server_that_is_gone_is_said(folder, browser, server):
  with opened(browser, server) as (page, _):
    page.route("**/prepared", lambda route: route.abort())
    page.set_input_files("#file", folder / "photo.png")
    wait_for(lambda: "does not answer; trying again" in page.inner_text("#status"))
    page.unroute("**/prepared")
    page.wait_for_selector("#top li", timeout=20000)
