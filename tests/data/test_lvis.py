"""LVIS in COCO's form: what is said of classes without boxes, their frequencies, images by their address."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import (
  class_sizes,
  eval_batches,
  make_source,
  pack_inputs,
  packing,
  parse,
  planned_source,
)
from flexivit_jax.errors import UserError

CATEGORIES = [
  {"id": 9, "name": "bow_(weapon)", "frequency": "r"},
  {"id": 2, "name": "remote_control", "frequency": "f"},
  {"id": 4, "name": "cat", "frequency": "c"},
  {"id": 12, "name": "sofa_bed", "frequency": "r"},
]
CONTENT = {
  "images": [
    {"id": 7, "coco_url": "http://images.cocodataset.org/train2017/000007.png", "height": 20,
     "width": 30, "neg_category_ids": [12, 4], "not_exhaustive_category_ids": []},
    {"id": 8, "coco_url": "http://images.cocodataset.org/val2017/000008.png", "height": 20,
     "width": 30, "neg_category_ids": [], "not_exhaustive_category_ids": [9]},
    {"id": 9, "coco_url": "http://images.cocodataset.org/val2017/000009.png", "height": 20,
     "width": 30},
  ],
  "annotations": [
    {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1.0, 2.0, 3.5, 4.0]},
    {"id": 2, "image_id": 8, "category_id": 9, "bbox": [0, 0, 30, 20]},
  ],
  "categories": CATEGORIES,
}  # fmt: skip
FILE = "lvis_v1_{split}.json"


def opened(root: Path, content=CONTENT, split="train", **options):
  for entry in CONTENT["images"]:
    path = root / "/".join(entry["coco_url"].split("/")[-2:])
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (30, 20)).save(path)
  (root / FILE.format(split="train")).write_text(json.dumps(content))
  return make_source(name="coco", split=split, data_dir=root, annotations=FILE, **options)


def changed(kind: str, row: int, **values):
  content = copy.deepcopy(CONTENT)
  content[kind][row].update(values)
  return content


def test_lvis_is_read_with_all_that_it_says(tmp_path):
  source = opened(tmp_path)
  assert source.class_names == ("remote_control", "cat", "bow_(weapon)", "sofa_bed")
  assert source.class_groups == {"rare": (2, 3), "common": (1,), "frequent": (0,)}
  records = {r["id"]: r for r in source.read(range(3))}
  assert set(records) == {"train2017/000007.png", "val2017/000008.png", "val2017/000009.png"}
  first, second, third = (records[key] for key in sorted(records))
  for record, negatives, lenient in ((first, [1, 3], []), (second, [], [2]), (third, [], [])):
    assert record["neg_labels"].dtype == record["not_exhaustive"].dtype == np.int64
    assert record["neg_labels"].tolist() == negatives
    assert record["not_exhaustive"].tolist() == lenient
  assert first["boxes"].tolist() == [[1, 2, 4.5, 6]] and not first["box_crowd"].any()
  first["neg_labels"][:] = 0  # the caller's own
  assert {r["id"]: r for r in source.read(range(3))}[first["id"]]["neg_labels"].tolist() == [1, 3]
  listed = {r["id"]: r for r in source.listing()}
  assert listed[first["id"]]["neg_labels"].tolist() == [1, 3]


def test_a_pack_of_lvis_says_the_same(tmp_path):
  source = opened(tmp_path / "lvis")
  inputs = pack_inputs.of_source(source, {"name": "coco", "split": "train"})
  packing.pack(inputs, tmp_path / "pack", split="train", threads=0)
  packed = make_source(name="packed", split="train", data_dir=tmp_path / "pack")
  assert packed.class_groups == source.class_groups
  for a, b in zip(source.read(range(3)), packed.read(range(3)), strict=True):
    for key in ("neg_labels", "not_exhaustive", "boxes"):
      np.testing.assert_array_equal(a[key], b[key])


def test_an_evaluation_gets_vectors_and_training_asks_for_what_is_not_there(tmp_path):
  source = opened(tmp_path)
  pp = (
    "decode|resize(8)|value_range|sample_queries(3, 2)|federated"
    "|keep('image', 'neg_labels', 'not_exhaustive', 'query_labels')"
  )
  (batch,) = eval_batches(source, pp, batch_size=3, threads=0)
  rows = {source[i]["id"][-5]: k for k, i in enumerate(batch["_id"].tolist())}
  assert batch["neg_labels"][rows["7"]].tolist() == [0, 1, 0, 1]
  assert batch["not_exhaustive"][rows["8"]].tolist() == [0, 0, 1, 0]
  assert sorted(batch["query_labels"][rows["7"]].tolist()) == [0, 1, 3]
  assert 2 in batch["query_labels"][rows["8"]]  # its own, though not exhaustive


def test_data_that_state_nothing_have_every_box():
  record = {"box_labels": np.array([2, 0, -1])}
  made = parse("federated").of_classes(None, 4)(record, None)
  assert made["neg_labels"].tolist() == [0, 1, 0, 1] and not made["not_exhaustive"].any()
  none = parse("federated").of_classes(None, 2)({"box_labels": np.zeros(0, np.int64)}, None)
  assert none["neg_labels"].tolist() == [1, 1] and none["neg_labels"].dtype == np.float32


def test_the_source_lvis_knows_its_files(tmp_path):
  opened(tmp_path)
  source = make_source(name="lvis", split="train", data_dir=tmp_path)
  assert (source.name, len(source), source.class_groups["rare"]) == ("lvis", 3, (2, 3))
  (tmp_path / "annotations").mkdir()
  (tmp_path / "lvis_v1_train.json").rename(tmp_path / "annotations" / "lvis_v1_train.json")
  assert len(make_source(name="lvis", split="train[:2]", data_dir=tmp_path)) == 2
  planned = planned_source(name="lvis", split="val", data_dir="nowhere")
  assert (len(planned), planned.num_classes, len(planned.class_names)) == (19_809, 1203, 1203)
  assert planned[0]["boxes"].shape == (1, 4)


@pytest.mark.parametrize(
  ("content", "expected"),
  [
    (changed("images", 0, neg_category_ids=[5]), r"no category has the id 5 .neg_category_ids"),
    (changed("images", 0, neg_category_ids=4), "neg_category_ids is 4; expected a list of ids"),
    (changed("images", 0, not_exhaustive_category_ids=["4"]), "an id of not_exhaustive_.* is '4'"),
    (
      changed("images", 0, neg_category_ids=[12, 2]),
      r"annotations\[0\] \(id 1\): its category is among",
    ),
    (changed("images", 0, coco_url=3), "the file name is None; expected text"),
    (changed("images", 0, coco_url="a/../b.png"), "is not below the folder"),
    (changed("categories", 1, frequency="x"), "frequency of category 2 is 'x'; expected 'r'"),
    (changed("categories", 1, name=None), "the name of class 0 is None; expected text"),
  ],
)
def test_what_is_wrong_is_named(tmp_path, content, expected):
  with pytest.raises(UserError, match=expected):
    opened(tmp_path, content)


def test_frequencies_that_differ_are_no_joined_data_set(tmp_path):
  other = json.dumps(changed("categories", 1, frequency="c"))
  tmp_path.joinpath("lvis_v1_val.json").write_text(other)
  with pytest.raises(UserError, match="differ in the frequencies"):
    opened(tmp_path, split="train+val")


def test_classes_without_boxes_are_counted(tmp_path):
  more = [{"id": 100 + k, "name": f"class {k}", "frequency": "r"} for k in range(20)]
  source = opened(tmp_path, CONTENT | {"categories": CATEGORIES + more})
  assert "; 22 have no box" in class_sizes(source)


def test_synthetic_classes_may_have_names():
  options = dict(name="synthetic", split="train", num_classes=2, annotated=True)
  assert make_source(**options, classes=["a", "b"]).class_names == ("a", "b")
  for classes in (["a"], "ab"):
    with pytest.raises(UserError, match="expected a list of 2 names"):
      make_source(**options, classes=classes)
