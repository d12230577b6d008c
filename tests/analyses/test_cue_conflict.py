"""Shape or texture: decisions that are known, file names, and the tool on a model that always says the same."""

import csv
import json
import runpy

import cv2
import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import weights
from flexivit_jax.analyses import cue_conflict
from flexivit_jax.analyses.cue_conflict import Conflict
from flexivit_jax.data import label_maps
from flexivit_jax.errors import UserError
from flexivit_jax.evaluators import intervals
from flexivit_jax.models import FlexiViT
from flexivit_jax.training import steps

CATEGORIES = label_maps.cue_conflict()
NAMES = list(CATEGORIES)


def make_images(folder, *names):
  """Noise of other sides than the model's, under these names."""
  rng = np.random.default_rng(0)
  for name in names:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (30, 32, 3), np.uint8)).save(path)
  return folder


# --- files ---


def test_conflicts_are_found_and_agreeing_images_left_out(tmp_path):
  names = ("cat/cat7-elephant1", "airplane/airplane10-bear3", "cat/cat1-cat2")
  found = cue_conflict.conflicts(make_images(tmp_path, *names), NAMES)
  assert [(c.path.name, c.shape, c.texture) for c in found] == [
    ("airplane10-bear3.png", "airplane", "bear"),
    ("cat7-elephant1.png", "cat", "elephant"),
  ]


@pytest.mark.parametrize(
  "name", ["cat/cat-elephant1", "cat/dog1-elephant1", "cat/cat1-zebra1", "cow/cow1-cat1", "cat/x"]
)
def test_files_of_another_name_are_errors(tmp_path, name):
  make_images(tmp_path, "cat/cat7-elephant1", name)
  with pytest.raises(UserError, match=rf"{name}.png is no name of a cue conflict; expected SHAPE"):
    cue_conflict.conflicts(tmp_path, NAMES)


def test_folders_without_conflicts_are_errors(tmp_path):
  with pytest.raises(UserError, match="nowhere is no folder"):
    cue_conflict.conflicts(tmp_path / "nowhere", NAMES)
  with pytest.raises(UserError, match=r"has 0 images SHAPE/\*.png, none whose"):
    cue_conflict.conflicts(tmp_path, NAMES)
  with pytest.raises(UserError, match="has 1 images"):
    cue_conflict.conflicts(make_images(tmp_path, "cat/cat1-cat2"), NAMES)


# --- decisions ---


def test_each_class_decides_for_its_category():
  for place, (_, classes) in enumerate(CATEGORIES.items()):
    decided = cue_conflict.decide(np.eye(1000)[list(classes)], CATEGORIES)
    assert (decided == place).all()


def test_the_mean_decides_not_the_sum_nor_the_largest():
  probabilities = np.zeros((2, 1000))
  # 109 dogs of 0.005 are 0.545, but 0.005 on average; the one knife has 0.01.
  probabilities[0, list(CATEGORIES["dog"])] = 0.005
  probabilities[0, CATEGORIES["knife"][0]] = 0.01
  # The largest is a bird, 0.3 / 49 on average; the two elephants have 0.02 on average.
  probabilities[1, CATEGORIES["bird"][0]] = 0.3
  probabilities[1, list(CATEGORIES["elephant"])] = 0.02
  decided = cue_conflict.decide(probabilities, CATEGORIES)
  assert [NAMES[i] for i in decided] == ["knife", "elephant"]


def test_rows_by_hand(tmp_path):
  pairs = [("cat", "dog")] * 5 + [("dog", "cat")] * 3 + [("bear", "car")] * 2
  images = [Conflict(tmp_path, *pair) for pair in pairs]
  said = ["cat", "cat", "cat", "dog", "oven", "dog", "cat", "cat", "boat", "oven"]
  decisions = np.array([NAMES.index(name) for name in said])
  rows = {row["category"]: row for row in cue_conflict.rows(images, decisions, NAMES)}
  assert list(rows) == ["all", "bear", "cat", "dog"]
  low, high = intervals.wilson(4, 7)
  counts = {"category": "all", "n": 10, "shape": 4, "texture": 3, "accuracy": 0.7}
  assert rows["all"] == counts | {"shape_bias": 4 / 7, "low": low, "high": high}
  assert (rows["cat"]["shape_bias"], rows["cat"]["accuracy"]) == (0.75, 0.8)
  assert (rows["dog"]["shape_bias"], rows["dog"]["accuracy"]) == (1 / 3, 1.0)
  none = {"n": 2, "shape": 0, "texture": 0, "accuracy": 0.0}
  assert rows["bear"] == {"category": "bear"} | none | dict.fromkeys(("shape_bias", "low", "high"))


# --- the tool ---


def make_checkpoint(path, classes, always=None):
  """A small random model; `always` is the class that its head gives whatever it sees."""
  fields = dict(variant="mu", patch_size=(6, 6), posemb_size=(4, 4), num_classes=classes)
  model = FlexiViT(**fields)
  params = jax.tree.map(
    np.array, jax.jit(lambda: steps.init_params(model, {"image": (24, 24, 3)}, seed=0))()
  )
  if always is None:
    params["head"]["kernel"] = np.float32(np.random.default_rng(0).normal(size=(32, classes)))
  else:
    params["head"]["bias"][always] = 9.0
  weights.save_npz(path, model, params, {"model": {"name": "flexivit", **fields}})
  return path


@pytest.fixture
def run_tool(repository, monkeypatch):
  tool = runpy.run_path(str(repository / "tools" / "paper" / "shape_texture.py"))

  def run(*arguments):
    given = ["shape_texture.py", *map(str, arguments), "--size=24", "--seqhw=2,4"]
    monkeypatch.setattr("sys.argv", given)
    tool["main"]()

  return run


def test_the_tool_finds_what_a_model_always_says(run_tool, tmp_path, capsys):
  textures = [f"elephant/elephant{i}-cat1" for i in range(3)]
  names = [*textures, "cat/cat1-elephant1", "dog/dog1-cat2", "dog/dog1-dog2", "dog/dog2-oven1"]
  images = make_images(tmp_path / "images", *names)
  checkpoint = make_checkpoint(tmp_path / "model.npz", 1000, always=CATEGORIES["elephant"][1])
  run_tool(checkpoint, images, f"--out={tmp_path / 'out'}")
  rows = json.loads((tmp_path / "out" / "shape_texture.json").read_text())
  assert [(r["seqhw"], r["patch"], r["category"], r["n"]) for r in rows] == [
    (size, 24 / int(size), category, n)
    for size in "24"
    for category, n in (("all", 6), ("cat", 1), ("dog", 2), ("elephant", 3))
  ]
  of_all = [r for r in rows if r["category"] == "all"]
  assert [(r["shape"], r["texture"], r["shape_bias"]) for r in of_all] == [(3, 1, 0.75)] * 2
  assert [r["accuracy"] for r in of_all] == [4 / 6] * 2
  with (tmp_path / "out" / "shape_texture.csv").open() as file:
    written = list(csv.DictReader(file))
  assert [float(r["shape_bias"]) for r in written if r["category"] == "all"] == [0.75] * 2
  assert (tmp_path / "out" / "shape_texture.png").read_bytes().startswith(b"\x89PNG")
  said = capsys.readouterr().out.splitlines()
  assert said[1].startswith("seqhw 4, patch 6: shape bias 75.0% (30.1% to 95.4%), 4 of 6 images")


def test_the_tool_decides_as_the_model_applied_by_hand(run_tool, tmp_path):
  """A random model, more images than a batch holds."""
  rng = np.random.default_rng(1)
  pairs = [rng.choice(NAMES, 2, replace=False) for _ in range(70)]
  images = make_images(tmp_path / "images", *(f"{a}/{a}{i}-{b}1" for i, (a, b) in enumerate(pairs)))
  checkpoint = make_checkpoint(tmp_path / "model.npz", 1000)
  run_tool(checkpoint, images, f"--out={tmp_path / 'out'}")
  rows = json.loads((tmp_path / "out" / "shape_texture.json").read_text())
  model, params = weights.load(checkpoint)
  found = cue_conflict.conflicts(images, NAMES)
  prepared = []
  for one in found:  # 30 x 32 pixels to 27 x 29, of which the middle 24 x 24
    pixels = cv2.resize(np.asarray(Image.open(one.path)), (29, 27), interpolation=cv2.INTER_AREA)
    prepared.append(pixels[1:25, 2:26] / 127.5 - 1)
  for size in (2, 4):
    logits = model.apply({"params": params}, np.float32(prepared), seqhw=size)[0]
    means = [np.asarray(jax.nn.softmax(logits))[:, list(c)].mean(1) for c in CATEGORIES.values()]
    said = [NAMES[i] for i in np.argmax(means, axis=0)]
    (row,) = (r for r in rows if (r["seqhw"], r["category"]) == (str(size), "all"))
    assert row["n"] == 70
    assert row["shape"] == sum(s == one.shape for s, one in zip(said, found, strict=True))
    assert row["texture"] == sum(s == one.texture for s, one in zip(said, found, strict=True))


def test_a_model_of_other_classes_is_an_error(run_tool, tmp_path):
  images = make_images(tmp_path / "images", "cat/cat1-dog1")
  checkpoint = make_checkpoint(tmp_path / "model.npz", 10, always=0)
  with pytest.raises(UserError, match="The model has 10 classes; expected the 1000 of ImageNet-1k"):
    run_tool(checkpoint, images, f"--out={tmp_path / 'out'}")
  assert not (tmp_path / "out").exists()
