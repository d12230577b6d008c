"""Photos prepared in a browser against ours: how far the pixels are apart, and how often another class comes out.

python tools/bench/canvas.py vit.safetensors photos --image_size 240 --seqhw 15 --number 200 --csv results/canvas.csv

A headless Chromium decodes each photo and makes it as large as the model takes it, in two ways: `bilinear` is ours
written in JavaScript (two by two neighbours, half-pixel centres, rounded), `canvas` the canvas's own smoothing. For
models whose photos are made square by `resize`. Differences are in grey levels, of 255.
"""

import argparse
import base64
import json
import pathlib
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from flexivit_jax import cli, errors
from flexivit_jax.data.inputs import find_images
from flexivit_jax.demo import in_browser
from flexivit_jax.evaluators import results
from flexivit_jax.inference import outputs, predictor, programs
from flexivit_jax.sizes import SeqHw, size_text

COLUMNS = (
  "shorter_side",
  "way",
  "seqhw",
  "photos",
  "mean_difference",
  "largest_difference",
  "other_class",
)
WAYS = ("bilinear", "canvas")
# Of "canvas" the resize is the canvas's own; the rest of the preparation is the page's.
_PREPARE = """async ([text, height, width, way]) => {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  let photo = await decoded(new Blob([bytes]));
  if (way === "canvas") {
    const canvas = new OffscreenCanvas(width, height), context = canvas.getContext("2d", {willReadFrequently: true});
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, width, height);
    photo = canvas.transferToImageBitmap();
  }
  const {data} = way === "canvas" ? pixelsOf(photo) : prepared(photo);
  let answer = "";
  for (let i = 0; i < data.length; i += 8192) answer += String.fromCharCode(...data.subarray(i, i + 8192));
  return btoa(answer);
}"""


def prepared(page: Any, encoded: bytes, hw: tuple[int, int], way: str) -> np.ndarray:
  """Returns a photo as the browser prepares it: [h, w, 3] in [-1, 1]."""
  text = page.evaluate(_PREPARE, [base64.b64encode(encoded).decode(), *hw, way])
  pixels = np.frombuffer(base64.b64decode(text), np.uint8).reshape(*hw, 3)
  return (pixels / 127.5 - 1).astype(np.float32)


def rows(
  page: Any, loaded: predictor.Loaded, paths: Sequence[str], sizes: Sequence[SeqHw]
) -> list[dict[str, Any]]:
  """Compares both ways with ours, at each size."""
  ours = np.stack([loaded.prepare(path) for path in paths])
  shape = ours.shape[1:]
  theirs = {
    way: np.stack([prepared(page, pathlib.Path(path).read_bytes(), shape[:2], way) for path in paths])
    for way in WAYS
  }  # fmt: skip
  side = statistics.median(min(Image.open(path).size) for path in paths)
  found = []
  for size in sizes:
    run = programs.compiled(loaded, programs.probabilities, size, batch=1, shape=shape).run
    best = np.array([run(image[None])[0].argmax() for image in ours])
    for way, images in theirs.items():
      apart = np.abs(images - ours) * 127.5
      other = sum(
        run(image[None])[0].argmax() != one for image, one in zip(images, best, strict=True)
      )
      values = (
        f"{side:.0f}",
        way,
        str(size_text(size)),
        len(ours),
        f"{apart.mean():.2f}",
        f"{apart.max():.0f}",
        int(other),
      )
      found.append(dict(zip(COLUMNS, values, strict=True)))
  return found


def main() -> None:
  """Measures, prints, writes."""
  p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
  p.add_argument("checkpoint")
  p.add_argument("images")
  p.add_argument("--image_size", type=int, default=240)
  p.add_argument("--seqhw", default="15")
  p.add_argument("--number", type=int, default=200, help="the first so many photos")
  p.add_argument("--csv", type=pathlib.Path, help="the file to add the rows to")
  args = p.parse_args()
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    raise errors.UserError("No Chromium is installed; on Debian: apt-get install chromium.")
  from playwright.sync_api import sync_playwright

  loaded = predictor.load(args.checkpoint, args.image_size)
  photos = find_images([args.images], outputs.note)[: args.number]
  with sync_playwright() as started:
    page = started.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
    page.evaluate(f"DEMO = {json.dumps({'own': in_browser.steps(loaded.pp)})}")
    page.add_script_tag(content=in_browser.script())
    sizes = predictor.sizes_of(args.seqhw, loaded)
    found = rows(page, loaded, [str(one.path) for one in photos], sizes)
  for one in found:
    print(*(f"{name} {value}" for name, value in one.items()), sep="  ")
  if args.csv:
    results.append_csv(args.csv, found)


if __name__ == "__main__":
  cli.tool(main)
