"""What people drop on the page: every file gets `predict`'s answers, or words on the page that say what is wrong."""

import base64
import socket

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, weights

pytestmark = pytest.mark.slow
SIZES = (2, 3, 4, 6)


@pytest.fixture(scope="module")
def photos(folder):
  """Photos of all kinds that can be read."""
  rng = np.random.default_rng(1)

  def noise(mode="RGB", seed=0):
    depth = {"RGB": 3, "RGBA": 4, "CMYK": 4}[mode]
    return Image.fromarray(rng.integers(0, 256, (33, 47 + seed, depth), np.uint8), mode)

  exif = Image.Exif()
  exif[0x0112] = 6
  Image.fromarray(rng.integers(0, 2**16, (33, 47), np.uint16)).save(folder / "16_bits.png")
  noise("CMYK").save(folder / "cmyk.jpg")
  noise("RGBA").save(folder / "transparent.png")
  noise().save(folder / "turned.jpg", exif=exif)
  noise().save(folder / "animated.gif", save_all=True, append_images=[noise(seed=1)])
  Image.new("RGB", (1, 1), (9, 200, 70)).save(folder / "one_pixel.png")
  Image.new("RGB", (10000, 5000), (200, 9, 70)).save(folder / "50_megapixels.png")
  noise().save(folder / "a <b>photo ךלב.webp")
  names = (
    "16_bits.png",
    "cmyk.jpg",
    "transparent.png",
    "turned.jpg",
    "animated.gif",
    "one_pixel.png",
  )
  return [folder / name for name in (*names, "50_megapixels.png", "a <b>photo ךלב.webp")]


@pytest.fixture(scope="module")
def drop():
  """Drops files or folders on the canvas, as a hand does: (page, paths)."""

  def dropped(page, paths):
    box = page.locator("#canvas").bounding_box()
    tools = page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
      tools.send(
        "Input.dispatchDragEvent",
        {"type": kind, "x": box["x"] + 9, "y": box["y"] + 9, "data": data},
      )

  return dropped


def table_of(page):
  """The most likely class and its percentage at each size; None while one is missing."""
  rows = page.locator("#all tr").all_inner_texts()
  cells = [tuple(row.split("\t")[-2:]) for row in rows]
  return cells if all(all(cell) for cell in cells) else None


def test_photos_of_all_kinds_get_predicts_answers_at_each_size(
  folder, photos, browser, server, opened, drop, expected, wait_for
):
  wanted = [expected(folder / "model.npz", photos, size) for size in SIZES]
  with opened(browser, server) as (page, said):
    for at, photo in enumerate(photos):
      drop(page, [photo])
      first = [of_size[at][0] for of_size in wanted]
      wait_for(lambda first=first: table_of(page) == first, 30)
      assert page.locator("#photos button").nth(at).get_attribute("aria-pressed") == "true"
      assert page.locator("#photos img").nth(at).get_attribute("alt") == photo.name
    assert said == []


@pytest.mark.parametrize(
  ("name", "content", "problem"),
  [
    ("text.jpg", b"These are words.", "not an image: no known image format: 16 bytes, first b'These"),
    ("notes.txt", b"These are words.", "not an image: no known image format"),
    ("film.mp4", b"\0\0\0\x20ftypisom" + b"\0" * 20, "not an image: no known image format"),
    ("empty.png", b"", "the body is empty; expected the bytes of an image file"),
    ("photo.heic", b"\0\0\0\x18ftypheic" + b"\0" * 40, "a HEIC image, which is read where pillow-heif"),
    ("large.jpg", b"\xff" * (10 * 2**20 + 1), "10.0 MB; at most 10 MB (--body_mb of the server)"),
  ],
)  # fmt: skip
def test_files_without_an_image_are_named_with_the_reason(
  tmp_path, browser, server, opened, drop, wait_for, name, content, problem
):
  (tmp_path / name).write_bytes(content)
  with opened(browser, server) as (page, _):
    drop(page, [tmp_path / name])
    wait_for(lambda: page.inner_text("#status").startswith(f"{name}: "))
    assert problem in page.inner_text("#status")


def test_a_truncated_jpeg_and_too_many_pixels_are_errors(
  tmp_path, browser, server, opened, drop, wait_for
):
  noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
  Image.fromarray(noise).save(tmp_path / "cut.jpg")
  (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:9000])
  Image.new("1", (9000, 9000)).save(tmp_path / "81_megapixels.png")
  with opened(browser, server) as (page, _):
    for name, problem in (("cut.jpg", "truncated"), ("81_megapixels.png", "67108864")):
      drop(page, [tmp_path / name])
      wait_for(lambda name=name: page.inner_text("#status").startswith(f"{name}: "))
      assert problem in page.inner_text("#status"), page.inner_text("#status")


def test_a_folder_two_files_and_no_file(
  folder, tmp_path, browser, server, opened, drop, expected, top_of, wait_for
):
  (tmp_path / "pictures").mkdir()
  with opened(browser, server) as (page, said):
    drop(page, [tmp_path / "pictures"])
    wait_for(lambda: "Expected the file of one photo, not a folder" in page.inner_text("#status"))
    page.locator("#canvas").evaluate(
      "to => to.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer(), bubbles: true}))"
    )
    wait_for(lambda: "What was dropped is no file." in page.inner_text("#status"))
    Image.new("RGB", (30, 30), (200, 9, 70)).save(tmp_path / "second.png")
    drop(page, [folder / "photo.png", tmp_path / "second.png"])
    (wanted,) = expected(folder / "model.npz", [folder / "photo.png"], 4)
    wait_for(lambda: top_of(page) == wanted)
    wait_for(lambda: "2 files were given; this is photo.png." in page.inner_text("#status"))
    assert said == []


def test_a_file_that_a_page_made_is_dropped(
  folder, browser, server, opened, expected, top_of, wait_for
):
  content = base64.b64encode((folder / "photo.png").read_bytes()).decode()
  with opened(browser, server) as (page, said):
    carried = page.evaluate_handle(
      """text => {
        const carried = new DataTransfer();
        const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
        carried.items.add(new File([bytes], "made.png", {type: "image/png"}));
        return carried;
      }""",
      content,
    )
    page.dispatch_event("#canvas", "drop", {"dataTransfer": carried})
    (wanted,) = expected(folder / "model.npz", [folder / "photo.png"], 4)
    wait_for(lambda: top_of(page) == wanted)
    assert said == []


def test_the_keyboard_alone_chooses_a_photo_and_comes_back_to_it(
  folder, tmp_path, browser, server, opened, expected, top_of, wait_for
):
  Image.new("RGB", (30, 30), (200, 9, 70)).save(tmp_path / "second.png")
  paths = [folder / "photo.png", tmp_path / "second.png"]
  wanted = expected(folder / "model.npz", paths, 4)
  with opened(browser, server) as (page, said):
    choosers = []
    page.on("filechooser", lambda chooser: choosers.append(chooser))  # noqa: PLW0108  # it marks the function

    def tab_to(selector):
      for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("what => document.activeElement.matches(what)", selector):
          return
      raise AssertionError(f"Tab does not reach {selector}")

    for path, top in zip(paths, wanted, strict=True):
      tab_to("#file")
      page.keyboard.press("Space")
      wait_for(lambda: page.wait_for_timeout(20) or choosers)
      choosers.pop().set_files(path)
      wait_for(lambda top=top: top_of(page) == top)
    tab_to("#photos button:first-child")
    page.keyboard.press("Enter")
    wait_for(lambda: top_of(page) == wanted[0])
    assert said == []


def test_a_server_that_was_killed_and_started_again_goes_on(
  folder, tmp_path, browser, serving, opened, expected, top_of, wait_for
):
  with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
  Image.new("RGB", (30, 30), (200, 9, 70)).save(tmp_path / "second.png")
  (wanted,) = expected(folder / "model.npz", [tmp_path / "second.png"], 4)
  with serving(folder, port) as (url, process), opened(browser, url) as (page, _):
    page.set_input_files("#file", folder / "photo.png")
    wait_for(lambda: table_of(page))
    process.kill()
    process.wait(30)
    page.set_input_files("#file", tmp_path / "second.png")
    wait_for(lambda: "The server does not answer; trying again." in page.inner_text("#status"))
    with serving(folder, port):
      wait_for(lambda: top_of(page) == wanted, 30)
      wait_for(lambda: not page.inner_text("#status"))


@pytest.fixture
def static(folder, tmp_path):
  """Writes the page of a model as a file, and returns its path."""

  def write(model=folder / "model.npz"):
    given = ["demo", model, "--static", tmp_path, "--images", folder / "photo.png"]
    assert cli.main([str(one) for one in given]) in (None, 0)
    return tmp_path / "index.html"

  return write


def test_a_model_without_names_has_classes_by_number(
  folder, static, browser, opened, expected, top_of, wait_for
):
  model, params, record = weights.load_with_record(folder / "model.npz")
  del record["class_names"]
  weights.save_npz(folder / "nameless.npz", model, params, record)
  (wanted,) = expected(folder / "nameless.npz", [folder / "photo.png"], 4)
  assert wanted[0][0].startswith("class ")
  with opened(browser, static(folder / "nameless.npz").as_uri(), offline=True) as (page, said):
    wait_for(lambda: top_of(page) == wanted)
    assert said == []


@pytest.mark.parametrize(
  ("old", "new", "problem"),
  [
    ('"photos": [', '"photos": [],"old": [', "This page has no photos. Write it again"),
    ('"photos": [', '"photos": ', "The data in this page are damaged"),
  ],
)
def test_a_static_page_without_photos_or_with_damaged_data(
  static, browser, opened, old, new, problem
):
  path = static()
  text = path.read_text()
  assert text.count(old) == 1
  path.write_text(text.replace(old, new))
  with opened(browser, path.as_uri(), offline=True) as (page, _):
    assert page.inner_text("#status").startswith(problem)
