"""A page that answers to photos of one's own without a server: its files, what it refuses, its answers in Chromium."""

import base64
import functools
import http.server
import json
import os
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, errors
from flexivit_jax.demo import in_browser
from flexivit_jax.inference import predictor

SIZES = (2, 4)


def package_of(folder):
  """What stands for the npm package: empty files of its names."""
  (folder / "dist").mkdir(parents=True)
  for name in in_browser.SCRIPTS:
    (folder / "dist" / name).write_text("")
  return folder


def test_a_preparation_that_the_page_can_do():
  found = in_browser.steps("decode|resize(24)|value_range(-1, 1)")
  assert found["steps"] == [{"resize": [24, 24], "method": "linear"}]
  found = in_browser.steps(
    "decode(exif=True)|resize((24, 12), 'cubic')|value_range(vmin=0)|onehot(3)"
  )
  assert found["hw"] == [24, 12] and found["range"] == [0.0, 1.0]
  found = in_browser.steps(
    "decode|resize_small(28, method='cubic')|central_crop(24, half='even')|value_range"
  )
  small = {"small": 28, "rounding": "nearest", "method": "cubic"}
  assert found["steps"] == [small, {"crop": [24, 24], "half": "even"}] and found["hw"] == [24, 24]


@pytest.mark.parametrize(
  "pp",
  [
    "decode|resize_small(24)|value_range",
    "decode|resize_small(20)|central_crop(24)|value_range",
    "decode|resize(24, 'pil_lanczos')|value_range",
    "decode|resize(24)|flip_lr|value_range",
    "decode|central_crop(24)|value_range",
    "decode|value_range",
    "decode|resize(24)",
    "decode|resize(24)|value_range|value_range",
    "decode(exif=False)|resize(24)|value_range",
    "decode(bits=12)|resize(24)|value_range",
  ],
)
def test_another_preparation_is_refused(pp):
  with pytest.raises(errors.UserError, match="expected decode, resize or resize_small"):
    in_browser.steps(pp)


def test_what_is_missing_or_in_the_way_is_said(tmp_path):
  package = package_of(tmp_path / "package")
  in_browser.check(package, tmp_path / "out", "classes", 3)
  for kind, channels in (("masks", 3), ("boxes", 3), ("texts", 3), ("classes", 1)):
    with pytest.raises(errors.UserError, match="classes of their own, of images with 3 channels"):
      in_browser.check(package, tmp_path / "out", kind, channels)
  (tmp_path / "out" / "model").mkdir(parents=True)
  (tmp_path / "out" / "model" / "record.json").write_text("{}")  # an export of the user's
  with pytest.raises(errors.UserError, match="model is there already"):
    in_browser.check(package, tmp_path / "out", "classes", 3)
  (tmp_path / "out" / "index.html").write_text("")  # an earlier page
  in_browser.check(package, tmp_path / "out", "classes", 3)
  (package / "dist" / in_browser.SCRIPTS[2]).unlink()
  with pytest.raises(errors.UserError, match=f"has no dist/{in_browser.SCRIPTS[2]}.*npm pack"):
    in_browser.check(package, tmp_path / "new", "classes", 3)


# --- in Chromium ---


@pytest.fixture(scope="module")
def package(tmp_path_factory):
  """The npm package: of FLEXIVIT_ONNXRUNTIME_WEB, else fetched by npm."""
  if given := os.environ.get("FLEXIVIT_ONNXRUNTIME_WEB"):
    return Path(given)
  folder = tmp_path_factory.mktemp("npm")
  command = "npm pack --silent onnxruntime-web && tar -xf *.tgz"
  done = subprocess.run(command, shell=True, cwd=folder, capture_output=True, check=False)
  if done.returncode:
    pytest.skip("npm gives no onnxruntime-web; name its folder in FLEXIVIT_ONNXRUNTIME_WEB")
  return folder / "package"


@pytest.fixture(scope="module")
def page_and_photos(tmp_path_factory, save_small, package):
  """The folder of a page of a small model, and photos of several kinds."""
  pytest.importorskip("onnx")
  folder = tmp_path_factory.mktemp("own")
  save_small(folder, ["cat", "dog", "Löwe", "<b>", "x", "y", ""], SIZES)
  rng = np.random.default_rng(0)
  low = Image.fromarray(rng.integers(0, 256, (6, 7, 3), np.uint8))
  exif = Image.Exif()
  exif[0x0112] = 6
  photos = [folder / name for name in ("a.png", "b.jpg", "c.webp", "grey.png")]
  low.resize((70, 50), Image.Resampling.BICUBIC).save(photos[0])
  low.resize((640, 480), Image.Resampling.BICUBIC).save(photos[1], exif=exif, quality=95)
  low.resize((31, 44), Image.Resampling.BICUBIC).save(photos[2], lossless=True)
  low.convert("L").resize((30, 30)).save(photos[3])
  given = ["demo", folder / "model.npz", "--static", folder / "page", "--images", photos[0]]
  given += ["--onnxruntime_web", package]
  for _ in range(2):  # the second page replaces the first
    assert cli.main([str(one) for one in given]) in (None, 0)
  assert {path.name for path in (folder / "page").iterdir()} == {"index.html", "model", "ort"}
  return folder / "page", photos


@pytest.fixture
def address(page_and_photos):
  """Of the page, by Python's own web server."""
  handler = functools.partial(_Quiet, directory=page_and_photos[0])
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class _Quiet(http.server.SimpleHTTPRequestHandler):
  def log_message(self, *args):
    del args


@pytest.mark.slow
@pytest.mark.parametrize("hw", [(50, 70), (201, 133), (24, 40), (9, 11)])
@pytest.mark.parametrize(
  "pp",
  [
    "decode|resize((24, 18))|value_range",
    "decode|resize(24, 'area')|value_range",
    "decode|resize(24, 'cubic')|value_range",
    "decode|resize(24, 'pil_bilinear')|value_range",
    "decode|resize_small(29, method='cubic')|central_crop(24, half='even')|value_range(0, 1)",
    "decode|resize_small(29)|central_crop((24, 13))|value_range",
    "decode|resize_small(28, rounding='down', method='pil_bicubic')|central_crop(25)|value_range",
  ],
)
def test_photos_are_prepared_as_by_python_within_one_grey_level(browser, tmp_path, pp, hw):
  low = np.random.default_rng(0).integers(0, 256, (6, 7, 3), np.uint8)
  Image.fromarray(low).resize(hw[::-1], Image.Resampling.BICUBIC).save(tmp_path / "a.png")
  content = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
  page = browser.new_page()
  page.evaluate(f"DEMO = {json.dumps({'own': in_browser.steps(pp)})}")
  page.add_script_tag(content=in_browser.script())
  got = page.evaluate(
    """async (text) => {
      const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
      const {h, w, data} = prepared(await decoded(new Blob([bytes])));
      return [h, w, ...data];
    }""",
    content,
  )
  page.close()
  ours = predictor.preparer(pp, 3)(str(tmp_path / "a.png"))
  low, high = in_browser.steps(pp)["range"]
  wanted = (ours - low) / (high - low) * 255
  assert got[:2] == [*ours.shape[:2]]
  assert np.abs(np.reshape(got[2:], ours.shape) - wanted).max() < 1.01


@pytest.mark.convert
def test_photos_get_predicts_answers(
  page_and_photos, address, browser, opened, expected, top_of, wait_for
):
  """Names in the same order; a JPEG is decoded by another program, so a probability may be 0.3 points off."""
  page_folder, photos = page_and_photos
  with opened(browser, address) as (page, said):
    page.wait_for_selector("#top li")
    for photo in photos:
      page.set_input_files("#file", photo)
      for i, size in enumerate(SIZES):
        page.focus("#size")
        page.keyboard.press("Home" if i == 0 else "End")
        (wanted,) = expected(page_folder.parent / "model.npz", [photo], size)
        wait_for(lambda wanted=wanted: _alike(top_of(page), wanted))
        assert "measured" in page.inner_text("#facts")
    (page_folder / "no.jpg").write_text("no photo")
    page.set_input_files("#file", page_folder / "no.jpg")
    wait_for(lambda: "no.jpg: this browser cannot read it" in page.inner_text("#status"))
    Image.new("RGBA", (30, 30), (255, 0, 0, 9)).save(page_folder / "clear.png")
    page.set_input_files("#file", page_folder / "clear.png")
    wait_for(lambda: "clear.png: it has transparent parts" in page.inner_text("#status"))
    assert said == []


@pytest.mark.convert
def test_the_slider_may_move_while_sizes_are_computed(
  page_and_photos, address, browser, opened, expected, top_of, wait_for
):
  folder, photos = page_and_photos
  with opened(browser, address) as (page, said):
    page.wait_for_selector("#top li")
    page.focus("#size")
    page.set_input_files("#file", photos[1])
    for key in ("Home", "End") * 10:
      page.keyboard.press(key)
    (wanted,) = expected(folder.parent / "model.npz", [photos[1]], SIZES[-1])
    wait_for(lambda: _alike(top_of(page), wanted))
    assert said == []


@pytest.mark.convert
def test_from_the_disk_it_says_what_it_needs(page_and_photos, browser, opened):
  page_folder, _ = page_and_photos
  with opened(browser, (page_folder / "index.html").as_uri(), offline=True) as (page, said):
    page.wait_for_selector("#top li")
    assert "python -m http.server" in page.inner_text("#about")
    assert not page.locator("#file").is_visible()
    assert said == []


def _alike(shown, wanted):
  value = lambda text: float(text.split()[0])  # noqa: E731
  return len(shown) == len(wanted) and all(
    a == b and abs(value(p) - value(q)) <= 0.3 for (a, p), (b, q) in zip(shown, wanted, strict=True)
  )
