# %% [markdown]
# # A class for each pixel
#
# In segmentation the patch size is the resolution of the answer: fine patches draw more, and cost more. One
# FlexiViT with a decoder does all sizes.
#
# About a minute on two cores; the scenes are drawn here.

# %%
import json
import shlex
import tempfile
from pathlib import Path

import cv2
import numpy as np

from flexivit_jax import cli

folder = Path(tempfile.mkdtemp())


def flexivit(command: str) -> None:
  """What `flexivit ...` does in a shell."""
  print("flexivit", command)
  assert cli.main(shlex.split(command)) == 0


# %% [markdown]
# An image and its mask have the same name in two folders; a value of the mask is a line of `classes.txt`.

# %%
for number, (split, n) in enumerate((("train", 160), ("val", 16))):
  for kind in ("images", "masks"):
    (folder / "scenes" / kind / split).mkdir(parents=True)
  for i in range(n):
    rng = np.random.default_rng((number, i))
    image = np.full((96, 96, 3), 200, np.uint8) - rng.integers(0, 60, (96, 96, 3), np.uint8)
    mask = np.zeros((96, 96), np.uint8)
    for value, colour in ((1, (200, 60, 40)), (2, (40, 80, 200))):
      x, y, r = (int(v) for v in rng.integers((20, 20, 12), (76, 76, 26)))
      cv2.circle(image, (x, y), r, colour, -1)
      cv2.circle(mask, (x, y), r, value, -1)
    cv2.imwrite(str(folder / "scenes" / "images" / split / f"{i}.png"), image)
    cv2.imwrite(str(folder / "scenes" / "masks" / split / f"{i}.png"), mask)
(folder / "scenes" / "classes.txt").write_text("ground\nblue disc\nred disc\n")

# %%
flexivit(
  f"train --config configs/segment_folder.py:data_dir={folder}/scenes,decoder=linear,crop=96,epochs=12"
  f" --workdir {folder}/run --config.model.backbone.variant=mu --config.model.backbone.stochastic_depth=0.0"
  " --config.flexi.seqhw.v='(3, 6, 12)' --config.evals.test.seqhw='(3, 6, 12)' --config.optim.lr=3e-3"
  " --config.evals.test.every_percent=0.5"
)

# %% [markdown]
# The mean intersection over union (mIoU) at each size: 3 x 3 patches of 32 pixels are coarse, 12 x 12 of 8
# pixels follow the outlines. `flexivit predict photo.png --checkpoint run --seqhw 12 --overlay out.png` draws
# the mask on a photo.

# %%
rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
miou = {seqhw: rows[-1][f"test/miou/seqhw={seqhw}"] for seqhw in (3, 6, 12)}
print({f"{n} x {n}": f"{value:.1%}" for n, value in miou.items()})

assert 0.35 < miou[3] < miou[6] < miou[12]
assert miou[12] > 0.8
