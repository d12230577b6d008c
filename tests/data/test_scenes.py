"""Scenes: a function of seed, split and number; boxes, masks and names are exact; what is no cut-out is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import make_source
from flexivit_jax.errors import UserError
from flexivit_jax.specs import NO_CLASS

HUES = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255))


def cut_out(color, shape=(20, 12)):
  """A rectangle of one colour, within a transparent frame of 5 pixels."""
  h, w = shape
  pixels = np.zeros((h + 10, w + 10, 4), np.uint8)
  pixels[5:-5, 5:-5] = (*color, 255)
  return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("cutouts")
  rows = []
  for i, color in enumerate(HUES):
    cut_out(color).save(root / f"{i}.png")
    rows.append({"file_name": f"{i}.png", "name": f"thing {9 - i}", "novel": i == 4})
  (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
  return root


def scenes(folder, split="train", **options):
  given = dict(image_size=(48, 64), sides=(8, 24), num_examples=40, with_masks=True)
  return make_source(name="scenes", split=split, data_dir=str(folder), **(given | options))


def same(a, b):
  return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


def test_a_scene_is_a_function_of_seed_split_and_number(folder):
  whole, again = scenes(folder), scenes(folder)
  backwards = [again[i] for i in reversed(range(40))][::-1]
  assert all(same(whole[i], backwards[i]) for i in range(40))
  assert same(scenes(folder, "train[10:20]")[3], whole[13])
  assert not same(scenes(folder, seed=1)[0], whole[0])
  images = {
    scenes(folder, split)[i]["image"].tobytes()
    for split in ("train", "val", "test")
    for i in range(40)
  }
  assert len(images) == 120


def test_boxes_masks_and_names_are_those_of_the_pixels(folder):
  source = scenes(folder)
  assert source.class_names == tuple(f"thing {k}" for k in range(5, 10))
  hue_of = {f"thing {9 - i}": color for i, color in enumerate(HUES)}
  for i in range(40):
    record = source[i]
    image, mask, labels = record["image"], record["mask"], record["box_labels"]
    assert 0 < len(labels) == len(record["boxes"]) <= 6
    shown = np.zeros(mask.shape, bool)
    for (x0, y0, x1, y1), label in zip(record["boxes"].astype(int), labels, strict=True):
      inside = mask[y0:y1, x0:x1] == label
      for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
        assert edge.any()
      shown[y0:y1, x0:x1] |= inside
      assert (image[y0:y1, x0:x1][inside] == hue_of[source.class_names[label]]).all()
    np.testing.assert_array_equal(mask != NO_CLASS, shown)


def test_what_is_novel_is_shown_and_named_where_it_is_asked_for(folder):
  base, novel, everything = (scenes(folder, names=n) for n in ("base", "novel", "all"))
  assert novel.class_names == ("thing 5",) and len(base.class_names) == 4
  assert base.class_groups == {"base": (0, 1, 2, 3)} and novel.class_groups == {"novel": (0,)}
  assert everything.class_groups == {"base": (1, 2, 3, 4), "novel": (0,)}
  seen = {int(k) for i in range(40) for k in everything[i]["box_labels"]}
  assert seen == set(range(5))
  # The colour of the novel one is in no base scene.
  assert not any((base[i]["image"] == HUES[4]).all(-1).any() for i in range(40))


def test_photos_are_backgrounds_of_one_split_alone(folder, tmp_path):
  for i in range(12):
    Image.new("RGB", (90, 80), (i * 20, i, 7)).save(tmp_path / f"{i}.png")
  numbers = {
    split: {
      int(scenes(folder, split, backgrounds=str(tmp_path), objects=(1, 1))[i]["image"][0, 0, 1])
      for i in range(40)
    }
    for split in ("train", "test")
  }
  assert not numbers["train"] & numbers["test"]
  (tmp_path / "few").mkdir()
  with pytest.raises(UserError, match="has 0 images, and none of them is for train; give more"):
    scenes(folder, backgrounds=str(tmp_path / "few"))
  with pytest.raises(UserError, match="backgrounds='nowhere' is no folder"):
    scenes(folder, backgrounds="nowhere")


@pytest.mark.parametrize(
  ("options", "error"),
  [
    ({"sides": (8, 60)}, "as long as the largest object"),
    ({"sides": (9, 8)}, r"sides=\(9, 8\); expected two numbers, 1 <= least"),
    ({"objects": (0, 3)}, r"objects=\(0, 3\)"),
    ({"names": "some"}, "expected one of base, novel, all"),
    ({"num_examples": 0}, "1 example or more"),
    ({"split": "trian"}, "train"),
    ({"data_dir": "/no/such"}, "/no/such is no folder"),
  ],
)
def test_what_cannot_be_is_refused(folder, options, error):
  with pytest.raises(UserError, match=error):
    scenes(options.pop("data_dir", folder), **options)


@pytest.mark.parametrize(
  ("lines", "error"),
  [
    (None, "does not exist"),
    ("", "is empty"),
    ("{nonsense", "line 1: .*expected a JSON object"),
    ('{"file_name": "0.png"}', "expected a JSON object with file_name and name"),
    ('{"file_name": "0.png", "name": " "}', "expected a text"),
    ('{"file_name": "9.png", "name": "a"}', "9.png does not exist"),
    ('{"file_name": "0.png", "name": "a"}\n' * 2, "the name 'a' has another cut-out"),
    ('{"file_name": "0.png", "name": "a", "novel": 1}', "novel 1; expected"),
  ],
)
def test_damaged_metadata_are_refused(tmp_path, lines, error):
  cut_out(HUES[0]).save(tmp_path / "0.png")
  if lines is not None:
    (tmp_path / "metadata.jsonl").write_text(lines)
  with pytest.raises(UserError, match=error):
    scenes(tmp_path)


def test_groups_that_are_not_there_and_files_that_are_no_cut_outs_are_refused(tmp_path):
  (tmp_path / "metadata.jsonl").write_text('{"file_name": "0.png", "name": "a"}')
  cut_out(HUES[0]).save(tmp_path / "0.png")
  with pytest.raises(UserError, match="no novel cut-outs; names='all'"):
    scenes(tmp_path, names="novel")
  for name, image, error in (
    ("1", Image.new("RGB", (9, 9)), "no alpha channel"),
    ("2", Image.new("RGBA", (9, 9)), "transparent all over"),
  ):
    image.save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "{name}.png", "name": "a"}}')
    with pytest.raises(UserError, match=error):
      scenes(tmp_path)[0]
  (tmp_path / "3.png").write_bytes(b"no image")
  (tmp_path / "metadata.jsonl").write_text('{"file_name": "3.png", "name": "a"}')
  with pytest.raises(UserError, match="cannot be read as an image"):
    scenes(tmp_path)[0]
