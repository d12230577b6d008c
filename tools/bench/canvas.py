"""Photos prepared in a browser against ours: how far the pixels are apart, and how often another class comes out.

python tools/bench/canvas.py vit.safetensors photos --image_size 240 --seqhw 15 --number 200 --csv results/canvas.csv

A headless Chromium decodes each photo and makes it as large as the model takes it, in two ways: `bilinear` is ours
written in JavaScript (two by two neighbours, half-pixel centres, rounded), `canvas` the canvas's own smoothing. For
models whose photos are made square by `resize`. Differences are in grey levels, of 255.
"""

import argparse
import base64
import csv
import pathlib
import shutil
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from flexivit_jax import cli, errors
from flexivit_jax.data.inputs import find_images
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
_PREPARE = """async ([text, height, width, way]) => {
  const bytes = Uint8Array.from(atob(text), (one) => one.charCodeAt(0));
  const photo = await createImageBitmap(new Blob([bytes]), {colorSpaceConversion: "none", premultiplyAlpha: "none"});
  const [h, w] = way === "canvas" ? [height, width] : [photo.height, photo.width];
  const context = new OffscreenCanvas(w, h).getContext("2d", {willReadFrequently: true});
  context.imageSmoothingQuality = "high";
  context.drawImage(photo, 0, 0, w, h);
  const from = context.getImageData(0, 0, w, h).data, out = new Uint8Array(height * width * 3);
  const ends = (i, n, old) => {  // the two neighbours, and how near the second is
    const at = Math.min(Math.max((i + 0.5) * old / n - 0.5, 0), old - 1), low = Math.floor(at);
    return [low, Math.min(low + 1, old - 1), at - low];
  };
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) {
    const [top, bottom, v] = ends(y, height, h), [left, right, u] = ends(x, width, w);
    for (let c = 0; c < 3; c++) {
      const value = (row, column) => from[4 * (row * w + column) + c];
      const above = (1 - u) * value(top, left) + u * value(top, right);
      const below = (1 - u) * value(bottom, left) + u * value(bottom, right);
      out[3 * (y * width + x) + c] = Math.round((1 - v) * above + v * below);
    }
  }
  let answer = "";
  for (let i = 0; i < out.length; i += 8192) answer += String.fromCharCode(...out.subarray(i, i + 8192));
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
  p.add_argument("--csv", type=pathlib.Path, help="the file to write")
  args = p.parse_args()
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    raise errors.UserError("No Chromium is installed; on Debian: apt-get install chromium.")
  from playwright.sync_api import sync_playwright

  loaded = predictor.load(args.checkpoint, args.image_size)
  photos = find_images([args.images], outputs.note)[: args.number]
  with sync_playwright() as started:
    page = started.chromium.launch(executable_path=path, args=["--no-sandbox"]).new_page()
    sizes = predictor.sizes_of(args.seqhw, loaded)
    found = rows(page, loaded, [str(one.path) for one in photos], sizes)
  for one in found:
    print(*(f"{name} {value}" for name, value in one.items()), sep="  ")
  if args.csv:
    with args.csv.open("w", newline="") as file:
      writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
      writer.writeheader()
      writer.writerows(found)


if __name__ == "__main__":
  cli.tool(main)
