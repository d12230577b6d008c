"""`flexivit predict` with a segmentation model: masks at the files' own resolution, overlays, legends."""

import json

import jax
import numpy as np
import pytest
from PIL import Image

from flexivit_jax import cli, sizes, weights
from flexivit_jax.data import class_colours, images
from flexivit_jax.errors import UserError
from flexivit_jax.inference import masks, overlays, picture_files, predictor, whole_images
from flexivit_jax.models import Segmenter
from flexivit_jax.weights import model_records

NAMES = ["sky", "Straße", "car"]
PP = "decode|resize_small(24)|central_crop(24)|value_range(-1, 1)|keep('image', 'mask')"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A small Segmenter in a file, whose run evaluated squares."""
  backbone = dict(patch_size=(8, 8), posemb_size=(3, 3), width=16, depth=1, mlp_dim=16, num_heads=2)
  made = Segmenter(num_classes=3, backbone=backbone, decoder="linear")
  image = np.zeros((1, 24, 24, 3), np.float32)
  shapes = jax.eval_shape(lambda: made.init(jax.random.key(0), image, seqhw=3))["params"]
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda s: rng.normal(0, 0.6, s.shape).astype(np.float32), shapes)
  file = tmp_path_factory.mktemp("model") / "segmenter.npz"
  record = {
    "model": model_records.record_of(made), "pp": PP, "class_names": NAMES,
    "source": {"file": "segmenter.npz", "format": "ours"}, "trained": {"seqhw": [3, 6]},
  }  # fmt: skip
  weights.save_npz(file, made, params, record)
  return file


@pytest.fixture
def photos(tmp_path, monkeypatch):
  """Photos of two shapes, one turned by its EXIF data."""
  monkeypatch.chdir(tmp_path)
  for i, (name, hw) in enumerate({"a/1.png": (30, 40), "a/2.jpg": (51, 33)}.items()):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    low = np.random.default_rng(i).integers(0, 256, (4, 4, 3), np.uint8)
    image = Image.fromarray(low).resize(hw[::-1], Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, **({"exif": exif} if name.endswith("jpg") else {}))
  return tmp_path


def run(capsys, *args):
  """Returns (exit code, stdout, stderr) of `flexivit predict`."""
  code = cli.main(["predict", *map(str, args)])
  return (code, *capsys.readouterr())


def mask_in(path):
  return images.decode_mask(path.read_bytes(), max_pixels=10**6)


def test_a_mask_is_the_argmax_of_the_scores_at_the_files_resolution(model, photos, capsys):
  code, out, err = run(
    capsys, "a/1.png", "--checkpoint", model, "--seqhw", "3x4", "--out", "mask.png"
  )
  assert code == 0
  assert "central_crop(24) of its preprocessing is left out" in err
  got = mask_in(photos / "mask.png")
  loaded = predictor.load(model, whole=True)
  image = loaded.prepare("a/1.png")
  assert image.shape == (24, 32, 3)  # the shorter side is 24, nothing is cut
  scores = loaded.model.apply({"params": loaded.params}, image[None], grid_hw=(3, 4))[0]
  want = jax.image.resize(scores[0], (30, 40, 3), "linear", antialias=False)
  two = np.sort(np.asarray(want), axis=-1)[..., -2:]
  sure = two[..., 1] - two[..., 0] > 1e-4
  assert sure.mean() > 0.99
  np.testing.assert_array_equal(got[sure], np.asarray(want).argmax(-1)[sure])
  assert Image.open(photos / "mask.png").getpalette()[3:6] == [*class_colours.colour(1)]
  for k in np.unique(got):
    assert f"{(got == k).mean():6.1%}  {class_colours.hex_colour(int(k))}  {NAMES[k]}" in out


def test_a_folder_of_photos_becomes_folders_of_masks_and_overlays(model, photos, capsys):
  args = ["a", "--checkpoint", model, "--patch", "8,7x9", "--out", "masks", "--overlay", "over"]
  code, out, _ = run(capsys, *args, "--json")
  assert code == 0
  rows = [json.loads(line) for line in out.splitlines()]
  assert [(r["file"], r["patch"]) for r in rows] == [
    (f, p) for f in ("a/1.png", "a/2.jpg") for p in ([8, 8], [7, 9])
  ]
  for row in rows:
    assert sum(one["share"] for one in row["classes"]) == pytest.approx(1, abs=1e-5)
    # EXIF turns the second: 51 x 33 pixels are stored.
    assert mask_in(photos / row["mask"]).shape == ((30, 40) if "1" in row["file"] else (33, 51))
  names = {str(p.relative_to(photos)) for d in ("masks", "over") for p in (photos / d).rglob("*.*")}
  assert names == {
    f"{d}/{s}/{i}.png" for d in ("masks", "over") for s in ("p8", "p7x9") for i in (1, 2)
  }
  code, _, err = run(capsys, *args)
  assert code == 2 and "exists; give another name, or --overwrite" in err


@pytest.mark.parametrize(
  ("record", "image_size", "expected"),
  [
    ({"pp": "decode|resize(24)|pad(32, fill=0)|value_range(-1,1)"}, None, "decode|resize(24)|value_range(-1, 1)"),
    ({"pp": "decode|resize(24)|value_range", "short_side": 30}, None, "decode|resize_small(30)|value_range"),
    ({"pp": "decode|value_range|keep('image', 'mask')", "image_shape": [24, 32, 3]}, None,
     "decode|resize_small(24)|value_range"),
    ({"pp": "decode|resize(24)|value_range"}, 48, "decode|resize_small(48)|value_range"),
    ({"image_size": [64, 64]}, None, "decode|resize_small(64)|value_range(-1, 1)"),
  ],
)  # fmt: skip
def test_an_image_is_resized_as_by_the_evaluation_and_never_cut(record, image_size, expected):
  pp, notes = whole_images.of_all_pixels(record, image_size)
  assert pp.replace(" ", "") == expected.replace(" ", "")
  assert bool(notes) == (
    "pad" in str(record) or "resize" not in str(record) or "image_size" in record
  )


def test_images_that_differ_in_their_suffix_alone_keep_it():
  names = picture_files._names_in_folder(["x/a.png", "x/a.jpg", "x/y/b.png"])
  assert [*names.values()] == ["a.png.png", "a.jpg.png", "y/b.png.png"]
  assert picture_files._names_in_folder(["x/a.png", "y/a.png"])["y/a.png"] == "y/a.png"


@pytest.mark.parametrize(
  ("given", "message"),
  [
    (["--seqhw=3", "--out=mask.csv"], "gives masks; expected a .png or a folder"),
    (["--seqhw=3", "--out=mask.jpg"], "expected a file that ends in .png"),
    (
      ["--seqhw=3", "--overlay=o.gif"],
      "--overlay=o.gif: expected a file that ends in .png or .jpg",
    ),
    (["--seqhw=3,6", "--out=mask.png"], "one file, and there are 2 images at 2 sizes.*--out=mask"),
    (["--seqhw=3", "--patch=8"], "not both"),
    (["--patch=8by8"], "--patch: '8by8' is no size; expected 8,16 or 8x10"),
    ([], "Give --seqhw, .* was trained at 3,6"),
    (["--patch=8", "--out=same", "--overlay=same"], "would be the same files"),
    (["--seqhw=50"], "seqhw=50 does not fit the image"),
  ],
)
def test_what_gives_no_mask_is_refused(given, message, model, photos, capsys):
  code, _, err = run(capsys, "a", "--checkpoint", model, *given)
  assert code == 2
  assert __import__("re").search(message, err), err


def test_a_classifier_gives_no_mask(photos, capsys, tmp_path, model):
  backbone, params, record = weights.load_with_record(model)
  weights.save_npz(tmp_path / "vit.npz", backbone, params, record)
  for given in (["--out=mask.png"], ["--overlay=o.png"], ["--patch=8"]):
    code, _, err = run(capsys, "a", "--checkpoint", tmp_path / "vit.npz", "--seqhw=3", *given)
    assert code == 2 and "classifies whole images" in err


def test_colours_are_distinct_and_those_of_few_classes_far_apart():
  colours = np.array([class_colours.colour(k) for k in range(256)], float)
  apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 1e3 * np.eye(256)
  assert apart.min() > 0
  assert apart[:24, :24].min() > 50


def test_more_than_256_classes_are_grey_of_16_bits(tmp_path):
  mask = np.array([[0, 299]], np.uint16)
  overlays.palette_image(mask, 300).save(tmp_path / "m.png")
  np.testing.assert_array_equal(mask_in(tmp_path / "m.png"), mask)


def test_classes_at_another_resolution_are_those_of_resized_scores():
  scores = np.random.default_rng(0).normal(size=(5, 7, 4)).astype(np.float32)
  for hw in ((5, 7), (13, 20), (3, 4)):
    want = jax.image.resize(scores, (*hw, 4), "linear", antialias=False)
    np.testing.assert_array_equal(masks.classes_at(scores, hw), np.asarray(want).argmax(-1))


def test_sizes_in_pixels_of_a_patch():
  assert sizes.parse_patches("16,8x10") == ((16, 16), (8, 10))
  patch = sizes.parse_patches("8x10")[0]
  assert sizes.size_args(patch) == {"patch_hw": (8, 10)} and sizes.size_text(patch) == "p8x10"
  with pytest.raises(UserError, match="expected 8,16 or 8x10"):
    sizes.parse_patches("0")
