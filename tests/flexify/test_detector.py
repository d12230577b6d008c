"""`flexivit flexify` of detectors, on tiny models and images of noise."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, errors, trees, weights
from flexivit_jax.data import text as text_data
from flexivit_jax.flexify import detector, flexify
from flexivit_jax.models import OwlViT
from flexivit_jax.weights import model_records, tasks

BACKBONE = dict(patch_size=(8, 8), posemb_size=(4, 4), width=16, depth=1, mlp_dim=24, num_heads=2)
TEXT = dict(vocab_size=300, max_length=12, width=8, depth=1, mlp_dim=16, num_heads=2)
RECORD = {"image_size": [32, 32], "notes": [], "source": {"file": "x.npz", "format": "npz"}}


def written(folder, number=0, **fields):
  """A detector whose tokens find something, and its path."""
  model = OwlViT(backbone=BACKBONE, embed_dim=8, **fields)
  rng = np.random.default_rng(number)
  shapes = tasks.params_of(model, 3)
  params = jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), shapes)
  record = RECORD | {"model": model_records.record_of(model)}
  if model.num_classes:
    record["class_names"] = ["cat", "dog"]
  if model.text is not None:
    record["text"] = text_data.load("bytes", length=12, pad="[PAD]", end="[END]").record()
  weights.save_npz(folder / "init.npz", model, params, record)
  return folder / "init.npz", model, params


@pytest.fixture
def photos(tmp_path):
  folder = tmp_path / "photos"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(20):
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    coarse.resize((50, 40), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
  return folder


def command(init, photos, out, *more):
  given = [f"--init={init}", f"--data={photos}", f"--out={out}"]
  return ["flexify", *given, "--seqhw=2,4", "--batch_size=4", *more]


def test_at_its_own_size_a_detector_keeps_all_boxes(tmp_path, photos, capsys):
  init, model, params = written(tmp_path, num_classes=2)
  out = tmp_path / "out"
  assert cli.main(command(init, photos, out, "--epochs=0")) == 0
  coarse, own = json.loads((out / "retention.json").read_text())["before"]
  assert (own["kept"], own["extra"], own["patch"]) == (1.0, 0.0, 8) and own["boxes"] > 10
  assert coarse["kept"] < 1 and coarse["n"] == 2
  assert "| 8 | 4x4 | 100.0 | 0.0 |" in capsys.readouterr().out
  card = (out / "README.md").read_text()
  assert "with an IoU of 0.5" in card and "Nothing was trained" in card
  got, back, record = tasks.load(out / "model.npz")
  assert got.parts == model.parts and record["class_names"] == ["cat", "dog"]
  assert got.box_size == (1 / 4, 1 / 4)  # at every patch size
  assert trees.digest(back) == trees.digest(params)


def test_names_without_a_text_tower_have_vectors_and_all_sizes_are_of_its_own_images(
  tmp_path, photos, capsys
):
  init, model, params = written(tmp_path, query_length=5)
  own = {"model": model_records.record_of(model), "pp": "decode|value_range(-1, 1)"}
  init.unlink()
  weights.save_npz(init, model, params, RECORD | own)
  (tmp_path / "names.txt").write_text("cat\nhot dog\n")
  vectors = np.random.default_rng(0).normal(0, 1, (2, 5)).astype(np.float32)
  np.savez(tmp_path / "v.npz", names=["hot dog", "cat"], vectors=vectors)
  out = tmp_path / "out"
  given = [f"--names={tmp_path / 'names.txt'}", f"--vectors={tmp_path / 'v.npz'}"]
  assert cli.main(command(init, photos, out, "--epochs=0", "--seqhw=all", *given)) == 0
  rows = json.loads((out / "retention.json").read_text())["before"]
  assert [row["seqhw"] for row in rows] == [1, 2, 4]  # patches of 8 to 48 of 32 pixels
  assert tasks.load(out / "original.npz")[2]["class_names"] == ["cat", "hot dog"]
  assert "Images are fitted into 32x32 pixels" in capsys.readouterr().err
  assert "fitted into" not in str(tasks.load(out / "model.npz")[2]["notes"])


@pytest.mark.full
@pytest.mark.parametrize("fields", [dict(num_classes=2), dict(text=TEXT)])
def test_training_brings_other_sizes_nearer_and_leaves_texts_alone(tmp_path, photos, fields):
  init, model, params = written(tmp_path, **fields)
  names = [] if "num_classes" in fields else ["--names=cat,dog"]
  out = tmp_path / "out"
  given = command(init, photos, out, "--epochs=40", "--lr=3e-3", "--seqhw=2,4,8", *names)
  assert cli.main(given) == 0
  kept = json.loads((out / "retention.json").read_text())
  before, after = ({r["seqhw"]: r for r in kept[stage]} for stage in ("before", "after"))
  assert before[4]["kept"] == 1.0
  good = lambda rows: sum(rows[g]["kept"] - rows[g]["extra"] for g in (2, 8))  # noqa: E731
  assert good(after) > good(before)
  got, back, record = tasks.load(out / "model.npz")
  assert got.parts.keys() == model.parts.keys() and record["trained"] == {"seqhw": [2, 4, 8]}
  fixed = ("queries",) if "num_classes" in fields else ("text",)
  for name in fixed:
    assert trees.digest(back[name]) == trees.digest(params[name])
  assert trees.digest(back["box_2"]) != trees.digest(params["box_2"])
  assert cli.main(given) == 0  # nothing is left to train
  assert json.loads((out / "retention.json").read_text()) == kept


def test_what_cannot_be_flexified_is_refused(tmp_path, photos):
  init, *_ = written(tmp_path, num_classes=2)
  with pytest.raises(errors.UserError, match="leave --names out"):
    flexify(init, photos, tmp_path / "out", names=("cat",))
  with pytest.raises(errors.UserError, match="leave --buffers and --moment out"):
    flexify(init, photos, tmp_path / "out", moment=True)
  other = tmp_path / "other"
  other.mkdir()
  init, *_ = written(other, text=TEXT)
  with pytest.raises(errors.UserError, match="give --names"):
    flexify(init, photos, tmp_path / "out")


def test_each_box_serves_once_and_its_class_counts():
  boxes = lambda number, *corners: detector.Boxes(  # noqa: E731
    np.array(corners, float).reshape(-1, 4), np.array(number, int)
  )
  left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
  assert detector.in_common(boxes([0, 1], left, right), boxes([0, 1], left, right)) == 2
  assert detector.in_common(boxes([0, 0], left, left), boxes([0], left)) == 1
  assert detector.in_common(boxes([0], left), boxes([1, 0], left, right)) == 0
  assert detector.in_common(boxes([0], (0, 0, 0.5, 0.51)), boxes([0], left)) == 1
  assert detector.in_common(boxes([0], (0, 0, 0.5, 0.49)), boxes([0], left)) == 0
  assert detector.in_common(boxes([]), boxes([0], left)) == 0
  assert detector.in_common(boxes([0], left), boxes([])) == 0
