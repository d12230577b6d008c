"""Makes a folder of 20 classes out of a zip with one image for each class of ImageNet-1k and its labels.csv.

Usage:
  python tools/maintain/group_sample.py imagenet_sample_1k_256.zip photos

A class is a group of ImageNet's classes, chosen by hand; of each group every third image goes into OUT/val, the others
into OUT/train. What is measured on it is a miniature: a model that was trained on ImageNet may know these images.
"""

import argparse
import csv
import io
import pathlib
import zipfile

from flexivit_jax import cli, errors

# Group: ImageNet-1k classes, "a-b" from a to b.
GROUPS = {
  "ape_or_monkey": "365-382",
  "bear_or_panda": "294-297 387-388",
  "beetle_or_bug": "300-318",
  "boat": "403 472 484 510 554 576 625 628 724 780 814 833 871 914",
  "butterfly": "319-326",
  "cat": "281-293",
  "container": "412 427 463 478 519 728 756 773 876 898-901 907",
  "fish": "0-6 389-397",
  "fruit_or_vegetable": "936-957 987",
  "furniture": "423 431 453 493 495 516 520 526 532 559 564 703 765 831 857 894",
  "herding_dog": "222-235",
  "hoofed_animal": "339-355",
  "instrument": "401-402 420 432 486 494 513 541 546 558 566 579 593-594 642 683 687 699 776 875 889",
  "landscape": "970 972-980",
  "lizard": "38-48",
  "road_vehicle": "407 436 468 511 555 569 573 609 627 654 656 661 675 717 734 751 779 817 864 867",
  "small_bird": "10-20 91-96",
  "snake": "52-68",
  "spider_or_scorpion": "70-78",
  "terrier": "179-202",
}


def main() -> None:
  """Writes the folder."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("zip", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  args = parser.parse_args()
  if args.out.exists():
    raise errors.UserError(f"{args.out} is there already; give another folder.")
  with zipfile.ZipFile(args.zip) as archive:
    rows = list(csv.DictReader(io.StringIO(archive.read("labels.csv").decode())))
    files = {int(row["index"]): row["file"] for row in rows}
    for name, text in GROUPS.items():
      for i, index in enumerate(numbers(text)):
        folder = args.out / ("val" if i % 3 == 2 else "train") / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / pathlib.Path(files[index]).name).write_bytes(archive.read(files[index]))


def numbers(text: str) -> list[int]:
  """The numbers in "3 5-7": 3, 5, 6, 7."""
  ends = [part.partition("-") for part in text.split()]
  return [i for first, _, last in ends for i in range(int(first), int(last or first) + 1)]


if __name__ == "__main__":
  cli.tool(main)
