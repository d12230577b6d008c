"""Images a second of one core for preprocessing strings, on JPEGs cut from scikit-learn's two photographs.

python tools/bench/time_input.py --size 500x375 \
  --pp "decode|inception_crop(240)|flip_lr|value_range(-1, 1)|keep('image')"
"""

import argparse
import io
import pathlib
import statistics
import time

import numpy as np
from PIL import Image
from sklearn import datasets

from flexivit_jax import cli
from flexivit_jax.data import preprocess
from flexivit_jax.evaluators import results

PP = "|flip_lr|value_range(-1, 1)|keep('image')"
DEFAULT = {
  f"decode|inception_crop(240){PP}": "decode, then crop",
  f"decode_inception_crop(240){PP}": "decode_inception_crop",
}  # and their columns in results/decode.csv


def photos(size: tuple[int, int], quality: int, number: int) -> list[bytes]:
  """JPEGs of `size` (width, height): other parts of the photographs at other scales, as cameras and crops have them."""
  rng, made = np.random.default_rng(0), []
  for i in range(number):
    image = Image.fromarray(datasets.load_sample_images().images[i % 2])
    scale = rng.uniform(0.6, 1.0)
    w, h = (scale * side for side in image.size)
    left, top = rng.uniform(0, image.width - w), rng.uniform(0, image.height - h)
    cut = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    file = io.BytesIO()
    cut.save(file, "JPEG", quality=quality)
    made.append(file.getvalue())
  return made


def main() -> None:
  """Prints a line for each string."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--size", default="500x375", help="width x height of the files")
  parser.add_argument("--quality", type=int, default=92, help="of the JPEGs")
  parser.add_argument("--pp", action="append", help="a preprocessing string; may be given again")
  parser.add_argument("--number", type=int, default=64)
  parser.add_argument("--rounds", type=int, default=7)
  parser.add_argument(
    "--csv", type=pathlib.Path, help="a file to add the numbers to: results/decode.csv"
  )
  args = parser.parse_args()
  width, height = map(int, args.size.split("x"))
  files = photos((width, height), args.quality, args.number)
  mean = sum(map(len, files)) / len(files) / 1024
  print(f"{len(files)} JPEGs of {width}x{height}, {mean:.0f} KiB each")
  parsed = {text: preprocess.parse(text) for text in args.pp or DEFAULT}
  times: dict[str, list[float]] = {text: [] for text in parsed}
  for turn in range(args.rounds):
    for text, pp in parsed.items():
      begin = time.process_time()
      for i, file in enumerate(files):
        pp({"image": file}, np.random.default_rng((turn, i)))
      times[text].append((time.process_time() - begin) / len(files))
  row: dict[str, str] = {"file": f"{width} x {height}"}
  for text, spent in times.items():
    median = statistics.median(spent)
    row[DEFAULT.get(text, text)] = f"{1 / median:.0f}"
    spread = (max(spent) - min(spent)) / median
    print(f"{1 / median:8.0f} images/s of a core (spread {spread:.0%})  {text}")
  if args.csv:
    results.append_csv(args.csv, [row])


if __name__ == "__main__":
  cli.tool(main)
