# %% [markdown]
# # Classes by name, and a search
#
# Two towers, one for images and one for texts, are trained on captions. Then any names are classes, and any
# text finds images; and the patch size of the image tower is free, as always.
#
# About a minute on two cores; the images are drawn here.

# %%
import contextlib
import csv
import io
import json
import shlex
import tempfile
from pathlib import Path

import cv2
import numpy as np

from flexivit_jax import cli

folder = Path(tempfile.mkdtemp())
colours = {
  "red": (220, 30, 30),
  "green": (30, 160, 60),
  "blue": (40, 60, 220),
  "black": (20, 20, 20),
}


def flexivit(command: str) -> None:
  """What `flexivit ...` does in a shell."""
  print("flexivit", command)
  assert cli.main(shlex.split(command)) == 0


def draw(shape: str, colour: str, rng: np.random.Generator) -> np.ndarray:
  """A circle or a square somewhere on a grey ground."""
  image = np.full((96, 96, 3), 235, np.uint8) - rng.integers(0, 30, (96, 96, 3), np.uint8)
  x, y, r = (int(v) for v in rng.integers((30, 30, 16), (66, 66, 28)))
  if shape == "circle":
    cv2.circle(image, (x, y), r, colours[colour], -1)
  else:
    cv2.rectangle(image, (x - r, y - r), (x + r, y + r), colours[colour], -1)
  return image


# %% [markdown]
# Images with captions: a folder for each split, whose `metadata.jsonl` has a line for each caption.

# %%
for number, split in enumerate(("train", "test")):
  (folder / "captioned" / split).mkdir(parents=True)
  rows = []
  for i in range(320 if split == "train" else 32):
    shape, colour = ("circle", "square")[i % 2], list(colours)[i // 2 % 4]
    name = f"{colour}_{shape}_{i}.png"
    image = draw(shape, colour, np.random.default_rng((number, i)))
    cv2.imwrite(str(folder / "captioned" / split / name), image[..., ::-1])
    rows += [{"file_name": name, "text": f"a {colour} {shape}"}]
    rows += [{"file_name": name, "text": f"{shape} in {colour}"}]
  lines = "".join(json.dumps(row) + "\n" for row in rows)
  (folder / "captioned" / split / "metadata.jsonl").write_text(lines)

# %% [markdown]
# A tokenizer from these captions, and two small towers.

# %%
data = f"{folder}/captioned"
flexivit(
  f"tokenizer name=captions data_dir={data} split=train --out {folder}/tokenizer.json --size 8192"
)
flexivit(
  f"train --config configs/flexiclip.py:data=captions,data_dir={data},vocab=8192,tokenizer={folder}/tokenizer.json"
  f" --workdir {folder}/towers --config.total_epochs=10 --config.input.batch_size=64"
  " --config.flexi.seqhw.v='(5, 8)' --config.evals.test.seqhw='(5, 8)' --config.evals.test.batch_size=32"
  " --config.model.image.variant=mu --config.model.text.width=32 --config.model.text.depth=1"
  " --config.model.text.mlp_dim=64 --config.optim.lr=3e-3 --config.evals.test.every_percent=1.0"
)

# %% [markdown]
# On the command line: `flexivit predict photo.png --names "red circle,blue square" --checkpoint towers --seqhw
# 8` and `flexivit search "red circle" --data captioned --checkpoint towers --seqhw 8`.

# %%
with contextlib.redirect_stdout(io.StringIO()) as printed:
  flexivit(
    f"search 'a red circle' --data {data}/test --checkpoint {folder}/towers --seqhw 8 --top_k 4"
    f" --index {folder}/index"
  )
print(printed.getvalue())

# %%
flexivit(
  f"predict {data}/test --names 'red shape,green shape,blue shape,black shape' --checkpoint {folder}/towers"
  f" --seqhw 5,8 --out {folder}/names.csv"
)

# %% [markdown]
# How many of the images have the colour that the model names, at each size?

# %%
with open(folder / "names.csv", newline="") as file:
  rows = list(csv.DictReader(file))
right = {
  size: np.mean([row["name_1"].split()[0] in row["file"] for row in rows if row["seqhw"] == size])
  for size in ("5", "8")
}
print({f"{size} x {size}": f"{share:.0%}" for size, share in right.items()})

assert printed.getvalue().count("red_circle") >= 3
assert min(right.values()) > 0.8
