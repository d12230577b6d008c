# %% [markdown]
# # One model at all patch sizes
#
# A FlexiViT is trained once, each step at another patch size. Then one set of weights answers at every size:
# large patches are few tokens and fast, small ones are accurate.
#
# Half a minute on two cores; the images come with scikit-learn.

# %%
import shlex
import tempfile
from pathlib import Path

import cv2
import jax
import numpy as np

from flexivit_jax import cli, load
from flexivit_jax.data.sources import make_source

folder = Path(tempfile.mkdtemp())


def flexivit(command: str) -> None:
  """What `flexivit ...` does in a shell."""
  print("flexivit", command)
  assert cli.main(shlex.split(command)) == 0


# %% [markdown]
# The demo's config, `configs/digits.py`, with 600 steps instead of 2,000. `flexi.seqhw.v` are the sizes that
# are drawn: tokens a side of images of 24 pixels, so patches of 12, 6 and 3 pixels.

# %%
flexivit(
  f"train --config configs/digits.py --workdir {folder}/run --config.total_steps=600"
  " --config.flexi.seqhw.v='(2, 4, 8)' --config.evals.test.seqhw='(2, 4, 8)'"
)

# %% [markdown]
# Load the weights, and give the size with the call. Images are [n, h, w, c] with pixels in [-1, 1]; these are
# the 360 that the training did not see.

# %%
model, params = load(folder / "run")
records = make_source(name="digits", split="test").read(range(360))
images = np.float32([cv2.resize(record["image"], (24, 24)) / 127.5 - 1 for record in records])
labels = np.array([record["label"] for record in records])

accuracies = {}
for seqhw in (2, 4, 8):
  apply = jax.jit(lambda params, x, seqhw=seqhw: model.apply({"params": params}, x, seqhw=seqhw)[0])
  accuracies[seqhw] = float((apply(params, images).argmax(-1) == labels).mean())
  gflops = 2 * model.gmacs({"image": (24, 24, 3)}, seqhw=seqhw)
  print(
    f"{seqhw} x {seqhw} tokens: {accuracies[seqhw]:.1%} right, {gflops * 1000:.1f} MFLOPs an image"
  )

# %% [markdown]
# All sizes work, with the same weights. (A ViT that was trained at 8 x 8 tokens alone falls to chance at 2 x 2:
# `make demo`.)

# %%
assert min(accuracies.values()) > 0.7
assert model.gmacs({"image": (24, 24, 3)}, seqhw=8) > 8 * model.gmacs(
  {"image": (24, 24, 3)}, seqhw=2
)
