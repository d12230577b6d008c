"""Sources give the right examples, and say what is wrong with a request."""

import dataclasses
import io
import json
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import label_maps, renumber
from flexivit_jax.data.loader import eval_batches
from flexivit_jax.data.sources import make_source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

COLOURS = {"apple": (200, 20, 20), "lime": (20, 200, 20), "plum": (90, 20, 120)}


def picture(colour: tuple[int, int, int], size: int = 6) -> Image.Image:
  return Image.new("RGB", (size, size), colour)


# --- digits ---


def test_digits_are_all_of_them_once():
  train, test = (make_source(name="digits", split=s) for s in ("train", "test"))
  assert (len(train), len(test)) == (1437, 360)
  assert train.num_classes == 10
  assert train.class_names == tuple("0123456789")
  ids = [s[i]["id"] for s in (train, test) for i in range(len(s))]
  assert len(set(ids)) == 1797
  assert [train[i]["id"] for i in range(3)] == ["digits_0360", "digits_1773", "digits_1482"]


def test_digits_are_scikit_learns():
  from sklearn.datasets import load_digits

  images, labels = load_digits(return_X_y=True)
  record = make_source(name="digits", split="test")[7]
  row = int(record["id"].split("_")[1])
  assert record["label"] == labels[row]
  assert record["image"].dtype == np.uint8
  for channel in range(3):
    grey = record["image"][..., channel] / 255 * 16
    np.testing.assert_allclose(grey, images[row].reshape(8, 8), atol=0.04)


def test_split_syntax():
  train = make_source(name="digits", split="train")
  part = make_source(name="digits", split="train[10%:20%]")
  assert len(part) == 143
  assert part[0]["id"] == train[144]["id"]
  both = make_source(name="digits", split="test+train[:5]")
  assert (len(both), both[360]["id"]) == (365, train[0]["id"])


def test_indices_outside_are_errors():
  test = make_source(name="digits", split="test[:5]")
  for index in (-1, 5):
    with pytest.raises(IndexError, match="5 examples"):
      test[index]


# --- synthetic ---


def test_synthetic_is_a_function_of_seed_and_index():
  options = {"name": "synthetic", "split": "train", "image_size": (12, 20), "num_examples": 40}
  first, second = make_source(**options), make_source(**options)
  other = make_source(**options, seed=1)
  assert first[7]["image"].shape == (12, 20, 3)
  np.testing.assert_array_equal(first[7]["image"], second[7]["image"])
  assert not np.array_equal(first[7]["image"], other[7]["image"])
  assert not np.array_equal(first[7]["image"], first[17]["image"])


def test_synthetic_splits_differ_and_labels_are_balanced():
  parts = [
    make_source(name="synthetic", split=s, num_classes=4, num_examples=20)
    for s in ("train", "test")
  ]
  assert not np.array_equal(parts[0][0]["image"], parts[1][0]["image"])
  for part in parts:
    labels = [part[i]["label"] for i in range(20)]
    assert np.bincount(labels).tolist() == [5] * 4


def test_synthetic_classes_can_be_learned():
  """Nearest class mean of the amplitude spectrum, on examples not used for the means."""

  def features(split):
    source = make_source(name="synthetic", split=split, num_classes=5, num_examples=100)
    records = [source[i] for i in range(100)]
    spectra = [np.abs(np.fft.rfft2(r["image"] / 255.0, axes=(0, 1)))[:5, :5] for r in records]
    return np.stack(spectra).reshape(100, -1), np.array([r["label"] for r in records])

  (train, labels), (test, expected) = features("train"), features("test")
  means = np.stack([train[labels == k].mean(0) for k in range(5)])
  found = ((test[:, None] - means) ** 2).sum(-1).argmin(-1)
  assert (found == expected).mean() > 0.9


# --- folder ---


@pytest.fixture
def photos(tmp_path):
  for split, count in (("train", 3), ("test", 1)):
    for name, colour in COLOURS.items():
      (tmp_path / split / name).mkdir(parents=True)
      for i in range(count):
        suffix = ("png", "JPG", "webp")[i]
        picture(colour).save(tmp_path / split / name / f"{i}.{suffix}")
  return tmp_path


def test_folder(photos):
  train = make_source(name="folder", split="train", data_dir=photos)
  assert (len(train), train.num_classes) == (9, 3)
  assert train.class_names == ("apple", "lime", "plum")
  records = {r["id"]: r for r in train.read(range(9))}
  assert sorted(r["label"] for r in records.values()) == [0, 0, 0, 1, 1, 1, 2, 2, 2]
  lime = records["train/lime/1.JPG"]
  assert lime["label"] == 1
  assert lime["image"] == (photos / "train" / "lime" / "1.JPG").read_bytes()
  assert len(make_source(name="folder", split="train[:34%]+test", data_dir=str(photos))) == 6


def test_the_listing_is_the_records_without_their_images(photos):
  for options in ({"name": "folder", "split": "train+test"}, {"name": "images", "split": "all"}):
    source = make_source(**options, data_dir=photos)
    records = source.read(range(len(source)))
    assert list(source.listing()) == [{k: v for k, v in r.items() if k != "image"} for r in records]


def test_parts_of_a_folder_have_all_classes(photos):
  for name in COLOURS:
    for i in range(20):
      (photos / "train" / name / f"more{i}.png").write_bytes(b"")
  parts = [
    make_source(name="folder", split=f"train[{p}]", data_dir=photos) for p in (":80%", "80%:")
  ]
  records = [part.read(range(len(part))) for part in parts]
  assert [{r["label"] for r in part} for part in records] == [{0, 1, 2}, {0, 1, 2}]
  assert len({r["id"] for part in records for r in part}) == 69


def test_folder_classes_are_those_of_train(photos):
  for path in (photos / "test" / "apple").iterdir():
    path.unlink()
  (photos / "test" / "apple").rmdir()
  test = make_source(name="folder", split="test", data_dir=photos)
  assert sorted(test[i]["label"] for i in range(len(test))) == [1, 2]
  assert test.class_names == ("apple", "lime", "plum")
  (photos / "test" / "aple").mkdir()
  with pytest.raises(UserError, match=r"class folder.*'aple'.*Did you mean 'apple'"):
    make_source(name="folder", split="test", data_dir=photos)


def test_folders_that_are_numbers_are_labels_in_the_order_of_numbers(tmp_path):
  for k in range(12):
    (tmp_path / "val" / str(k)).mkdir(parents=True)
    picture((k, 0, 0)).save(tmp_path / "val" / str(k) / "a.png")
  source = make_source(name="folder", split="val", data_dir=tmp_path)
  assert source.class_names == tuple(map(str, range(12)))
  labels = {r["id"]: r["label"] for r in source.read(range(12))}
  assert labels == {f"val/{k}/a.png": k for k in range(12)}


def test_a_class_folder_is_the_same_in_both_forms_of_unicode(tmp_path):
  for split, form in (("train", "NFD"), ("val", "NFC")):
    for name in ("café", "tee"):
      folder = tmp_path / split / unicodedata.normalize(form, name)
      folder.mkdir(parents=True)
      picture((0, 0, 0)).save(folder / "a.png")
  for split in ("train", "val"):
    source = make_source(name="folder", split=split, data_dir=tmp_path)
    labels = {r["id"].split("/")[1]: r["label"] for r in source.read(range(2))}
    assert source.class_names == ("café", "tee") and labels["tee"] == 1 and len(labels) == 2
  (tmp_path / "train" / "café").mkdir()
  with pytest.raises(UserError, match="'cafe\\\\u0301' and 'caf\\\\xe9' are the same class name"):
    make_source(name="folder", split="train", data_dir=tmp_path)


def test_a_source_by_number_has_no_names(photos):
  source = make_source(name="folder", split="train", data_dir=photos, by_number=True)
  assert (source.num_classes, source.class_names, len(source)) == (3, None, 9)


def test_labels_are_renumbered_and_nothing_else(photos):
  source = make_source(name="folder", split="train", data_dir=photos)
  other = renumber(source, (3, 0, 1), 4, ("lime", "plum", "pear", "apple"))
  assert (other.num_classes, other.class_names) == (4, ("lime", "plum", "pear", "apple"))
  for a, b in zip(source.read(range(9)), other.read(range(9)), strict=True):
    assert {**a, "label": (3, 0, 1)[a["label"]]} == b and source[2]["id"] == other[2]["id"]
  several = dataclasses.replace(source, read=lambda indices: [{"label": (0, 2)}])
  assert renumber(several, (3, 0, 1), 4, "abcd")[0] == {"label": (3, 1)}
  with pytest.raises(UserError, match="label is 2; expected"):
    renumber(several, (3, 0), 4, "abcd").read([0])
  for key in ("box_labels", "neg_labels", "not_exhaustive"):
    boxes = dataclasses.replace(source, read=lambda indices, key=key: [{key: np.array([2, 0])}])
    assert renumber(boxes, (3, 0, 1), 4, "abcd")[0][key].tolist() == [1, 3]
  groups = dataclasses.replace(source, class_groups={"rare": (2, 0), "none": ()})
  assert renumber(groups, (3, 0, 1), 4, "abcd").class_groups == {"rare": (1, 3), "none": ()}
  masks = dataclasses.replace(source, read=lambda indices: [{"mask": b""}])
  with pytest.raises(UserError, match=r"a mask.*not renumbered"):
    renumber(masks, (3, 0, 1), 4, "abcd").read([0])


def test_folder_leaves_out_other_files_and_says_so(photos, caplog):
  (photos / "train" / "apple" / "notes.txt").write_text("x")
  (photos / "train" / "apple" / ".DS_Store").write_text("x")
  assert len(make_source(name="folder", split="train", data_dir=photos)) == 9
  assert "left out 1 hidden or system file, 1 file that is no image (.txt 1)" in caplog.text


def test_folder_finds_images_in_deeper_folders(photos):
  deep = photos / "train" / "apple" / "more"
  deep.mkdir()
  picture(COLOURS["apple"]).save(deep / "a.png")
  ids = make_source(name="folder", split="train", data_dir=photos)
  assert "train/apple/more/a.png" in [ids[i]["id"] for i in range(len(ids))]


def test_folder_errors(photos, tmp_path):
  with pytest.raises(UserError, match=r"'tests'; known: test, train. Did you mean 'test'"):
    make_source(name="folder", split="tests", data_dir=photos)
  with pytest.raises(UserError, match="No folders in"):
    make_source(name="folder", split="train", data_dir=photos / "nothing")
  with pytest.raises(UserError, match="Data set 'folder' needs data_dir="):
    make_source(name="folder", split="train")
  (photos / "val" / "apple").mkdir(parents=True)
  with pytest.raises(UserError, match="is empty"):
    make_source(name="folder", split="val", data_dir=photos)


def test_objectnet_has_the_classes_that_imagenet_has_too(tmp_path, caplog):
  root = tmp_path / "images"
  for name in (*label_maps.objectnet(), "air_freshener", "belt"):
    (root / name).mkdir(parents=True)
    picture((0, 0, 0)).save(root / name / "a.png")
  picture((0, 0, 0)).save(root / "chair" / "b.png")
  with caplog.at_level("INFO"):
    source = make_source(name="objectnet", split="images", data_dir=tmp_path)
  assert "left out 2 folders" in caplog.text
  assert (len(source), source.num_classes) == (114, 1000)
  found = {r["id"]: r["label"] for r in source.read(range(114))}
  assert found["images/chair/a.png"] == found["images/chair/b.png"] == (423, 559, 765)
  assert found["images/tie/a.png"] == label_maps.objectnet()["tie"]
  assert len(make_source(name="objectnet", split="images[:50]", data_dir=tmp_path)) == 50
  (root / "tie" / "a.png").unlink()
  (root / "tie").rmdir()
  with pytest.raises(UserError, match=r"images lacks 1 of ObjectNet's 113 .* 'tie'"):
    make_source(name="objectnet", split="images", data_dir=tmp_path)
  with pytest.raises(UserError, match=r"split folder.*'image'.*Did you mean 'images'"):
    make_source(name="objectnet", split="image", data_dir=tmp_path)


def test_images_need_no_labels_and_are_divided_without_overlap(photos):
  (photos / "notes.txt").write_text("x")
  whole = make_source(name="images", split="all", data_dir=photos)
  assert len(whole) == 12 and whole.num_classes == 1
  records = whole.read(range(12))
  assert {r["label"] for r in records} == {0}
  assert (photos / records[0]["id"]).read_bytes() == records[0]["image"]
  parts = [make_source(name="images", split=f"all[{p}]", data_dir=photos) for p in (":75%", "75%:")]
  ids = [{part[i]["id"] for i in range(len(part))} for part in parts]
  assert [len(part) for part in ids] == [9, 3] and not ids[0] & ids[1]
  with pytest.raises(UserError, match="No images below"):
    (photos / "empty").mkdir()
    make_source(name="images", split="all", data_dir=photos / "empty")
  with pytest.raises(UserError, match="is no folder"):
    make_source(name="images", split="all", data_dir=photos / "nothing")


# --- TFDS ---

FRUIT = """
import io, sys
import numpy as np, tensorflow_datasets as tfds
from PIL import Image

class Fruit(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "file_name": tfds.features.Text(),
      "image": tfds.features.Image(shape=(None, None, 3)),
      "label": tfds.features.ClassLabel(names=["apple", "lime", "plum"]),
      "coarse": np.int64,
      "several": tfds.features.Sequence(tfds.features.ClassLabel(names=["apple", "lime", "plum"])),
      "objects": tfds.features.Sequence({"bbox": tfds.features.BBoxFeature(), "id": np.int64,
        "is_crowd": np.bool_, "label": tfds.features.ClassLabel(names=["stone", "stalk"])}),
      "spots": tfds.features.Sequence(tfds.features.BBoxFeature()),
      "segments": tfds.features.LabeledImage(labels=["air", "skin"], shape=(None, None, 1)),
      "title": tfds.features.Text(),
      "captions": tfds.features.Sequence({"id": np.int64, "text": tfds.features.Text()}),
    }))
  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(12), "test": self._generate_examples(5)}
  def _generate_examples(self, count):
    for i in range(count):
      file, mask = io.BytesIO(), io.BytesIO()
      Image.new("RGB", (16, 8), (20 * i, 0, 0)).save(file, "PNG")
      Image.new("L", (16, 8), i % 2).save(mask, "PNG")
      file.seek(0), mask.seek(0)
      boxes = [tfds.features.BBox(j / 8, 0.25, 0.5 if i == 11 and j == 4 else 1.0, 0.5) for j in range(i % 6)]
      yield i, {"file_name": f"{i}.png", "image": file, "label": i % 3, "coarse": i % 2,
        "several": list(range(i % 4))[::-1],
        "objects": [{"bbox": box, "id": 100 * i + j, "is_crowd": j == 1, "label": j % 2}
          for j, box in enumerate(boxes)],
        "spots": boxes, "segments": mask, "title": f"fruit {i}",
        "captions": [{"id": j, "text": f"fruit {i}, view {j}"} for j in range(i)]}

Fruit(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
assert "tensorflow" not in sys.modules
"""


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("tfds")
  subprocess.run([sys.executable, "-c", FRUIT, str(folder)], check=True, capture_output=True)
  return folder


def red(record: dict) -> int:
  return np.asarray(Image.open(io.BytesIO(record["image"])))[0, 0, 0]


def test_tfds(tfds_dir):
  train = make_source(name="fruit", split="train", data_dir=tfds_dir)
  assert (len(train), train.num_classes) == (12, 3)
  assert train.class_names == ("apple", "lime", "plum")
  records = [train[i] for i in range(12)]
  for record in records:
    number = int(record["id"].removesuffix(".png"))
    assert (record["label"], red(record)) == (number % 3, 20 * number)
  assert {r["id"] for r in records} == {f"{i}.png" for i in range(12)}
  part = make_source(name="fruit", split="train[50%:]+test", data_dir=tfds_dir)
  assert len(part) == 11
  assert part[0] == records[6]
  assert train.read([5, 2]) == [records[5], records[2]]


def test_tfds_integer_labels(tfds_dir):
  with pytest.raises(UserError, match=r"'coarse' of fruit does not say num_classes"):
    make_source(name="fruit", split="train", data_dir=tfds_dir, label_key="coarse")
  source = make_source(
    name="fruit", split="train", data_dir=tfds_dir, label_key="coarse", num_classes=2
  )
  assert source.num_classes == 2
  assert source.class_names is None
  assert source[0]["label"] == int(source[0]["id"].removesuffix(".png")) % 2


def test_tfds_several_labels_or_none(tfds_dir):
  source = make_source(name="fruit", split="train", data_dir=tfds_dir, label_key="several")
  assert (source.num_classes, source.class_names) == (3, ("apple", "lime", "plum"))
  found = {int(r["id"].removesuffix(".png")): r["label"] for r in source.read(range(12))}
  assert found == {i: tuple(range(i % 4))[::-1] for i in range(12)}
  pp = "decode|value_range|multihot(3)|keep('image', 'labels')"
  batch = next(iter(eval_batches(source, pp, batch_size=12, threads=0)))
  np.testing.assert_array_equal(
    batch["labels"].sum(-1), [len(source[i]["label"]) for i in range(12)]
  )


def test_tfds_errors(tfds_dir):
  def open_(**changes):
    options = {"name": "fruit", "split": "train", "data_dir": tfds_dir} | changes
    return make_source(**options)

  with pytest.raises(UserError, match=r"'img'; known: captions, coarse, file_name, image, label"):
    open_(image_key="img")
  with pytest.raises(UserError, match=r"'labels'.*Did you mean 'label'"):
    open_(label_key="labels")
  with pytest.raises(UserError, match=r"Unknown split 'tran'; known: test, train"):
    open_(split="tran")
  with pytest.raises(UserError, match="num_classes=4, but fruit has 3"):
    open_(num_classes=4)
  with pytest.raises(UserError, match="takes no 'image_size'"):
    open_(image_size=32)
  with pytest.raises(UserError, match="is empty"):
    open_(split="train[3:3]")


def by_number(source) -> dict[int, dict]:
  records = source.read(range(len(source)))
  return {int(record["id"].removesuffix(".png")): record for record in records}


def test_tfds_boxes(tfds_dir, caplog):
  options = {"name": "fruit", "split": "train", "data_dir": tfds_dir, "boxes_key": "objects"}
  source = make_source(**options, on_bad="skip")
  assert (source.num_classes, source.class_names) == (2, ("stone", "stalk"))
  found = by_number(source)
  for i, record in found.items():
    boxes = [(4, j, 8, 8) for j in range(i % 6) if (i, j) != (11, 4)]
    np.testing.assert_array_equal(record["boxes"], np.reshape(boxes, (-1, 4)))
    assert record["boxes"].dtype == np.float32 and record["annotated_hw"] == (8, 16)
    assert record["box_labels"].tolist() == [j % 2 for j in range(len(boxes))]
    assert record["box_ids"].tolist() == [100 * i + j for j in range(len(boxes))]
    assert record["box_crowd"].tolist() == [j == 1 for j in range(len(boxes))]
    assert "label" not in record and red(record) == 20 * i
  assert "no area or are outside their image are left out" in caplog.text
  with pytest.raises(UserError, match=r"objects\[4\]: the box .* has no area; on_bad='skip'"):
    by_number(make_source(**options))
  spots = by_number(make_source(**options | {"boxes_key": "spots"}, on_bad="skip"))
  assert set(spots[3]) == {"image", "id", "boxes", "box_labels", "box_ids", "annotated_hw"}
  np.testing.assert_array_equal(spots[3]["boxes"], found[3]["boxes"])
  assert spots[3]["box_ids"].tolist() == [1, 2, 3] and not spots[3]["box_labels"].any()
  for key, message in (("image", "expected a sequence of boxes"), ("object", "Did you mean 'obj")):
    with pytest.raises(UserError, match=message):
      make_source(**options | {"boxes_key": key})
  with pytest.raises(
    UserError, match=r"field of objects.*'kind'; known: bbox, id, is_crowd, label"
  ):
    make_source(**options, label_key="kind")
  with pytest.raises(UserError, match=r"'skp'; known: raise, skip"):
    make_source(**options, on_bad="skp")


def test_tfds_masks_and_captions(tfds_dir):
  options = {"name": "fruit", "split": "train", "data_dir": tfds_dir}
  source = make_source(**options, mask_key="segments", ignore=7)
  assert (source.num_classes, source.class_names) == (2, ("air", "skin"))
  for i, record in by_number(source).items():
    assert np.unique(np.asarray(Image.open(io.BytesIO(record["mask"])))).tolist() == [i % 2]
    assert record["mask_ignore"] == 7 and "label" not in record
  titles = make_source(**options, captions_key="title")
  assert (titles.num_classes, titles.labels) == (0, None)
  assert {i: r["captions"] for i, r in by_number(titles).items()} == {
    i: (f"fruit {i}",) for i in range(12)
  }
  several = make_source(**options, captions_key="captions")
  views = {several.read([i])[0]["captions"][-1] for i in range(12) if titles[i]["id"] != "0.png"}
  assert views == {f"fruit {i}, view {i - 1}" for i in range(1, 12)}
  with pytest.raises(UserError, match="no caption"):
    by_number(several)
  both = make_source(**options, captions_key="title", label_key="label")
  assert {i: r["label"] for i, r in by_number(both).items()} == {i: i % 3 for i in range(12)}
  with pytest.raises(UserError, match="other classes"):
    make_source(**options, mask_key="segments", label_key="label")
  with pytest.raises(UserError, match="no labels of fruit are read"):
    make_source(**options, captions_key="title", num_classes=3)


def test_tfds_not_prepared_says_how(tfds_dir):
  with pytest.raises(UserError, match=r"Did you mean 'fruit'") as info:
    make_source(name="fruits", split="train", data_dir=tfds_dir)
  command = f"tfds build fruits --file_format=array_record --data_dir {tfds_dir}"
  assert command in str(info.value)
  with pytest.raises(UserError, match="Did you mean 'digits'"):
    make_source(name="digit", split="train", data_dir=tfds_dir)


def test_without_tfds_the_error_names_the_command_that_installs_it(monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
  with pytest.raises(UserError, match=r"'digit' is none of .* Did you mean 'digits'") as info:
    make_source(name="digit", split="train")
  assert f"`{sys.executable} -m pip install tensorflow-datasets`" in str(info.value)


def test_tfds_in_another_format_says_how(tfds_dir, tmp_path):
  """A copy whose files say tfrecord; reading it needs no file of that format."""
  version = tmp_path / "fruit" / "1.0.0"
  version.mkdir(parents=True)
  for path in (tfds_dir / "fruit" / "1.0.0").iterdir():
    (version / path.name.replace("array_record", "tfrecord")).write_bytes(path.read_bytes())
  info = json.loads((version / "dataset_info.json").read_text())
  info["fileFormat"] = "tfrecord"
  text = json.dumps(info).replace("array_record", "tfrecord")
  (version / "dataset_info.json").write_text(text)
  with pytest.raises(
    UserError, match=r"prepared as tfrecord.*tfds build fruit --file_format=array"
  ):
    make_source(name="fruit", split="train", data_dir=tmp_path)


@pytest.mark.slow
@pytest.mark.shared
def test_cifar10(shared, tmp_path):
  script = shared / "make_cifar10.py"
  subprocess.run([sys.executable, script, tmp_path], check=True, capture_output=True)
  test = make_source(name="cifar10", split="test", data_dir=tmp_path)
  assert (len(test), test.num_classes, test.class_names[0]) == (10000, 10, "airplane")
  stored = np.load(shared / "data" / "cifar10_test_webp.npz")
  for index in (0, 77, 9999):
    record = test[index]
    assert record["label"] == stored["y"][int(record["id"].removeprefix("test_"))]


def test_garbage_that_imports_is_left_while_tfds_is_imported(tmp_path):
  code = f"""
import contextlib, gc, multiprocessing
from etils import epy
from flexivit_jax.data import is_prepared

@contextlib.contextmanager
def littered(lazy_imports=epy.lazy_imports, **options):
  ring = [multiprocessing.get_context("spawn").Lock()]  # whose finaliser has a relative import
  ring.append(ring)
  with lazy_imports(**options):
    del ring
    yield

epy.lazy_imports = littered
gc.set_threshold(1)
assert not is_prepared("none", "{tmp_path}")
assert gc.isenabled()
"""
  run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert run.stderr == ""


def test_importing_data_is_light():
  heavy = ("jax", "tensorflow", "torch", "sklearn", "grain", "tensorflow_datasets")
  code = f"import sys, flexivit_jax.data; print([m for m in {heavy} if m in sys.modules])"
  run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
  assert run.stdout.strip() == "[]"
