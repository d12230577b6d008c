"""Writes drawings with captions, `captioned/{train,test}`, and `by_class/test/CLASS`: python tests/make_captions.py"""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np

COLOURS = {
  "red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 220), "yellow": (240, 210, 40), "black": (20, 20, 20),
  "purple": (140, 40, 170),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring")


def draw(shape, colour, rng):
  image = np.full((96, 96, 3), 235, np.uint8) - rng.integers(0, 30, (96, 96, 3), np.uint8)
  x, y = (int(v) for v in rng.integers(30, 66, 2))
  r = int(rng.integers(16, 28))
  if shape in ("circle", "ring"):
    cv2.circle(image, (x, y), r, COLOURS[colour], -1 if shape == "circle" else 6)
  elif shape == "square":
    cv2.rectangle(image, (x - r, y - r), (x + r, y + r), COLOURS[colour], -1)
  else:
    points = np.array([[x, y - r], [x - r, y + r], [x + r, y + r]], np.int32)
    cv2.fillPoly(image, [points], COLOURS[colour])
  return image


for number, split in enumerate(("train", "test")):
  folder = Path("captioned", split)
  folder.mkdir(parents=True, exist_ok=True)
  rows = []
  for i in range(480 if split == "train" else 24):
    rng = np.random.default_rng((number, i))
    shape, colour = SHAPES[i % 4], list(COLOURS)[i // 4 % 6]
    name = f"{i:03}.png"
    cv2.imwrite(str(folder / name), draw(shape, colour, rng)[..., ::-1])
    rows += [{"file_name": name, "text": f"a {colour} {shape}"}]
    rows += [{"file_name": name, "text": f"{shape} in {colour}"}]
    if split == "test":
      labelled = Path("by_class", split, f"{colour}_{shape}")
      labelled.mkdir(parents=True, exist_ok=True)
      shutil.copy(folder / name, labelled)
  (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
