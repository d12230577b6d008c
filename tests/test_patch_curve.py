"""The tool that measures a fixed model at other patch sizes, under several ways to resize its kernel (figure 4)."""

import json
import runpy
import sys

import numpy as np
from PIL import Image

from flexivit_jax import weights
from flexivit_jax.models.flexivit import FlexiViT

FIELDS = dict(
  num_classes=2, patch_size=(8, 8), posemb_size=(4, 4), width=16, depth=1, mlp_dim=24, num_heads=4
)


def test_each_way_is_a_run_that_can_be_reported(repository, random_params, tmp_path, monkeypatch):
  model, rng = FlexiViT(**FIELDS), np.random.default_rng(0)
  weights.save_npz(
    tmp_path / "vit.npz", model, random_params(model, (32, 32, 3)), {"model": FIELDS}
  )
  for split, name in ((s, n) for s in ("train", "val") for n in ("cat", "dog")):
    folder = tmp_path / "photos" / split / name
    folder.mkdir(parents=True)
    for i in range(50 if split == "train" else 6):  # the second moment is of 100
      pixels = rng.integers(0, 255, (40, 50, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f"{i}.png")
  out = tmp_path / "curve"
  given = [
    tmp_path / "vit.npz",
    tmp_path / "photos",
    f"--out={out}",
    "--image_size=32",
    "--seqhw=2,4",
  ]
  ways = ("pi_paper", "plain_paper", "pi_moment")
  monkeypatch.setattr(sys, "argv", ["patch_curve.py", *map(str, given), f"--ways={','.join(ways)}"])
  runpy.run_path(str(repository / "tools" / "patch_curve.py"), run_name="__main__")
  found = {way: json.loads((out / way / "eval.json").read_text())["rows"] for way in ways}
  for rows in found.values():
    assert [(row["patch"], row["n"]) for row in rows] == [(16, 12), (8, 12)]
  pi, plain, _ = (rows for rows in found.values())
  assert pi[1]["loss"] == plain[1]["loss"]  # at the size of the kernel nothing is resized
  assert pi[0]["loss"] != plain[0]["loss"]
