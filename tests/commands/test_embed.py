"""`flexivit embed`: features of image files, with and without a head."""

import csv
import io
import os

import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, trees, weights
from flexivit_jax.inference import features, predictor
from flexivit_jax.models import FlexiViT


@pytest.fixture(scope="module")
def save(tmp_path_factory, random_params):
  """Saves a small model for images of 24 pixels and returns its file."""

  def save(classes=5, pool="gap"):
    model = FlexiViT(
      num_classes=classes, width=32, depth=1, mlp_dim=48, num_heads=2, patch_size=(8, 8),
      posemb_size=(3, 3), pool_type=pool,
    )  # fmt: skip
    fields = {"num_classes": classes, "width": 32, "depth": 1, "mlp_dim": 48, "num_heads": 2,
              "patch_size": [8, 8], "posemb_size": [3, 3], "pool_type": pool}  # fmt: skip
    file = tmp_path_factory.mktemp("model") / "model.npz"
    record = {"model": fields, "source": {"file": "model.npz", "format": "ours"}}
    weights.save_npz(
      file, model, random_params(model, (24, 24, 3)), record | {"image_size": [24, 24]}
    )
    return file

  return save


@pytest.fixture
def photos(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "photos").mkdir()
  for i in range(6):
    pixels = np.random.default_rng(i).integers(0, 256, (30, 26, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}, {chr(0xE0 + i)}.png")
  return tmp_path


def run(capsys, *args):
  code = cli.main(["embed", *map(str, args)])
  return (code, *capsys.readouterr())


def expected(file, image, **size):
  loaded = predictor.load(file)
  pixels = loaded.prepare(str(image))[None]
  return np.asarray(loaded.model.apply({"params": loaded.params}, pixels, **size)[1]["pre_logits"])[
    0
  ]


@pytest.mark.parametrize(("classes", "pool"), [(0, "tok"), (5, "map"), (0, "tok+gap")])
def test_features_are_the_pre_logits_in_the_order_of_the_inputs(
  save, photos, capsys, classes, pool
):
  file = save(classes, pool)
  names = [f"photos/{name}" for name in sorted(os.listdir("photos"), reverse=True)]
  code, out, err = run(capsys, *names, f"--checkpoint={file}", "--seqhw=4", "--out=f.npz")
  d = 64 if "+" in pool else 32
  assert (code, out, err) == (0, f"f.npz: 6 images, {d} features, seqhw=4\n", "")
  found = np.load("f.npz", allow_pickle=False)
  assert found["files"].tolist() == names and found["seqhw"] == 4
  assert found["features"].dtype == np.float32 and found["features"].shape == (6, d)
  for name, row in zip(names, found["features"], strict=True):
    np.testing.assert_allclose(row, expected(file, name, seqhw=4), atol=1e-5)
  assert found["weights"] == trees.digest(predictor.load(file).params)
  assert sorted(os.listdir()) == ["f.npz", "photos"]


def test_several_sizes_are_several_arrays_and_csv_has_a_row_for_each(save, photos, capsys):
  file = save()
  args = ["photos", f"--checkpoint={file}", "--seqhw=2,4x3", "--batch_size=2"]
  assert run(capsys, *args, "--out=f.npz")[0] == 0
  assert run(capsys, *args, "--out=f.csv")[0] == 0
  found = np.load("f.npz")
  assert found["seqhw"].tolist() == [[2, 2], [4, 3]] and "features" not in found
  rows = list(csv.reader(io.StringIO((photos / "f.csv").read_text(), newline="")))
  assert rows[0] == ["file", "seqhw", *(f"f{i}" for i in range(32))]
  for size, offset in (("2", 1), ("4x3", 2)):
    of_size = rows[offset::2]
    assert {row[1] for row in of_size} == {size}
    assert [row[0] for row in of_size] == found["files"].tolist()
    np.testing.assert_array_equal(
      np.array([row[2:] for row in of_size], np.float32), found[f"features_{size}"]
    )
  first = found["files"][0]
  np.testing.assert_allclose(
    found["features_4x3"][0], expected(file, first, grid_hw=(4, 3)), atol=1e-5
  )


def test_normalized_features_have_length_one(save, photos, capsys):
  file = save()
  args = ["photos", f"--checkpoint={file}", "--seqhw=4"]
  run(capsys, *args, "--out=plain.npz")
  run(capsys, *args, "--out=unit.npz", "--normalize")
  plain, unit = (np.load(f"{name}.npz")["features"] for name in ("plain", "unit"))
  np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
  np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, atol=1e-5)


@pytest.mark.parametrize("suffix", ["npz", "csv"])
def test_bad_files_are_named_and_left_out(save, photos, capsys, suffix):
  (photos / "photos" / "0bad.jpg").write_bytes(b"")
  args = ["photos", "gone.jpg", f"--checkpoint={save()}", "--seqhw=4", f"--out=f.{suffix}"]
  code, out, err = run(capsys, *args)
  assert code == 2 and out.startswith(f"f.{suffix}: 6 images")
  lines = err.splitlines()
  assert [line.split(":")[0] for line in lines] == ["photos/0bad.jpg", "gone.jpg", "flexivit"]
  assert "2 of 8 images cannot be read" in lines[-1]
  if suffix == "npz":
    assert len(np.load("f.npz")["files"]) == len(np.load("f.npz")["features"]) == 6
  assert run(capsys, *args, "--overwrite", "--on_error=skip")[0] == 0


@pytest.mark.parametrize(
  ("args", "message"),
  [
    (["--seqhw=4", "--out=f.txt"], "expected a file that ends in .npz or .csv"),
    (["--seqhw=4", "--out=there.npz"], "exists"),
    (["--seqhw=5", "--out=f.npz"], "does not divide"),
    (["--out=f.npz"], "Give --seqhw"),
  ],
)
def test_a_mistake_is_one_line_and_changes_nothing(save, photos, capsys, args, message):
  (photos / "there.npz").write_bytes(b"mine")
  code, out, err = run(capsys, "photos", f"--checkpoint={save()}", *args)
  assert (code, out, err.count("\n")) == (2, "", 1) and message in err
  assert sorted(os.listdir()) == ["photos", "there.npz"]
  assert (photos / "there.npz").read_bytes() == b"mine"


def test_a_full_disk_is_one_line(save, photos, capsys, monkeypatch):
  def full(self, file, features):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(features._Npz, "add", full)
  code, _, err = run(capsys, "photos", f"--checkpoint={save()}", "--seqhw=4", "--out=f.npz")
  assert (code, err) == (2, "flexivit: error: f.npz cannot be written: No space left on device.\n")
  assert os.listdir() == ["photos"]
