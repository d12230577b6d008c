"""Tar shards and parquet are rows, read where they are."""

import io
import json
import sys
import tarfile

import pytest
from PIL import Image

from flexivit_jax.data import packing, packs
from flexivit_jax.data.parquet_input import parquet_input
from flexivit_jax.data.sources import make_source
from flexivit_jax.data.tar_input import tar_input
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults


def picture(k, suffix="png"):
  file = io.BytesIO()
  Image.new("RGB", (5, 4), (k, 0, 0)).save(file, suffix.replace("jpg", "jpeg"))
  return file.getvalue()


def write_tar(path, members):
  with tarfile.open(path, "w") as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))


def records_of(inputs):
  return [row.read() for row in inputs.rows()]


# --- tar ---


@pytest.fixture
def tars(tmp_path):
  """What img2dataset writes: an image, its caption, and what else is known of it."""
  for t in range(2):
    members = {}
    for k in range(3):
      key = f"{t:05}{k:04}"
      about = {"caption": f"json {k}", "label": k, "labels": [0, k], "width": 5}
      members[f"{key}.jpg"] = picture(k, "jpg")
      members[f"{key}.txt"] = f" picture {t} {k}\n".encode()
      members[f"{key}.json"] = json.dumps(about).encode()
    write_tar(tmp_path / f"{t:05}.tar", members)
  (tmp_path / "00000_stats.json").write_text("{}")
  return tmp_path


def test_tar_shards_are_images_with_captions(tars):
  inputs = tar_input(data_dir=tars)
  rows = records_of(inputs)
  assert (inputs.num_classes, inputs.class_names, inputs.size) == (0, None, None)
  assert len(rows) == 6 and rows[4] == {
    "id": "00001/000010001",
    "image": picture(1, "jpg"),
    "captions": ("picture 1 1",),
  }
  rows = records_of(tar_input(data_dir=tars, files="00001.tar", captions_key="caption"))
  assert [row["captions"] for row in rows] == [("json 0",), ("json 1",), ("json 2",)]
  rows = records_of(tar_input(data_dir=tars, label_key="labels", num_classes=3))
  assert rows[5]["label"] == (0, 2)


def test_webdataset_with_classes_and_masks(tmp_path):
  members = {"./a/1.b.PNG": b"x", "./a/1.cls": b"1\n", "./a/1.seg.png": b"mask", "./a/1.png": b"y"}
  write_tar(tmp_path / "x.tar", members)
  (tmp_path / "names.txt").write_text("cat\ndog\n")
  inputs = tar_input(data_dir=tmp_path, classes="names.txt", masks="seg.png")
  assert (inputs.num_classes, inputs.class_names) == (2, ("cat", "dog"))
  record = {"id": "x/a/1", "image": b"y"}
  assert records_of(inputs) == [record | {"mask": b"mask", "mask_ignore": 255}]
  del members["./a/1.seg.png"], members["./a/1.b.PNG"]
  write_tar(tmp_path / "x.tar", members)
  assert records_of(tar_input(data_dir=tmp_path, num_classes=2)) == [record | {"label": 1}]
  (row,) = tar_input(data_dir=tmp_path, masks="seg.png").rows()
  with pytest.raises(UserError, match=r"no mask, of files cls, png; expected \.seg\.png"):
    row.read()


def test_a_packed_tar_is_read_and_its_bad_rows_are_named(tars):
  write_tar(
    tars / "00002.tar",
    {"a.json": b"{}", "b.jpg": picture(1), "b.txt": b" ", "c.jpg": b"", "d.jpg": b"abc"},
  )
  with tarfile.open(tars / "00002.tar", "a") as archive:
    for name in ("e.txt", "e.txt"):
      archive.addfile(tarfile.TarInfo(name), io.BytesIO())
  notes = []
  done = packing.pack(
    tar_input(data_dir=tars), tars / "out", split="train", on_bad="skip", note=notes.append
  )
  assert (done.rows, done.examples, done.skipped) == (11, 6, 5)
  assert sorted(note.partition(": ")[2] for note in notes) == [
    "0 images, of files json; expected one",
    "caption 1 of 1 is empty",
    "image: an empty file",
    "image: no known image format: 3 bytes, first b'abc'",
    "several files with one suffix, of txt, txt",
  ]
  source = make_source(name="packed", split="train", data_dir=tars / "out")
  assert source.read(range(6)) == records_of(tar_input(data_dir=tars, files="0000[01].tar"))
  skipped = packs.split_of(tars / "out", "train")["skipped"]
  assert skipped[0] == [6, "00002/a"] and len(skipped) == 5


def test_tars_that_cannot_be_read(tars):
  with pytest.raises(UserError, match=r"No \*\.tgz in .*; data_dir= is the folder, files= the"):
    tar_input(data_dir=tars, files="*.tgz")
  whole = (tars / "00000.tar").read_bytes()
  for data in (whole[:700], b"no tar"):
    (tars / "00000.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"00000\.tar cannot be read as a tar file"):
      packing.pack(tar_input(data_dir=tars), tars / "out", split="train")
  (tars / "names.txt").write_text("cat\ndog")
  with pytest.raises(UserError, match=r"num_classes=3, but .* has 2 names"):
    tar_input(data_dir=tars, classes="names.txt", num_classes=3)


# --- parquet ---

pa = pytest.importorskip("pyarrow", reason="needs pyarrow, which tensorflow-datasets brings")


@pytest.fixture
def parquet(tmp_path):
  """What Hugging Face's `datasets` writes."""
  import pyarrow.parquet as pq

  label = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
  features = {"image": {"_type": "Image"}, "label": label}
  metadata = {"huggingface": json.dumps({"info": {"features": features}})}
  for f in range(2):
    rows = range(5 * f, 5 * f + 5)
    table = pa.table(
      {
        "image": [{"bytes": picture(k), "path": f"{k}.png"} for k in rows],
        "label": [k % 3 for k in rows],
        "texts": [[f"text {k}", "more "] for k in rows],
        "url": [f"https://x/{k}" for k in rows],
        "plain": [picture(k) for k in rows],
      }
    )
    path = tmp_path / f"train-{f:05}-of-00002.parquet"
    pq.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
  return tmp_path


def test_parquet_is_images_with_labels_and_captions(parquet):
  inputs = parquet_input(data_dir=parquet, label_key="label", captions_key="texts")
  assert (inputs.num_classes, inputs.class_names, inputs.size) == (3, ("cat", "dog", "owl"), 10)
  assert inputs.notes == ("columns that are left out: url, plain",)
  rows = records_of(inputs)
  assert rows[7] == {
    "id": "train-00001-of-00002#2",
    "image": picture(7),
    "label": 1,
    "captions": ("text 7", "more"),
  }
  inputs = parquet_input(
    data_dir=parquet, image_key="plain", mask_key="image", id_key="url", ignore=0
  )
  assert inputs.num_classes == 0
  assert records_of(inputs)[3] == {
    "id": "https://x/3",
    "image": picture(3),
    "mask": picture(3),
    "mask_ignore": 0,
  }
  packing.pack(inputs, parquet / "out", split="train", shard_examples=3)
  source = make_source(name="packed", split="train", data_dir=parquet / "out")
  assert source.read(range(10)) == records_of(inputs)


def test_another_parquet_file_is_another_input(parquet):
  inputs = parquet_input(data_dir=parquet)
  packing.pack(inputs, parquet / "out", split="train", shard_examples=3)
  first, second = sorted(parquet.glob("*.parquet"))
  second.write_bytes(first.read_bytes())
  with pytest.raises(UserError, match="Rows 3 to 5 of the input are not those"):
    packing.pack(parquet_input(data_dir=parquet), parquet / "out", split="train", shard_examples=3)


def test_parquet_that_cannot_be_read(parquet, monkeypatch):
  with pytest.raises(UserError, match=r"column of .*parquet \(label_key=\) 'lable'.*mean 'label'"):
    parquet_input(data_dir=parquet, label_key="lable")
  with pytest.raises(UserError, match=r"name no classes of the column 'texts'; give classes"):
    parquet_input(data_dir=parquet, label_key="texts")
  import pyarrow.parquet as pq

  table = pa.table(
    {"image": [{"bytes": None, "path": "a.png"}, {"bytes": b"", "path": None}, None]}
  )
  pq.write_table(table, parquet / "nulls.parquet")
  for row, text in zip(
    parquet_input(data_dir=parquet, files="nulls.parquet").rows(),
    ("no bytes of the image, only the path 'a.png'", "no bytes of the image$", "no bytes of"),
    strict=True,
  ):
    with pytest.raises(UserError, match=text):
      row.read()
  (parquet / "nulls.parquet").write_bytes(b"PAR1 no")
  with pytest.raises(UserError, match=r"nulls\.parquet cannot be read as parquet"):
    parquet_input(data_dir=parquet)
  monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
  with pytest.raises(UserError, match=r"needs pyarrow, which is not installed: `.* -m pip install"):
    parquet_input(data_dir=parquet)
