"""Folders with boxes, masks and captions: each format gives back what was written, and names every bad row."""

import csv
import io
import json
import pickle
import unicodedata
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import OPS, class_sizes, eval_batches, make_source, planned_source
from flexivit_jax.data.images import decode_image, header_hw
from flexivit_jax.data.sources import annotated
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

NAMES = ("no", "cat", "Übelkeit", "two words", "7")
STEMS = ("a", "B c", "ä", "deep/er/x", "x.y", "日本")
SUFFIXES = (".png", ".JPG", ".webp", ".Jpeg")
Truth = dict[str, dict[str, Any]]  # Path of an image -> the keys of its record.


def draw(rng: np.random.Generator, count: int = 12, *, flat: bool = False) -> Truth:
  """Images with random boxes, in quarters of pixels, which float32 holds exactly."""
  truth, ids = {}, iter(rng.permutation(1000).tolist())
  for i in range(count):
    stem = f"{STEMS[i % len(STEMS)]}{i}"
    name = (stem.replace("/", "-") if flat else stem) + SUFFIXES[i % 4]
    h, w = (int(n) for n in rng.integers(2, 60, 2))
    number = int(rng.integers(0, 4)) if i else 0
    low = rng.integers(0, 4 * np.array([w, h]) - 1, (number, 2))
    high = rng.integers(low + 1, 4 * np.array([w, h]) + 1, (number, 2))
    truth[name] = {
      "annotated_hw": (h, w),
      "boxes": np.concatenate([low, high], 1).astype(np.float32) / 4,
      "box_labels": rng.integers(0, len(NAMES), number),
      "box_ids": np.array([next(ids) for _ in range(number)], np.int64),
      "box_crowd": rng.random(number) < 0.3,
      "box_difficult": rng.random(number) < 0.3,
    }
  return truth


def write_images(folder: Path, truth: Truth) -> None:
  formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
  for name, record in truth.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", record["annotated_hw"][::-1], (len(name), 0, 0))
    image.save(path, formats[path.suffix.lower()])


def check(source, folder: Path, below: str, truth: Truth, *, atol: float = 0) -> None:
  """Whether a source has these records and no others."""
  assert len(source) == len(truth)
  records = {record["id"]: record for record in source.read(range(len(source)))}
  assert records.keys() == {str(Path(below, name)) for name in truth}
  for name, expected in truth.items():
    record = records[str(Path(below, name))]
    assert record.keys() == {"image", "id", *expected}
    assert record["image"] == (folder / below / name).read_bytes()
    assert decode_image(record["image"], max_pixels=10**6).shape[:2] == expected["annotated_hw"]
    for key, value in expected.items():
      if isinstance(value, np.ndarray):
        assert record[key].dtype == value.dtype and record[key].shape == value.shape
        np.testing.assert_allclose(record[key], value, atol=atol, rtol=0)
      else:
        assert record[key] == value
  again = pickle.loads(pickle.dumps(source))
  assert [r["id"] for r in again.read([2, 0])] == [source[2]["id"], source[0]["id"]]
  assert source.labels is None and source.where == str(folder)


def without(truth: Truth, *keys: str) -> Truth:
  return {n: {k: v for k, v in r.items() if k not in keys} for n, r in truth.items()}


def opened(name: str, split: str, folder: Path, **options):
  return make_source(name=name, split=split, data_dir=folder, **options)


def reasons(name: str, split: str, folder: Path, count: int, caplog, **options) -> str:
  """The bad rows of a data set, which are the same where they are skipped; checks that all are counted."""
  with pytest.raises(UserError, match=f"{count} bad rows?:") as info:
    opened(name, split, folder, **options)
  assert "on_bad='skip'" in str(info.value)
  caplog.clear()
  annotated.warn.cache_clear()
  opened(name, split, folder, **options, on_bad="skip")
  found = str(info.value).partition("bad row")[2].partition(". Repair")[0]
  assert f"skipped {count} bad row{found}" in caplog.text
  return found


# --- COCO ---

IDS = (1, 13, 44, 89, 90)  # With gaps, as COCO's own.


def write_coco(path: Path, truth: Truth, **changes: Any) -> dict[str, Any]:
  images, annotations = [], []
  for number, (name, record) in enumerate(truth.items(), 100):
    h, w = record["annotated_hw"]
    images.append({"id": number, "file_name": name, "height": h, "width": w})
    rows = zip(*(record[f"box{k}"] for k in ("es", "_labels", "_ids", "_crowd")), strict=True)
    for (x0, y0, x1, y1), label, key, crowd in rows:
      bbox = [float(v) for v in (x0, y0, x1 - x0, y1 - y0)]
      annotation = {"id": int(key), "image_id": number, "category_id": IDS[label], "bbox": bbox}
      annotations.append({**annotation, "iscrowd": int(crowd), "segmentation": []})
  categories = [{"id": IDS[k], "name": NAMES[k]} for k in (3, 0, 4, 1, 2)]
  content = {"images": images, "annotations": annotations, "categories": categories} | changes
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps(content), "utf-8-sig")
  return content


@pytest.mark.parametrize("seed", range(4))
def test_coco_gives_back_what_was_written(tmp_path, seed):
  truth = draw(np.random.default_rng(seed))
  below = ("val", "images/val", "images", "")[seed]
  write_images(tmp_path / below, truth)
  file = ("annotations/instances_val.json", "instances_val.json", "val.json", "x/val_boxes.json")
  write_coco(tmp_path / file[seed], truth)
  options = {"annotations": "x/{split}_boxes.json"} if seed == 3 else {}
  source = opened("coco", "val", tmp_path, **options)
  assert (source.num_classes, source.class_names) == (5, NAMES)
  check(source, tmp_path, below, without(truth, "box_difficult"))
  parts = [opened("coco", f"val[{p}]", tmp_path, **options) for p in (":50%", "50%:")]
  ids = [source[i]["id"] for i in range(12)]
  assert [r["id"] for part in parts for r in part.read(range(6))] == ids != sorted(ids)
  turned = dict(reversed(truth.items()))  # The order of the file does not matter.
  write_coco(tmp_path / file[seed], turned)
  again = opened("coco", "val", tmp_path, **options)
  assert [again[i]["id"] for i in range(12)] == ids


def test_coco_without_sizes_reads_the_headers(tmp_path):
  truth = draw(np.random.default_rng(5))
  write_images(tmp_path / "images", truth)
  content = write_coco(tmp_path / "train.json", truth)
  for image in content["images"]:
    del image["height"], image["width"]
  (tmp_path / "train.json").write_text(json.dumps(content))
  check(opened("coco", "train", tmp_path), tmp_path, "images", without(truth, "box_difficult"))


def test_names_match_in_any_form_of_unicode_and_of_slashes(tmp_path):
  truth = draw(np.random.default_rng(4))
  stored = {unicodedata.normalize("NFD", name): record for name, record in truth.items()}
  assert stored.keys() != truth.keys()
  write_images(tmp_path / "val", stored)
  written = {name.replace("/", "\\"): record for name, record in truth.items()}
  write_coco(tmp_path / "val.json", written)
  check(opened("coco", "val", tmp_path), tmp_path, "val", without(stored, "box_difficult"))
  rng = np.random.default_rng(4)
  write_yolo(tmp_path / "yolo", stored, 0, rng)
  for path in sorted((tmp_path / "yolo" / "labels").rglob("*.*")):
    path.rename(path.with_name(unicodedata.normalize("NFC", path.name)))
  (tmp_path / "yolo" / "data.yaml").write_text(YAMLS[0])
  records = opened("yolo", "val", tmp_path / "yolo").read(range(len(stored)))
  assert sum(len(record["boxes"]) for record in records) == sum(
    len(record["boxes"]) for record in truth.values()
  )


def test_coco_splits_are_joined_where_their_categories_are_equal(tmp_path):
  for split, seed in (("train", 0), ("val", 1)):
    truth = draw(np.random.default_rng(seed), 5)
    write_images(tmp_path / split, truth)
    write_coco(tmp_path / f"{split}.json", truth)
  assert len(opened("coco", "train+val[:2]", tmp_path)) == 7
  write_coco(tmp_path / "val.json", truth, categories=[{"id": 1, "name": "cat"}], annotations=[])
  with pytest.raises(UserError, match=r"'train' and 'val' have other categories"):
    opened("coco", "train+val", tmp_path)


def test_coco_names_its_bad_rows(tmp_path, caplog):
  truth = draw(np.random.default_rng(0), 6)
  write_images(tmp_path / "images", truth)
  good = write_coco(tmp_path / "train.json", truth)
  image, number = good["images"][0], len(good["annotations"])
  base = {"image_id": image["id"], "category_id": 1, "bbox": [0, 0, 1, 1], "iscrowd": 0}
  w, h = image["width"], image["height"]
  rows = [
    ({"bbox": [0, 0, w + 1.01, 1]}, f"outside the image, which is {w} wide and {h} high"),
    ({"bbox": [-1.01, 0, 3, 1]}, "is outside the image"),
    ({"bbox": [1, 1, 0, 5]}, "has no area"),
    ({"bbox": [1, 1, 5, -2]}, "has no area"),
    ({"bbox": [w, 0, 0.5, 1]}, "has no area inside the image"),
    ({"bbox": [0, 0, float("nan"), 1]}, "is not finite"),
    ({"bbox": [0, 0, float("inf"), 1]}, "is not finite"),
    ({"bbox": [0, 0, 10**400, 1]}, "a number of bbox is too large"),
    ({"bbox": [0, 0, 1]}, "expected x, y, width, height"),
    ({"bbox": ["0", 0, 1, 1]}, "a number of bbox is '0'; expected a number"),
    ({"category_id": 2}, "no category has the id 2"),
    ({"category_id": "cat"}, "category_id is 'cat'; expected a whole number"),
    ({"image_id": 9}, "no image has the id 9"),
    ({"image_id": True}, "no image has the id True"),
    ({"iscrowd": 2}, "iscrowd is 2; expected 0 or 1"),
    ({"id": 5000}, "an annotation before has this id"),
    ({"id": None}, "the id is None; expected a whole number"),
    ({"id": 2**63}, "expected a whole number"),
  ]
  for change, reason in rows:
    bad = [base | {"id": 5000}, base | {"id": 5001} | change]
    write_coco(tmp_path / "train.json", truth, annotations=good["annotations"] + bad)
    found = reasons("coco", "train", tmp_path, 1, caplog)
    assert f"annotations[{number + 1}]" in found and reason in found, (change, found)
    check_boxes = opened("coco", "train", tmp_path, on_bad="skip")
    assert len(check_boxes) == 6
  bad = [base | {"id": 6000 + i, "category_id": 2} for i in range(9)]
  write_coco(tmp_path / "train.json", truth, annotations=[7, *bad])
  found = reasons("coco", "train", tmp_path, 10, caplog)
  assert "annotations[0]: 7; expected an object" in found and found.endswith("; and 5 more")


def test_coco_names_its_bad_images(tmp_path, caplog):
  truth = draw(np.random.default_rng(1), 6)
  write_images(tmp_path / "images", truth)
  good = write_coco(tmp_path / "train.json", truth)["images"]
  (tmp_path / "out.png").write_bytes(b"")
  (tmp_path / "images" / "Other.PNG").write_bytes(b"")
  (tmp_path / "images" / "link.png").symlink_to("nowhere.png")
  rows = [
    ({"file_name": "gone.png"}, "no file 'gone.png'"),
    ({"file_name": "other.png"}, "no file 'other.png'; there is 'Other.PNG'"),
    ({"file_name": "link.png"}, "no file 'link.png'"),
    ({"file_name": "../out.png"}, "is not below the folder of the images"),
    ({"file_name": "..\\out.png"}, "is not below the folder of the images"),
    ({"file_name": str(tmp_path / "out.png")}, "is not below the folder of the images"),
    ({"file_name": "a\0"}, "no file 'a\\x00'"),
    ({"file_name": 3}, "the file name is 3; expected text"),
    ({"width": -4}, "the image is -4 wide and 5 high"),
    ({"width": "4"}, "width is '4'; expected a whole number"),
    ({"width": None, "height": None, "file_name": "Other.PNG"}, "the header of 'Other.PNG' cannot"),
    ({"id": None}, "expected an object with an id"),
  ]
  for change, reason in rows:
    new = {"id": 7, "file_name": "Other.PNG", "width": 4, "height": 5} | change
    lost = {"id": 9999, "image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}
    known = change.get("id", 7) is not None  # The annotation of a bad image goes with it.
    write_coco(tmp_path / "train.json", truth, images=[*good, new], annotations=[lost] * known)
    found = reasons("coco", "train", tmp_path, 1, caplog)
    assert "images[6]" in found and reason in found, (change, found)
  for new, reason in (
    ({"id": 102, "file_name": "Other.PNG"}, "several images have this id"),
    ({"id": 7, "file_name": good[2]["file_name"]}, "is images[2] (id 102), too"),
  ):
    new |= {"width": 4, "height": 5}
    write_coco(tmp_path / "train.json", truth, images=[*good, new], annotations=[])
    assert reason in reasons("coco", "train", tmp_path, 1 + ("several" in reason), caplog)


def test_coco_files_that_are_none(tmp_path):
  def refused(text: str | bytes, message: str) -> None:
    (tmp_path / "train.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
      opened("coco", "train", tmp_path)

  with pytest.raises(UserError, match=r"No annotations of split 'train'.*It has no \.json"):
    opened("coco", "train", tmp_path)
  refused("{", "is not JSON")
  refused(b"\xff\xfe\xfd", "is not JSON")
  refused("[" * 100_000, "is not JSON")
  refused("[]", "holds a JSON list")
  refused("{}", "'images' is None")
  refused('{"images": [], "annotations": []}', "neither categories")
  whole = '{"images": [], "annotations": [], "categories": %s}'
  refused(whole % '[{"id": 1, "name": "a"}]', "has no image that can be used")
  refused(
    whole % '[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]', "the id 1 is that of 'a', too"
  )
  refused(whole % '[{"id": "1", "name": "a"}]', "expected an object with a whole id")
  refused(whole % '[{"id": 1, "name": ""}]', "the name of class 0 is ''; expected text")
  refused(whole % '[{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]', "are the same class name")
  with pytest.raises(UserError, match=r"looked for val\.json.*It has train\.json"):
    opened("coco", "val", tmp_path, annotations="{split}.json")
  with pytest.raises(UserError, match="is no folder; data_dir="):
    opened("coco", "train", tmp_path / "nothing")
  write_coco(tmp_path / "train.json", draw(np.random.default_rng(0), 2))
  with pytest.raises(UserError, match=r"None of the first 2 images .*'a0\.png'. Give images='FOL"):
    opened("coco", "train", tmp_path)


def test_boxes_that_rounding_moved_outside_are_clipped(tmp_path, caplog):
  image = {"annotated_hw": (10, 20), "boxes": np.array([[-1, -0.5, 21, 10.75]], np.float32)}
  truth = {"a.png": image | {"box_labels": [0], "box_ids": [1], "box_crowd": [False]}}
  write_images(tmp_path / "images", truth)
  write_coco(tmp_path / "train.json", truth)
  record = opened("coco", "train", tmp_path)[0]
  assert record["boxes"].tolist() == [[0, 0, 20, 10]]
  assert "1 boxes reach outside their image by no more than rounding does; clipped" in caplog.text


def test_coco_captions(tmp_path, caplog):
  truth = without(draw(np.random.default_rng(0), 6), *(f"box{k}" for k in (
    "es", "_labels", "_ids", "_crowd", "_difficult")))  # fmt: skip
  write_images(tmp_path / "train", truth)
  images, annotations = [], []
  for number, (name, record) in enumerate(truth.items()):
    h, w = record["annotated_hw"]
    images.append({"id": number, "file_name": name, "height": h, "width": w})
    record["captions"] = tuple(f"{name}: {k}" for k in range(1 + number % 3))
    annotations += [{"id": 1, "image_id": number, "caption": f" {c}\n"} for c in record["captions"]]
  path = tmp_path / "annotations" / "captions_train.json"
  path.parent.mkdir()
  path.write_text(json.dumps({"images": images, "annotations": annotations}))
  source = opened("coco", "train", tmp_path)
  assert (source.num_classes, source.class_names) == (0, None)
  check(source, tmp_path, "train", truth)
  bad = [{"image_id": 0, "caption": " "}, {"image_id": 0}, {"image_id": 77, "caption": "a"}]
  images[5]["id"] = "five"
  path.write_text(json.dumps({"images": images, "annotations": annotations + bad}))
  found = reasons("coco", "train", tmp_path, 3 + 3 + 1, caplog)
  assert "no image has the id 5" in found
  assert "the caption is empty" in found and found.endswith("; and 2 more")


# --- YOLO ---


LAYOUTS = (("images/val", "labels/val"), ("val/images", "val/labels"), ("val", "val"))


def write_yolo(folder: Path, truth: Truth, layout: int, rng: np.random.Generator) -> Truth:
  """Writes labels, some of them as polygons; returns the truth, whose ids are lines of the files."""
  images, labels = LAYOUTS[layout]
  write_images(folder / images, truth)
  changed = {}
  for name, record in truth.items():
    h, w = record["annotated_hw"]
    lines, ids = [], []
    for (x0, y0, x1, y1), label in zip(record["boxes"], record["box_labels"], strict=True):
      if rng.random() < 0.3:
        lines.append("")
      if rng.random() < 0.3:
        points = [x0, y0, x1, y0, (x0 + x1) / 2, y1]
        numbers = [f"{v / n:.8f}" for v, n in zip(points, [w, h] * 3, strict=True)]
      else:
        numbers = [f"{(x0 + x1) / 2 / w}", f"{(y0 + y1) / 2 / h}"]
        numbers += [f"{(x1 - x0) / w:.9f}", f"{(y1 - y0) / h:.9f}"]
      lines.append(" ".join([str(label), *numbers]))
      ids.append(len(lines))
    changed[name] = record | {"box_ids": np.array(ids, np.int64)}
    if lines or rng.random() < 0.5:  # A missing file and an empty one are the same.
      path = (folder / labels / name).with_suffix(".TXT" if rng.random() < 0.3 else ".txt")
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
  (folder / labels).mkdir(parents=True, exist_ok=True)
  return without(changed, "box_crowd", "box_difficult")


YAMLS = (
  "path: ../datasets/x\nnc: 5\nnames: [no, cat, Übelkeit, two words, 7]\n",
  'names:\n  1: cat\n  0: no\n  2: Übelkeit\n  3: "two words"\n  4: 7\n',
)


@pytest.mark.parametrize("seed", range(4))
def test_yolo_gives_back_what_was_written(tmp_path, seed):
  rng = np.random.default_rng(seed)
  truth = write_yolo(tmp_path, draw(rng), seed % 3, rng)
  (tmp_path / "data.yaml").write_text(YAMLS[seed // 2], "utf-8-sig")
  labels = tmp_path / LAYOUTS[seed % 3][1]
  for name in ("._a0.txt", "classes.txt", "train.cache"):
    (labels / name).write_bytes(b"\0\xff")
  source = opened("yolo", "val", tmp_path)
  assert (source.num_classes, source.class_names) == (5, NAMES)
  check(source, tmp_path, LAYOUTS[seed % 3][0], truth, atol=1e-4)


def test_yolo_names_its_bad_rows(tmp_path, caplog):
  truth = draw(np.random.default_rng(0), 2)
  write_images(tmp_path / "images" / "train", truth)
  (tmp_path / "labels" / "train").mkdir(parents=True)
  (tmp_path / "data.yaml").write_text(YAMLS[0])
  rows = [
    ("0 .5 .5 .5", "4 fields; expected 'class cx cy w h'"),
    ("0 .5 .5 .5 .5 .9", "6 fields"),
    ("0 .1 .1 .2 .2 .3 .3 .4", "8 fields"),
    ("5 .5 .5 .5 .5", "the class is 5; expected 0..4"),
    ("-1 .5 .5 .5 .5", "the class is -1"),
    ("0.5 .5 .5 .5 .5", "the class is 0.5"),
    ("cat .5 .5 .5 .5", "are not numbers"),
    ("0 nan .5 .5 .5", "are not finite"),
    ("nan .5 .5 .5 .5", "are not finite"),
    ("0 .5 .5 0 .5", "has no area"),
    ("0 .5 .5 .5 -.5", "has no area"),
    ("0 .5 .5 1.0022 .5", "is outside the image, which is 1 wide and 1 high"),
    ("0 320 240 100 100", "is outside the image"),
    ("0 .1 .1 .2 .1 .3 .1", "has no area"),
  ]
  path = tmp_path / "labels" / "train" / "a0.txt"
  for row, reason in rows:
    path.write_text(f"0 .5 .5 1.0019 .5\n\n{row}\n")
    found = reasons("yolo", "train", tmp_path, 1, caplog)
    assert "a0.txt line 3" in found and reason in found, (row, found)
  path.write_bytes(b"\xff\xfe\xfd")
  assert "a0.txt is not UTF-8" in reasons("yolo", "train", tmp_path, 1, caplog)
  path.with_name("B c1.txt").write_text("")
  path.rename(path.with_name("a7.txt"))
  assert "a7.txt: no image a7" in reasons("yolo", "train", tmp_path, 1, caplog)
  path.with_name("B c1.txt").unlink()
  with pytest.raises(UserError, match=r"None of the 2 images in .* has labels in .*B c1\.txt"):
    opened("yolo", "train", tmp_path)
  path.with_name("a7.txt").rename(path)
  path.write_text("")
  (tmp_path / "images" / "train" / "a0.bmp").write_bytes(b"")
  assert "2 images: 'a0.bmp' and 'a0.png'" in reasons("yolo", "train", tmp_path, 1, caplog)


def test_yolo_folders_and_names_that_are_none(tmp_path):
  def refused(message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
      opened("yolo", "train", tmp_path, **options)

  refused("No class names in")
  (tmp_path / "classes.txt").write_text("a\n\nb\n")
  refused(r"No folder images/train or train/images or train in .* has no folder")
  (tmp_path / "images" / "val").mkdir(parents=True)
  refused(r"images has val")
  (tmp_path / "train").mkdir()
  refused("has no image that can be used")
  (tmp_path / "images" / "train").mkdir()
  refused(r"has no labels: expected the folder .*labels/train")
  (tmp_path / "labels" / "train").mkdir(parents=True)
  refused("has no image that can be used")
  refused(r"No file .*names\.json", classes="names.json")
  for text, message in (
    (f"names: !!python/object/apply:os.mkdir ['{tmp_path}/made']", "has no image that can be"),
    ("names: {0: a, 2: b}", "the numbers of the 2 classes are 0, 2; expected 0 to 1"),
    ("names: []", "names no class"),
    ("names: [a, a]", "are the same class name"),
    ("names: [a, [b]]", r"the name of class 1 is \['b'\]"),
    ("nc: 3", "has no list of names, but NoneType"),
    ("- a", "is no mapping"),
    ("names: [a", "is not YAML"),
    ("kpt_shape: [17, 3]\nnames: [a]", "labels of keypoints"),
  ):
    (tmp_path / "data.yaml").write_text(text)
    refused(message)
  assert not (tmp_path / "made").exists()


def test_yolo_boxes_are_of_the_image_as_it_is_turned(tmp_path):
  (tmp_path / "images" / "train").mkdir(parents=True)
  (tmp_path / "labels" / "train").mkdir(parents=True)
  (tmp_path / "classes.json").write_text('["a"]')
  exif = Image.Exif()
  exif[0x0112] = 6
  for suffix in ("jpg", "png", "webp", "tif"):
    Image.new("RGB", (40, 20)).save(tmp_path / "images" / "train" / f"{suffix}.{suffix}", exif=exif)
    (tmp_path / "labels" / "train" / f"{suffix}.txt").write_text("0 .5 .25 1 .5")
  for record in opened("yolo", "train", tmp_path).read(range(4)):
    assert record["annotated_hw"] == (40, 20)
    assert decode_image(record["image"], max_pixels=1000, exif=True).shape == (40, 20, 3)
    assert record["boxes"].tolist() == [[0, 0, 20, 20]]
  for record in opened("yolo", "train", tmp_path, upright=False).read(range(4)):
    hw = decode_image(record["image"], max_pixels=1000).shape[:2]
    assert header_hw(record["image"]) == record["annotated_hw"] == hw
  path = tmp_path / "images" / "train" / "jpg.jpg"
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(UserError, match=r"the header of 'images/train/jpg\.jpg' cannot be read"):
    opened("yolo", "train", tmp_path).read(range(4))


# --- Pascal VOC ---


def voc_xml(record: dict[str, Any], **changes: str) -> str:
  h, w = record["annotated_hw"]
  texts = {"size": f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"} | changes
  rows = zip(*(record[f"box{k}"] for k in ("es", "_labels", "_difficult")), strict=True)
  for (x0, y0, x1, y1), label, difficult in rows:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (x0 + 1, y0 + 1, x1, y1), strict=True)
    bndbox = "".join(f"<{key}>{value:g}</{key}>" for key, value in corners)
    part = "<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"
    flag = "<difficult>1</difficult>" if difficult else ""
    texts["objects"] = texts.get("objects", "") + (
      f"\n<object><name>{NAMES[label]}</name>{flag}<bndbox>{bndbox}</bndbox>{part}</object>"
    )
  return f"<annotation><folder>C:\\x</folder>{''.join(texts.values())}</annotation>"


def write_voc(folder: Path, truth: Truth, names: bool = True) -> Truth:
  write_images(folder / "JPEGImages", truth)
  (folder / "Annotations").mkdir(exist_ok=True)
  for name, record in truth.items():
    path = folder / "Annotations" / Path(name).with_suffix(".xml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(voc_xml(record).replace("\n", "\r\n").encode("utf-8-sig"))
  if names:
    (folder / "classes.txt").write_text("\n".join(NAMES) + "\n")
  ids = {n: r | {"box_ids": np.arange(len(r["boxes"])) + 1} for n, r in truth.items()}
  return without(ids, "box_crowd")


@pytest.mark.parametrize("seed", range(3))
def test_voc_gives_back_what_was_written(tmp_path, seed):
  truth = draw(np.random.default_rng(seed), flat=True)
  expected = write_voc(tmp_path, truth)
  check(opened("voc", "all", tmp_path), tmp_path, "JPEGImages", expected)
  lists = tmp_path / "ImageSets" / "Main"
  lists.mkdir(parents=True)
  chosen = list(expected)[:5]
  forms = ("{}\r\n", "{}  -1\r\n", "{}.jpg\r\n")
  lines = [forms[i % 3].format(Path(name).stem) for i, name in enumerate(chosen)]
  (lists / "train.txt").write_text("".join(lines) + "\n", "utf-8-sig", newline="")
  source = opened("voc", "train", tmp_path)
  assert (source.num_classes, source.class_names) == (5, NAMES)
  check(source, tmp_path, "JPEGImages", {name: expected[name] for name in chosen})
  (tmp_path / "classes.txt").unlink()
  labels = np.concatenate([record["box_labels"] for record in truth.values()])
  names = tuple(sorted({NAMES[label] for label in labels}))
  assert opened("voc", "train", tmp_path).class_names == names


def test_voc_names_its_bad_rows(tmp_path, caplog):
  truth = draw(np.random.default_rng(0), 3, flat=True)
  write_voc(tmp_path, truth)
  path = tmp_path / "Annotations" / "a0.xml"
  record = truth["a0.png"] | {"annotated_hw": (10, 20)}
  box = "<xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax>"
  rows = [
    ("<name>dog</name>", "1 1 2 2", "no class is called 'dog'"),
    ("", "1 1 2 2", "no class is called ''"),
    ("<name>cat</name>", "1 1 22 2", "is outside the image, which is 20 wide and 10 high"),
    ("<name>cat</name>", "5 1 4 2", "has no area"),
    ("<name>cat</name>", "nan 1 4 2", "is not finite"),
    ("<name>cat</name>", "x 1 4 2", "expected xmin, ymin, xmax, ymax"),
    ("<name>cat</name><difficult>2</difficult>", "1 1 2 2", "difficult is '2'; expected 0 or 1"),
  ]
  for head, corners, reason in rows:
    bndbox = box.format(*corners.split())
    object_ = f"\n\n<object>{head}<bndbox>{bndbox}</bndbox></object>"
    path.write_text(voc_xml(record, bad=object_))
    found = reasons("voc", "all", tmp_path, 1, caplog)
    assert "a0.xml line 3 (object 1)" in found and reason in found, (corners, found)
  bomb = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation>&b;</annotation>'
  )
  for text, reason in (
    (bomb, "declares a document type, which is not read"),
    (bomb.encode("utf-16"), "declares a document type, which is not read"),
    ("<annotation><object></annotation>", "the file is not XML: mismatched tag"),
    ("", "the file is not XML: no element found"),
    (voc_xml(record, size="<size><width>-3</width></size>"), "the width in size is '-3'"),
    (voc_xml(record, size="<size><width>3</width></size>"), "height is None; expected a whole"),
  ):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = reasons("voc", "all", tmp_path, 1, caplog)
    assert "a0.xml: " in found and reason in found, (text, found)


def test_voc_images_lists_and_sizes(tmp_path, caplog):
  truth = draw(np.random.default_rng(2), 4, flat=True)
  expected = write_voc(tmp_path, truth)
  path = tmp_path / "Annotations" / "a0.xml"
  for size in ("", "<size><width>0</width><height>0</height></size>"):  # Then the header's.
    path.write_text(voc_xml(truth["a0.png"], size=size))
    check(opened("voc", "all", tmp_path), tmp_path, "JPEGImages", expected)
  image = tmp_path / "JPEGImages" / "a0.png"
  image.rename(image.with_name("photo.png"))
  path.write_text(voc_xml(truth["a0.png"], filename="<filename>C:\\my\\photo.png</filename>"))
  expected["photo.png"] = expected.pop("a0.png")
  check(opened("voc", "all", tmp_path), tmp_path, "JPEGImages", expected)
  path.write_text(voc_xml(truth["a0.png"]))
  assert "no image a0 in JPEGImages" in reasons("voc", "all", tmp_path, 1, caplog)
  lists = tmp_path / "ImageSets" / "Main"
  lists.mkdir(parents=True)
  (lists / "train.txt").write_text("B c1\nB c1\ngone\n")
  found = reasons("voc", "train", tmp_path, 2, caplog)
  assert "train.txt line 2 (B c1): train.txt line 1 (B c1) is the same" in found
  assert "train.txt line 3 (gone): no annotations" in found
  with pytest.raises(UserError, match=r"split of .*'trian'; known: all, train\. Did you mean"):
    opened("voc", "trian", tmp_path)
  with pytest.raises(UserError, match=r"No folder .*Annotations; expected"):
    opened("voc", "all", tmp_path / "JPEGImages")


# --- masks ---


@pytest.mark.parametrize("seed", range(4))
def test_masks_give_back_what_was_written(tmp_path, seed):
  images = ("images/val", "images/val", "val/images", "val")[seed]
  masks = ("masks/val", "annotations/val", "val/masks", "val_masks")[seed]
  rng = np.random.default_rng(seed)
  truth = {name: {"annotated_hw": r["annotated_hw"]} for name, r in draw(rng).items()}
  write_images(tmp_path / images, truth)
  drawn = {}
  for i, (name, record) in enumerate(truth.items()):
    drawn[name] = rng.integers(0, 5, record["annotated_hw"], np.uint8)
    mask = Image.fromarray(drawn[name])
    if i % 2:
      mask.putpalette(rng.bytes(768))
    path = (tmp_path / masks / name).with_suffix(".PNG" if i % 3 else ".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    mask.save(path, "PNG")
    record |= {"mask": path.read_bytes(), "mask_ignore": 11}
  (tmp_path / "classes.txt").write_text("\r\n".join(NAMES), "utf-8-sig", newline="")
  source = opened("masks", "val", tmp_path, ignore=11)
  assert (source.num_classes, source.class_names) == (5, NAMES)
  check(source, tmp_path, images, truth)
  for record in source.read(range(len(source))):
    mask = np.asarray(Image.open(io.BytesIO(record["mask"])))
    np.testing.assert_array_equal(mask, drawn[str(Path(record["id"]).relative_to(images))])
  options = {"images": images.replace("val", "{split}"), "masks": masks.replace("val", "{split}")}
  assert len(opened("masks", "val", tmp_path, **options, num_classes=5)) == 12


def test_masks_name_their_bad_rows(tmp_path, caplog):
  for name in ("a", "b"):
    for folder, mode in (("images", "RGB"), ("masks", "L")):
      (tmp_path / folder / "train").mkdir(parents=True, exist_ok=True)
      Image.new(mode, (4, 3)).save(tmp_path / folder / "train" / f"{name}.png")
  path = tmp_path / "masks" / "train" / "b.png"
  good = path.read_bytes()
  options = {"num_classes": 3}
  for mode, reason in (("RGB", "colours"), ("RGBA", "colours and alpha"), ("LA", "grey and")):
    Image.new(mode, (4, 3)).save(path)
    found = reasons("masks", "train", tmp_path, 1, caplog, **options)
    assert f"b: the mask has {reason}" in found and "expected grey or palette" in found
  for content in (b"", good[:20], b"\xff\xd8" + good[2:]):
    path.write_bytes(content)
    assert "b: the mask is no PNG" in reasons("masks", "train", tmp_path, 1, caplog, **options)
  path.rename(path.with_name("c\n.png"))
  found = reasons("masks", "train", tmp_path, 2, caplog, **options)
  assert "b: no masks (.png); c\\n: no images" in found


def test_masks_whose_names_end_otherwise_than_the_images(tmp_path):
  for city in ("a", "b"):
    for folder, mode, ends in (
      ("left", "RGB", ("_left.png",)),
      ("fine", "L", ("_color.png", "_ids.png", "_instances.png")),
    ):
      (tmp_path / folder / "val" / city).mkdir(parents=True)
      for end in ends:
        Image.new(mode, (4, 3), len(end)).save(tmp_path / folder / "val" / city / f"{city}0{end}")
  options = {"images": "left/{split}/**/*_left.png", "masks": "fine/{split}/*_ids.png"}
  source = opened("masks", "val", tmp_path, num_classes=9, **options)
  assert sorted(record["id"] for record in source.read([0, 1])) == [
    f"left/val/{city}/{city}0_left.png" for city in "ab"
  ]
  for record in source.read([0, 1]):
    assert np.asarray(Image.open(io.BytesIO(record["mask"])))[0, 0] == len("_ids.png")
  with pytest.raises(UserError, match=r"expected FOLDER, or FOLDER/\*END"):
    opened("masks", "val", tmp_path, num_classes=9, images="left/*/*.png", masks="fine/*.png")
  with pytest.raises(UserError, match=r"None of the 2 images in .*left/val has a mask in"):
    opened("masks", "val", tmp_path, num_classes=9, images="left/{split}", masks="fine/{split}")


def test_hidden_folders_and_loops_are_no_data(tmp_path, caplog):
  root = tmp_path / "my [data] 100%"
  for folder, mode in (("images", "RGB"), ("masks", "L")):
    (root / folder / "train" / ".ipynb_checkpoints").mkdir(parents=True)
    Image.new(mode, (4, 3)).save(root / folder / "train" / "a.png")
    Image.new(mode, (4, 3)).save(root / folder / "train" / ".ipynb_checkpoints" / "b.png")
    (root / folder / "train" / "up").symlink_to("..")
  (root / "labels").mkdir()
  (root / "labels" / "train").symlink_to("../texts")
  (root / "texts").mkdir()
  (root / "texts" / "a.txt").write_text("0 .5 .5 1 1")
  (root / "classes.txt").write_text("a\nb")
  assert len(opened("masks", "train", root)) == len(opened("yolo", "train", root)) == 1
  assert "images/train: left out 1 hidden or system folder, 1 folder reached twice" in caplog.text


def test_masks_need_folders_and_classes(tmp_path):
  def refused(message: str, **options: Any) -> None:
    with pytest.raises(UserError, match=message):
      opened("masks", "train", tmp_path, **options)

  refused("No class names in")
  refused(r"looked for images/train with masks/train.* no folder", num_classes=3)
  refused("Give both images= and masks=", num_classes=3, images="a")
  refused(r"num_classes=0; expected 1 or more", num_classes=0)
  refused("ignore=-1 with 3 classes", num_classes=3, ignore=-1)
  refused("ignore=255 with 300 classes", num_classes=300)
  (tmp_path / "classes.json").write_text('{"0": "a", "1": "b"}')
  refused(r"num_classes=3; .*classes\.json has 2 names", num_classes=3)


# --- captions ---


def write_captions(path: Path, rows: list[tuple[str, Any]], key: str) -> None:
  if path.suffix == ".csv":
    with path.open("w", encoding="utf-8-sig", newline="") as file:
      writer = csv.writer(file)
      writer.writerows([("file_name", "other", key), *((name, "x", text) for name, text in rows)])
  else:
    lines = [json.dumps({"file_name": n, key: t}, ensure_ascii=False) for n, t in rows]
    path.write_bytes("\r\n".join([*lines, ""]).encode("utf-8-sig"))


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("key", ["text", "caption"])
def test_captions_give_back_what_was_written(tmp_path, caplog, suffix, key):
  rng = np.random.default_rng(len(key))
  truth = draw(rng)
  write_images(tmp_path / "val", truth)
  texts = ("one, two", 'he said "no"', "two\nlines", "sep\u2028arator", "日本", "a;b\tc")
  rows, expected = [], {name: {"captions": ()} for name in truth}
  for _ in range(40):
    name = list(truth)[int(rng.integers(1, len(truth)))]
    rows.append((name, f"{texts[int(rng.integers(len(texts)))]}{len(rows)}"))
    expected[name]["captions"] += (rows[-1][1],)
  expected = {name: record for name, record in expected.items() if record["captions"]}
  written = [(name.replace("/", "\\"), text) for name, text in rows]
  write_captions(tmp_path / "val" / f"metadata.{suffix}", written, key)
  source = opened("captions", "val", tmp_path, captions_key=key)
  assert (source.num_classes, source.class_names) == (0, None)
  records = {r["id"]: r for r in source.read(range(len(source)))}
  assert {n: r["captions"] for n, r in records.items()} == {
    f"val/{name}": record["captions"] for name, record in expected.items()
  }
  assert all(r.keys() == {"image", "id", "captions"} for r in records.values())
  left = len(truth) - len(expected)
  assert f"{left} images have no caption and are left out" in caplog.text
  (tmp_path / "val" / f"metadata.{suffix}").rename(tmp_path / f"metadata.{suffix}")
  with pytest.raises(UserError, match=r"val: expected metadata\.jsonl or metadata\.csv; neither"):
    opened("captions", "val", tmp_path, captions_key=key)


def test_captions_name_their_bad_rows(tmp_path, caplog):
  write_images(tmp_path / "train", draw(np.random.default_rng(0), 2))
  path = tmp_path / "train" / "metadata.jsonl"
  good = '{"file_name": "a0.png", "text": ["a", "b"]}'
  for row, reason in (
    ('{"file_name": "gone.png", "text": "a"}', "no file 'gone.png'"),
    ('{"file_name": "../x.png", "text": "a"}', "is not below the folder"),
    ('{"file_name": "a0.png", "text": ""}', "the caption is empty"),
    ('{"file_name": "a0.png", "text": " \\t"}', "the caption is empty"),
    ('{"file_name": "a0.png", "text": null}', "the caption is None; expected text"),
    ('{"file_name": "a0.png", "text": []}', "the list of captions is empty"),
    ('{"file_name": "a0.png", "text": NaN}', "the caption is nan"),
    ('{"file_name": "a0.png", "text": "\\ud800"}', "is no Unicode text"),
    ('{"file_name": "a0.png"}', "no 'text'; it has file_name"),
    ("[1]", "[1]; expected an object"),
    ("{", "not JSON"),
  ):
    path.write_text(f"{good}\n\n{row}\n")
    found = reasons("captions", "train", tmp_path, 1, caplog)
    assert "line 3: " in found and reason in found, (row, found)
  assert opened("captions", "train", tmp_path, on_bad="skip")[0]["captions"] == ("a", "b")
  path.unlink()
  path = path.with_suffix(".csv")
  path.write_text('file_name,text\na0.png,"a, b"\na0.png,a,b\na0.png\n\na0.png,\n')
  found = reasons("captions", "train", tmp_path, 3, caplog)
  assert "line 3: 3 fields; expected 2; line 4: 1 fields" in found and "line 6: the cap" in found
  for text, message in (
    ("file_name,label\na0.png,a\n", r"the columns 'file_name', 'label'; expected one 'text'"),
    ("", "the columns none"),
    ('file_name,text\na0.png,"a\n', r"metadata\.csv line 2: unexpected end"),
  ):
    path.write_text(text)
    with pytest.raises(UserError, match=message):
      opened("captions", "train", tmp_path)
  with pytest.raises(UserError, match=r"'tran'; known: train\. Did you mean 'train'"):
    opened("captions", "tran", tmp_path)
  path.write_text("file_name,text\na0.png,a\n")
  path.with_suffix(".jsonl").write_text(good)
  with pytest.raises(UserError, match="both are there"):
    opened("captions", "train", tmp_path)
  path.with_suffix(".jsonl").unlink()
  path.with_name("more.csv").write_text("file_name,text\ntrain/a0.png,a\n")
  path.with_name("more.csv").rename(tmp_path / "metadata.csv")
  assert opened("captions", "all", tmp_path)[0]["id"] == "train/a0.png"


# --- all of them ---


def test_class_sizes_count_boxes(tmp_path):
  truth = draw(np.random.default_rng(0), 6)
  write_images(tmp_path / "images", truth)
  write_coco(tmp_path / "train.json", truth)
  labels = [record["box_labels"] for record in truth.values()]
  counts = np.bincount(np.concatenate(labels), minlength=5)
  named = ", ".join(f"{name} {count}" for name, count in zip(NAMES, counts, strict=True))
  source = opened("coco", "train", tmp_path)
  assert class_sizes(source) == (
    f"5 classes: {named}; 0 to {max(map(len, labels))} boxes in each of 6 images"
  )


def test_records_of_boxes_go_into_batches(tmp_path):
  box = {"box_labels": [1], "box_ids": [3], "box_crowd": [True]}
  image = {"annotated_hw": (8, 8), "boxes": np.array([[0, 1, 2, 3]], np.float32), **box}
  truth = {f"{i}.png": image | {"box_ids": [i]} for i in range(5)}
  write_images(tmp_path / "images", truth)
  write_coco(tmp_path / "train.json", truth)
  source = planned_source(name="coco", split="train", data_dir=tmp_path)
  assert len(source) == 5 and "decode" in OPS
  batch = next(iter(eval_batches(source, "decode|value_range", batch_size=5, threads=0)))
  assert batch["boxes"].shape == (5, 1, 4) and batch["box_labels"].tolist() == [[1]] * 5
  assert sorted(batch["box_ids"].ravel().tolist()) == list(range(5))
  first = source[0]
  first["boxes"] += 1  # A record is its reader's own.
  assert source[0]["boxes"].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("name", ["coco", "yolo", "voc", "masks", "captions"])
def test_arguments_that_no_format_takes(name, tmp_path):
  with pytest.raises(UserError, match=rf"'{name}' takes no 'label_key'; it takes"):
    opened(name, "train", tmp_path, label_key="a")
  with pytest.raises(UserError, match=r"on_bad 'skp'; known: raise, skip\. Did you mean 'skip'"):
    opened(name, "train", tmp_path, on_bad="skp")
  with pytest.raises(UserError, match="To plan, give the data set"):
    planned_source(name=name, split="train", data_dir=tmp_path)


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
  """The same with a few bytes removed, replaced or put in between."""
  pieces = [
    b"<",
    b"&a;",
    b"<!DOCTYPE x>",
    b"\n",
    b",",
    b'"',
    b"nan",
    b"1e999",
    b"-1",
    b"\xff",
    b"[",
    b"{",
    b"\0",
  ]
  for _ in range(int(rng.integers(1, 4))):
    start, length = int(rng.integers(len(content))), int(rng.integers(4))
    piece = pieces[int(rng.integers(len(pieces)))] if rng.random() < 0.8 else b""
    content = content[:start] + piece + content[start + length :]
  return content


@pytest.mark.parametrize("name", ["coco", "yolo", "voc", "captions"])
def test_damaged_annotations_are_refused_or_give_boxes_inside_their_images(tmp_path, name):
  rng = np.random.default_rng(0)
  truth = draw(rng, 4, flat=True)
  if name == "yolo":
    write_yolo(tmp_path, truth, 0, rng)
    (tmp_path / "data.yaml").write_text(YAMLS[1])
    path = next((tmp_path / "labels").rglob("*.[tT][xX][tT]"))
  elif name == "voc":
    write_voc(tmp_path, truth)
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    (tmp_path / "ImageSets" / "Main" / "val.txt").write_text("\n".join(Path(n).stem for n in truth))
    path = tmp_path / "Annotations" / "B c1.xml"
  else:
    write_images(tmp_path / "val", truth)
    path = tmp_path / ("val.json" if name == "coco" else "val/metadata.csv")
    if name == "coco":
      write_coco(path, truth)
    else:
      write_captions(path, [(key, f"a photo, {key}") for key in truth], "text")
  content, good = path.read_bytes(), 0
  for _ in range(40):
    path.write_bytes(damaged(content, rng))
    try:
      source = opened(name, "val", tmp_path, on_bad="skip")
    except UserError:
      continue
    good += 1
    for record in source.read(range(len(source))) if name != "captions" else ():
      boxes, (h, w) = record["boxes"], record["annotated_hw"]
      assert np.isfinite(boxes).all() and (boxes[:, :2] < boxes[:, 2:]).all()
      assert (boxes >= 0).all() and (boxes[:, 2:] <= (w, h)).all()
  assert good


# --- real data ---


@pytest.mark.shared
def test_blood_cells_in_coco_format(shared, tmp_path):
  with zipfile.ZipFile(shared / "data" / "bccd_320x240.zip") as file:
    file.extractall(tmp_path)
  counts = {
    "train": (205, [2381, 214, 209]),
    "val": (87, [967, 87, 83]),
    "test": (72, [805, 71, 69]),
  }
  for split, (images, boxes) in counts.items():
    source = opened("coco", split, tmp_path)
    assert (len(source), source.class_names[2]) == (images, "platelet")
    records = source.read(range(images))
    labels = np.concatenate([record["box_labels"] for record in records])
    assert np.bincount(labels).tolist() == boxes
    for record in records:
      assert header_hw(record["image"]) == record["annotated_hw"] == (240, 320)
  sides = np.concatenate([record["boxes"] for record in records])
  assert (sides[:, 2:] - sides[:, :2]).min() >= 9.5


@pytest.mark.shared
def test_driving_photos_with_masks(shared, tmp_path):
  with zipfile.ZipFile(shared / "data" / "camvid_240x320.zip") as file:
    names = [n for n in file.namelist() if n.startswith("val") or n == "classes.json"]
    file.extractall(tmp_path, names)
  source = opened("masks", "val", tmp_path, ignore=11)
  assert (len(source), source.num_classes, source.class_names[8]) == (101, 11, "car")
  for record in source.read(range(0, 101, 10)):
    mask = np.asarray(Image.open(io.BytesIO(record["mask"])))
    assert mask.shape == record["annotated_hw"] == header_hw(record["image"]) and mask.max() <= 11


@pytest.mark.shared
def test_emoji_with_captions(shared, tmp_path):
  stored = np.load(shared / "data" / "emoji_captions_96.npz")
  meta, ends, webp = json.loads(stored["meta"].tobytes()), stored["offsets"], stored["webp"]
  (tmp_path / "all").mkdir()
  with (tmp_path / "all" / "metadata.jsonl").open("w", encoding="utf-8") as file:
    for i in range(0, len(meta), 30):
      image = webp[ends[i] : ends[i + 1]].tobytes()
      (tmp_path / "all" / f"{meta[i]['hexcode']}.webp").write_bytes(image)
      for key in ("label_en", "label_ja"):
        row = {"file_name": f"{meta[i]['hexcode']}.webp", "text": meta[i][key]}
        file.write(json.dumps(row) + "\n")
  source = opened("captions", "all", tmp_path)
  found = {record["id"]: record["captions"] for record in source.read(range(len(source)))}
  assert found == {f"all/{m['hexcode']}.webp": (m["label_en"], m["label_ja"]) for m in meta[::30]}
