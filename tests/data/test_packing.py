"""What is packed is what comes out, whatever happens on the way."""

import dataclasses
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import cloudpickle
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from flexivit_jax.data import pack_inputs, packing, packs
from flexivit_jax.data.loader import eval_batches, train_batches
from flexivit_jax.data.pack_inputs import Input, Row
from flexivit_jax.data.sources import make_source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

SYNTHETIC = dict(name="synthetic", split="train", image_size=8, num_classes=4, num_examples=60)
SHARD = 2700  # bytes: 12 records of SYNTHETIC


def pack(out, source=None, split="train", about=None, **options):
  source = source or make_source(**SYNTHETIC)
  options = {"shard_bytes": SHARD, "threads": 0, **options}
  inputs = pack_inputs.of_source(source, about or {"name": source.name, "split": source.split})
  return packing.pack(inputs, out, split=split, **options)


def packed(out, split="train"):
  return make_source(name="packed", split=split, data_dir=out)


def contents(folder):
  """The bytes of all files of a folder."""
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def check_same(records, others):
  for a, b in zip(records, others, strict=True):
    assert a.keys() == b.keys()
    for key, value in a.items():
      assert type(b[key]) is type(value), key
      if isinstance(value, np.ndarray):
        assert (b[key].dtype, b[key].shape) == (value.dtype, value.shape), key
        np.testing.assert_array_equal(b[key], value)
      else:
        assert b[key] == value, key


@pytest.fixture
def photos(tmp_path):
  root = tmp_path / "photos"
  for split, count in (("train", 12), ("val", 2)):
    for k, name in enumerate(("lime", "plum")):
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        image = np.random.default_rng((k, i)).integers(0, 256, (9, 7, 3), np.uint8)
        Image.fromarray(image).save(root / split / name / f"{i}.png")
  return root


def folder(photos, split="train"):
  return make_source(name="folder", split=split, data_dir=photos)


# --- what comes out ---


def test_a_packed_folder_is_the_folder(photos, tmp_path):
  out = tmp_path / "out"
  for split in ("train", "val"):
    pack(out, folder(photos, split), split, shard_bytes=1500)
  assert len(list(out.glob("train-*.array_record"))) > 2
  for split in ("train", "train[25%:]", "val+train[:7]", "train[3:4]"):
    source, other = folder(photos, split), packed(out, split)
    check_same(source.read(range(len(source))), other.read(range(len(other))))
    assert other.labels() == source.labels()
    for field in ("num_classes", "class_names", "upright", "size"):
      assert getattr(other, field) == getattr(source, field)
  assert (packed(out).name, packed(out).where) == ("packed", None)
  assert packed(out).read([5, 0, 5])[0]["id"] == folder(photos)[5]["id"]
  with pytest.raises(UserError, match=r"Unknown split in .*'test'; known: train, val"):
    packed(out, "test")


def test_a_pack_holds_no_path_and_no_time(photos, tmp_path):
  moved = shutil.copytree(photos, tmp_path / "elsewhere" / "images")
  pack(tmp_path / "a", folder(photos), shard_bytes=1500)
  for path in moved.rglob("*.png"):
    os.utime(path, (1, 1))
  pack(tmp_path / "b", folder(moved), shard_bytes=1500, threads=3)
  assert contents(tmp_path / "a") == contents(tmp_path / "b")


PPM = b"P6 5 4 255\n"  # the header of an image, 4 pixels high and 5 wide
IMAGES = st.one_of(
  st.binary(max_size=300).map(lambda rest: PPM + rest),
  hnp.arrays(np.uint8, (4, 5, 3)),
)


@st.composite
def several(draw):
  """Records of the same kinds."""
  kinds = draw(st.sets(st.sampled_from(("label", "boxes", "mask", "captions"))))
  return [record(draw, kinds) for _ in range(draw(st.integers(1, 9)))]


def record(draw, kinds):
  record = {"image": draw(IMAGES), "id": draw(st.text(max_size=9)), "annotated_hw": (4, 5)}
  if "boxes" in kinds:
    m = draw(st.integers(0, 3))
    floats = st.floats(-9, 9, width=32)
    record["boxes"] = draw(hnp.arrays(np.float32, (m, 4), elements=floats))
    record["box_labels"] = draw(hnp.arrays(np.int64, m, elements=st.integers(0, 6)))
    record["box_ids"] = draw(hnp.arrays(np.int64, m))
    record["box_crowd"] = draw(hnp.arrays(bool, m))
  if "mask" in kinds:
    dtypes = st.sampled_from((np.uint8, np.int32))
    record["mask"] = draw(st.one_of(st.just(PPM), hnp.arrays(dtypes, (4, 5))))
  if "captions" in kinds:
    caption = st.text(min_size=1).filter(lambda text: text.strip())
    record["captions"] = tuple(draw(st.lists(caption, min_size=1, max_size=3)))
  if "label" in kinds:
    record["label"] = draw(st.one_of(st.integers(0, 6), st.lists(st.integers(0, 6)).map(tuple)))
  return record


def made(rows, num_classes=7):
  """An input of these records, or of the errors among them."""

  def read(row):
    if isinstance(row, Exception):
      raise row
    return row

  def start():
    for i, row in enumerate(rows):
      yield Row(f"row{i}", repr(row).encode(), lambda row=row: read(row))

  return Input({"name": "made"}, num_classes, None, True, len(rows), start)


@hypothesis.settings(max_examples=12)
@hypothesis.given(several(), st.integers(1, 900))
def test_all_keys_survive(tmp_path_factory, rows, shard_bytes):
  out = tmp_path_factory.mktemp("pack")
  packing.pack(made(rows), out, split="train", shard_bytes=shard_bytes, threads=2)
  source = packed(out)
  check_same(rows, source.read(range(len(source))))
  if "label" in rows[0]:
    assert source.labels() == [row["label"] for row in rows]
  else:
    assert source.labels is None


def test_a_stream_over_a_pack_is_that_over_its_source(photos, tmp_path):
  pack(tmp_path / "out", folder(photos), shard_bytes=1500)
  sources = folder(photos), packed(tmp_path / "out")
  pp = "decode|inception_crop(6)|flip_lr|onehot(2)|keep('image', 'labels')"

  def batches(source, start, **options):
    return list(
      train_batches(source, pp, batch_size=8, seed=1, num_steps=9, start_step=start, **options)
    )

  want = batches(sources[0], 0, threads=0)
  for got in (
    batches(sources[1], 0, threads=2),
    batches(sources[1], 4, threads=0, keep_mb=0),
  ):
    for a, b in zip(want[-len(got) :], got, strict=True):
      check_same([a], [b])
  evals = (
    list(eval_batches(s, pp.replace("inception_crop", "resize"), batch_size=8)) for s in sources
  )
  for a, b in zip(*evals, strict=True):
    check_same([a], [b])


def test_another_process_opens_the_shards_itself(tmp_path):
  pack(tmp_path)
  source = packed(tmp_path)
  check_same([source[7]], [cloudpickle.loads(cloudpickle.dumps(source))[7]])


def test_shards_end_by_bytes_or_examples(tmp_path):
  assert pack(tmp_path / "a").shards == 5
  done = pack(tmp_path / "b", shard_examples=7)
  assert (done.rows, done.examples, done.shards) == (60, 60, 9)
  sizes = [s.examples for s in packs.shards_of(packs.split_of(tmp_path / "b", "train"))]
  assert sizes == [7] * 8 + [4]


# --- stopped and resumed ---

KILLED = """
import os, pathlib, random, signal, sys, time
from flexivit_jax.data import pack_inputs, packing
from flexivit_jax.data.sources import make_source

out, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
source = make_source(name="synthetic", split="train", image_size=16, num_examples=300)

def pack(folder):
  inputs = pack_inputs.of_source(source, {"name": "synthetic"})
  packing.pack(inputs, folder, split="train", shard_bytes=9000, threads=random.choice((0, 2)))

def shards():
  return len(list((out / "killed").glob("*.array_record")))

pack(out / "left_alone")
draws, cut = random.Random(0), 0
for kill in range(kills):
  # By progress, not by time: so that a busy machine is killed as often.
  enough = shards() + draws.randrange(3)
  child = os.fork()
  if not child:
    pack(out / "killed")
    os._exit(0)
  while shards() < enough and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
    time.sleep(0.0005)
  time.sleep(draws.uniform(0, 0.005))
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  cut += os.WIFSIGNALED(status)
pack(out / "killed")
print(cut)
"""


def test_ten_kills_change_nothing(tmp_path):
  command = [sys.executable, "-c", KILLED, str(tmp_path), "10"]
  run = subprocess.run(command, capture_output=True, text=True, check=False)
  assert run.returncode == 0, run.stderr
  assert int(run.stdout) >= 5  # 25 shards are more than ten kills wait for
  assert contents(tmp_path / "left_alone") == contents(tmp_path / "killed")
  ids = [record["id"] for record in packed(tmp_path / "killed").read(range(300))]
  assert ids == [f"synthetic_{i}" for i in range(300)]


def counting(source):
  """The source, and the list to which it adds each index that is read."""
  read = []
  return dataclasses.replace(source, read=lambda i: read.extend(i) or source.read(i)), read


class Crash(BaseException):
  """The end of a process, which no code handles."""


def test_a_crash_before_any_change_on_the_disk_is_resumed(tmp_path, monkeypatch):
  few = make_source(**SYNTHETIC | {"num_examples": 24})
  pack(tmp_path / "left_alone", few)
  replace, count = os.replace, 0
  for limit in range(20):
    out, count = tmp_path / str(limit), 0

    def crash(old, new, limit=limit):
      nonlocal count
      if count == limit:
        raise Crash
      count += 1
      replace(old, new)

    with monkeypatch.context() as patch:
      patch.setattr(os, "replace", crash)
      try:
        pack(out, few)
      except Crash:
        with pytest.raises(UserError, match=r"not complete|no manifest\.json"):
          packed(out)
      else:
        break
    counted, read = counting(few)
    pack(out, counted)
    assert contents(out) == contents(tmp_path / "left_alone")
    # Two renames for each shard, after the one that begins; what is there is not read again.
    assert len(read) == 24 - 12 * min(max(limit - 1, 0) // 2, 2)
  assert limit == 6


def test_the_same_command_again_reads_nothing_and_repairs_what_is_missing(tmp_path):
  pack(tmp_path)
  before = contents(tmp_path)
  counted, read = counting(make_source(**SYNTHETIC))
  pack(tmp_path, counted)
  assert not read and contents(tmp_path) == before
  (tmp_path / "train-00001.array_record").unlink()
  (tmp_path / "train-00003.json").write_text("{}")
  pack(tmp_path, counted)
  assert sorted(read) == [*range(12, 24), *range(36, 48)] and contents(tmp_path) == before


def test_a_pack_of_another_input_is_refused(photos, tmp_path):
  out = tmp_path / "out"
  source = folder(photos)
  pack(out, source, shard_bytes=1500)
  before = contents(out)
  with pytest.raises(UserError, match=r"of another input: input\.split: 'train' -> 'val'\. Give"):
    pack(out, folder(photos, "val"), shard_bytes=1500)
  with pytest.raises(UserError, match=r"another input: shard_bytes: 1500 -> 1600\. Give"):
    pack(out, source, shard_bytes=1600)
  renamed = dataclasses.replace(source, class_names=("lime", "pear"))
  with pytest.raises(UserError, match=r"class_names\[1\]: 'plum' -> 'pear'"):
    pack(out, renamed, shard_bytes=1500)
  with pytest.raises(UserError, match=r"Split 'train' in .* does not fit: class_names\[1\]"):
    pack(out, renamed, "val", shard_bytes=1500)
  last = source[len(source) - 1]["id"]
  (photos / last).write_bytes((photos / last).read_bytes() + b"x")
  with pytest.raises(
    UserError, match=r"Rows \d+ to 23 of the input are not those of which .*record"
  ):
    pack(out, folder(photos), shard_bytes=1500)
  assert contents(out) == before


def test_boxes_are_packed_and_another_box_is_another_input(photos, tmp_path):
  images = [{"id": i, "file_name": f"{i}.png", "height": 9, "width": 7} for i in range(12)]
  boxes = [
    {"id": i, "image_id": i // 2, "category_id": 5, "bbox": [1, 2, 3, 1 + i % 4]} for i in range(16)
  ]
  content = {"images": images, "annotations": boxes, "categories": [{"id": 5, "name": "lime"}]}
  file = photos / "train.json"

  def source():
    file.write_text(json.dumps(content))
    lime = "{split}/lime"
    return make_source(name="coco", split="train", data_dir=photos, images=lime)

  out = tmp_path / "out"
  pack(out, source(), shard_bytes=1500)
  check_same(source().read(range(12)), packed(out).read(range(12)))
  assert packed(out).class_names == ("lime",) and packed(out).labels is None
  boxes[3]["bbox"][0] = 2
  with pytest.raises(UserError, match=r"Rows \d+ to \d+ of the input are not those"):
    pack(out, source(), shard_bytes=1500)


def test_groups_of_classes_are_packed_and_others_are_another_input(photos, tmp_path):
  out, groups = tmp_path / "out", {"rare": (1,), "common": (0, 2)}
  source = dataclasses.replace(folder(photos), class_groups=groups)
  pack(out, source, shard_bytes=1500)
  assert packed(out).class_groups == groups
  pack(out, source, shard_bytes=1500)
  for split in ("train", "val"):
    with pytest.raises(UserError, match="class_groups"):
      pack(out, folder(photos, "val"), split, shard_bytes=1500)


def test_rows_after_the_shards_that_are_there_may_change(tmp_path):
  rows = [{"image": PPM + bytes([i]), "id": str(i)} for i in range(9)]
  bad = [*rows[:6], OSError("gone"), *rows[7:]]
  out, notes = tmp_path / "out", []
  options = dict(split="all", shard_examples=2, threads=0, note=notes.append)
  with pytest.raises(UserError, match=r"1 of the rows 6 to 8 .* row 6 \('row6'\): OSError: gone\."):
    packing.pack(made(bad), out, **options)
  assert packs.begun(out) == ["all"]
  with pytest.raises(UserError, match="Rows 0 to 1 of the input are not those"):
    packing.pack(made([rows[1], *rows[1:]]), out, **options)
  packing.pack(made([*rows, rows[0]]), out, **options)
  assert notes == ["the input had 9 rows when this pack began, and has 10 now"]
  packing.pack(made([*rows, rows[0]]), tmp_path / "again", **options)
  assert contents(out) == contents(tmp_path / "again")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("rows", [11, 12, 13, 14])
def test_another_number_of_rows_is_another_input(rows, complete, tmp_path):
  """Shards of 4 records, the last one full or not."""
  few, more = (
    made([{"image": PPM, "id": str(i)} for i in range(n)])._replace(size=None)
    for n in (rows, rows + 1)
  )
  out = tmp_path / "out"
  options = dict(split="train", shard_examples=4, threads=0)
  packing.pack(few, out, **options)
  before = contents(out)
  if not complete:  # as if it had been stopped before the manifest
    stored = packs.split_of(out, "train")
    keys = ("input", "num_classes", "class_names", "upright", "shard_bytes", "shard_examples")
    packs.write_json(out / "train.begun.json", {k: stored[k] for k in keys} | {"rows": None})
    (out / packs.MANIFEST).unlink()
  if rows % 4 == 0 and not complete:  # all shards are what they would be
    packing.pack(more, out, **options)
    packing.pack(more, tmp_path / "again", **options)
    assert contents(out) == contents(tmp_path / "again")
    return
  with pytest.raises(UserError, match=r"the input has more now|The input has more rows than the 1"):
    packing.pack(more, out, **options)
  packing.pack(few, out, **options)
  assert contents(out) == before
  packing.pack(more, tmp_path / "more", **options)
  with pytest.raises(UserError, match=r"Rows .* are not those|and the input has 1. now"):
    packing.pack(few, tmp_path / "more", **options)


def test_a_folder_of_others_stays_as_it_is(tmp_path):
  (tmp_path / "photo.jpg").write_text("the only one")
  with pytest.raises(UserError, match=r"has files that no pack writes, the first 'photo.jpg'"):
    pack(tmp_path)
  with pytest.raises(UserError, match="is a file; expected a folder"):
    pack(tmp_path / "photo.jpg")
  assert [p.name for p in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_full_disk_is_one_line_and_is_resumed(tmp_path):
  pack(tmp_path / "left_alone")
  out = tmp_path / "out"
  pack(out, shard_examples=40, shard_bytes=10**6)
  size = (out / "train-00000.array_record").stat().st_size
  shutil.rmtree(out)
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  try:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
    with pytest.raises(UserError, match=r"train-00000.array_record cannot be written: .*too large"):
      pack(out, shard_examples=40, shard_bytes=10**6)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert [p.name for p in out.iterdir()] == ["train.begun.json"]
  pack(out, shard_examples=40, shard_bytes=10**6)
  check_same(make_source(**SYNTHETIC).read(range(60)), packed(out).read(range(60)))


# --- bad rows ---


def bad_rows():
  good = {"image": PPM, "id": "good", "label": 2}
  boxes = {"boxes": np.zeros((2, 4), np.float32), "box_labels": np.array([0, 6])}
  return good, {
    "FileNotFoundError: x.jpg": FileNotFoundError("x.jpg"),
    "image: an empty file": good | {"image": b""},
    "image: there is none": {"id": "a"},
    "image: no known image format": good | {"image": b"GIF8 not"},
    r"image: float64 \[4, 5, 3\]": good | {"image": np.zeros((4, 5, 3))},
    r"the image has 4 x 5 pixels \(h x w\), its annotation says \(5, 4\)": good
    | {"annotated_hw": (5, 4)},
    "label is 7; expected 0..6": good | {"label": 7},
    r"label is \(1, -1\)": good | {"label": (1, -1)},
    "it has label, captions; rows before it have label": good | {"captions": ("a",)},
    "it has an image alone; rows before it have label": {"image": PPM, "id": "a"},
    "there is no caption": good | {"captions": ()},
    "caption 2 of 2 is empty": good | {"captions": ("a", " ")},
    r"boxes are \[4\]": good | {"boxes": np.zeros(4, np.float32)},
    "box_ids has 1 rows for 2 boxes": good | boxes | {"box_ids": np.array([0])},
    r"box_labels is \[0 7\]": good | boxes | {"box_labels": np.array([0, 7])},
    "mask: no known image format": good | {"mask": b"no mask here"},
    r"the image is \[4, 5\] \(h, w\), its mask \[5, 4\]": good
    | {"mask": np.zeros((5, 4), np.uint8)},
    "'odd' is list, which a packed": good | {"odd": [1]},
  }


@pytest.mark.parametrize("reason", bad_rows()[1])
def test_a_bad_row_is_named(reason, tmp_path):
  good, bad = bad_rows()
  with pytest.raises(UserError, match=rf"1 of the rows 0 to 1 cannot.*row 1 \('\w+'\): .*{reason}"):
    packing.pack(made([good, bad[reason]]), tmp_path, split="train", threads=0)


def test_bad_rows_are_left_out_and_recorded(tmp_path):
  good, bad = bad_rows()
  rows = [good, *list(bad.values())[:5], good, good, bad["there is no caption"]]
  notes = []
  options = dict(split="train", shard_examples=1, on_bad="skip", note=notes.append)
  done = packing.pack(made(rows), tmp_path, **options)
  assert (done.rows, done.examples, done.skipped, done.shards) == (9, 3, 6, 3)
  assert notes[0] == "left out row 1 ('row1'): FileNotFoundError: x.jpg" and len(notes) == 6
  split = packs.split_of(tmp_path, "train")
  assert [number for number, _ in split["skipped"]] == [1, 2, 3, 4, 5, 8]
  assert split["skipped"][0] == [1, "row1"] and split["skipped"][-1] == [8, "good"]
  assert len(packed(tmp_path)) == 3
  notes.clear()
  assert packing.pack(made(rows), tmp_path, **options) == done._replace(read=1)
  assert notes == ["left out row 8 ('good'): there is no caption"]  # after the last shard
  with pytest.raises(UserError, match="3 bad rows, more than max_errors=2; the last: row 3"):
    packing.pack(made(rows), tmp_path / "few", **options, max_errors=2)
  with pytest.raises(UserError, match=r"None of the 1 rows can be packed\."):
    packing.pack(made(rows[1:2]), tmp_path / "none", **options)
  assert not list((tmp_path / "none").iterdir())


def test_arguments_are_checked(tmp_path):
  for options, said in (
    ({"split": "train[:9]"}, "The split is called"),
    ({"on_bad": "skp"}, "Did you mean 'skip'"),
    ({"shard_examples": 0}, "shard_examples=0; expected 1"),
    ({"threads": -1}, "threads=-1"),
    ({"threads": 10**20}, "expected at most 1000"),
  ):
    with pytest.raises(UserError, match=said):
      pack(tmp_path / "out", **options)
  assert not (tmp_path / "out").exists()


# --- damage ---


def flip(path, place):
  data = bytearray(path.read_bytes())
  data[place(data)] ^= 4
  path.write_bytes(data)


def test_each_flipped_bit_is_found(tmp_path):
  pack(tmp_path / "good")
  for number in range(30):
    out = shutil.copytree(tmp_path / "good", tmp_path / str(number))
    files = sorted(out.iterdir())
    path = files[number % len(files)]
    place = np.random.default_rng(number).random()
    flip(path, lambda data, place=place: int(place * len(data)))
    wrong = path.with_suffix(".array_record").name
    if path.name == packs.MANIFEST:
      with pytest.raises(UserError, match=r"manifest.json (is damaged|has version)"):
        packed(out)
      continue
    found = {pathlib.Path(name).name for name, problem in packs.verify(out) if problem}
    assert found == {wrong}
    try:  # Bytes that hold no record, as an end that is padded, change nothing.
      source = packed(out)
      got = source.read(range(len(source)))
      labels = source.labels()
    except UserError as e:
      assert path.name in str(e)
    else:
      check_same(make_source(**SYNTHETIC).read(range(60)), got)
      assert labels == make_source(**SYNTHETIC).labels()
    shutil.rmtree(out)


@pytest.mark.parametrize("what", ["shorter", "longer", "missing", "no index"])
def test_opening_finds_what_is_missing(what, tmp_path):
  pack(tmp_path)
  path = tmp_path / "train-00002.array_record"
  if what == "shorter":
    path.write_bytes(path.read_bytes()[:-1])
  elif what == "longer":
    path.write_bytes(path.read_bytes() + b"x")
  else:
    path = path if what == "missing" else path.with_suffix(".json")
    path.unlink()
  with pytest.raises(packs.DamagedError, match=rf"{path.name} (is missing|has .* bytes, written)"):
    packed(tmp_path)
  assert [n for n, p in packs.verify(tmp_path) if p] == [str(path.with_suffix(".array_record"))]
  pack(tmp_path)
  packed(tmp_path)


def test_a_bad_record_stops_a_stream_that_names_its_shard(tmp_path):
  pack(tmp_path)
  flip(tmp_path / "train-00000.array_record", lambda data: data.index(b"synthetic_1"))
  pp = "value_range(-1, 1)|keep('image')"
  with pytest.raises(UserError, match=r"Bad example 1 .*train-00000.array_record is damaged"):
    list(eval_batches(packed(tmp_path), pp, batch_size=30, threads=0))
  batches = eval_batches(packed(tmp_path), pp, batch_size=30, threads=0, on_error="skip")
  assert sum(batch["_mask"].sum() for batch in batches) == 59


def test_a_split_that_is_not_complete_is_not_read(tmp_path):
  with pytest.raises(UserError, match=r"has no manifest.json, so it is no packed data set"):
    packed(tmp_path)
  pack(tmp_path)
  packs.write_json(tmp_path / "val.begun.json", {})
  assert len(packed(tmp_path)) == 60
  with pytest.raises(UserError, match=r"Split 'val' in .* is not complete; the `flexivit pack`"):
    packed(tmp_path, "val")
  assert [n for n, p in packs.verify(tmp_path) if p] == [str(tmp_path / "val")]
  text = (tmp_path / packs.MANIFEST).read_text().replace('"version": 1', '"version": 2')
  (tmp_path / packs.MANIFEST).write_text(text)
  with pytest.raises(UserError, match="has version 2 of the format; this code reads 1"):
    packed(tmp_path)
  assert json.loads(text)["format"] == "flexivit_jax packed"
