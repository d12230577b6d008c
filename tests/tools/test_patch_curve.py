"""The tool that measures a fixed model at other patch sizes, under several ways to resize its kernel (figure 4)."""

import json
import re
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import weights
from flexivit_jax.models.flexivit import FlexiViT

FIELDS = dict(
  num_classes=2, patch_size=(8, 8), posemb_size=(4, 4), width=16, depth=1, mlp_dim=24, num_heads=4
)


@pytest.fixture
def run(repository, random_params, tmp_path, monkeypatch):
  """Calls the tool on a ViT of patch 8 and photographs of two classes; gives back the rows of each way."""
  model, rng = FlexiViT(**FIELDS), np.random.default_rng(0)
  weights.save_npz(
    tmp_path / "vit.npz", model, random_params(model, (32, 32, 3)), {"model": FIELDS}
  )
  for split, name in ((s, n) for s in ("train", "val") for n in ("cat", "dog")):
    folder = tmp_path / "photos" / split / name
    folder.mkdir(parents=True)
    for i in range(50 if split == "train" else 6):  # the second moment is of 100
      pixels = Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8))
      pixels.resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")

  def call(ways, *given, out=tmp_path / "curve"):
    arguments = [tmp_path / "vit.npz", tmp_path / "photos", f"--out={out}", f"--ways={ways}"]
    monkeypatch.setattr(sys, "argv", ["patch_curve.py", *map(str, arguments), *given])
    runpy.run_path(str(repository / "tools" / "paper" / "patch_curve.py"), run_name="__main__")
    return {
      way: json.loads((out / way / "eval.json").read_text())["rows"] for way in ways.split(",")
    }

  return call


def test_each_way_is_a_run_that_can_be_reported(run):
  found = run("pi_paper,plain_paper,pi_moment", "--image_size=32", "--seqhw=2,4")
  for rows in found.values():
    assert [(row["patch"], row["n"]) for row in rows] == [(16, 12), (8, 12)]
  pi, plain, _ = (rows for rows in found.values())
  assert pi[1]["loss"] == plain[1]["loss"]  # at the size of the kernel nothing is resized
  assert pi[0]["loss"] != plain[0]["loss"]


def test_resized_with_the_image_pi_resize_keeps_the_tokens(run):
  """Figure 4, from images of three quarters and of twice the side; growing, but for what is next to a patch's edge."""
  found = run("pi_paper,plain_paper,area_paper,norm_paper", "--grid=4", "--patches=6,8,16")
  for rows in found.values():
    assert [(r["patch"], r["tokens"]) for r in rows] == [(6, 16), (8, 16), (16, 16)]
  small, own, large = ([rows[i]["loss"] for rows in found.values()] for i in range(3))
  assert own == [own[0]] * 4
  pi, plain, _, norm = (abs(loss - own[0]) for loss in large)
  assert 0 < pi < min(plain, norm) / 2
  assert len(set(small)) == 4


@pytest.mark.parametrize(
  ("ways", "given", "said"),
  [
    ("area", (), "Unknown way 'area'.*Did you mean 'area_paper'"),
    ("pi_paper", ("--grid=4", "--seqhw=2"), "the image follows the patch"),
    ("pi_paper", ("--patches=4",), "--patches goes with --grid"),
    ("pi_paper,pi_moment", ("--image_size=32", "--seqhw=4"), "split folder.*'train'"),
  ],
)
def test_what_cannot_be_done_is_said_before_anything_is_evaluated(
  run, ways, given, said, tmp_path, capsys
):
  """The last: without `train`, which that way alone needs."""
  (tmp_path / "photos" / "train").rename(tmp_path / "elsewhere")
  with pytest.raises(SystemExit, match="2"):
    run(ways, *given)
  assert re.search(said, capsys.readouterr().err)
  assert not (tmp_path / "curve").exists()


def test_only_the_second_moment_needs_training_images(run, tmp_path):
  (tmp_path / "photos" / "train").rename(tmp_path / "elsewhere")
  assert len(run("plain_paper", "--image_size=32", "--seqhw=4")["plain_paper"]) == 1
