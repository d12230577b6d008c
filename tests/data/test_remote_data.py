"""Data in a bucket: the same records and the same batches as from a local folder, whatever fails or is damaged."""

import importlib.util
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest

from flexivit_jax import cli, storage
from flexivit_jax.data import loader, pack_inputs, packing, record_layout, remote_shards
from flexivit_jax.data.sources import make_source
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

_spec = importlib.util.spec_from_file_location(
  "emulated", pathlib.Path(__file__).parents[1] / "running" / "emulated.py"
)
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)
server_fixture, proxy_fixture = emulated.server_fixture, emulated.proxy_fixture

SYNTHETIC = dict(name="synthetic", image_size=32, num_classes=4, num_examples=150)
PP = "decode|flip_lr|value_range(-1, 1)|keep('image', 'label')"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A packed data set: four shards of training images, one of test images."""
  out = tmp_path_factory.mktemp("pack") / "packed"
  for split in ("train", "test"):
    source = make_source(**SYNTHETIC, split=split)
    inputs = pack_inputs.of_source(source, {"name": "synthetic", "split": split})
    examples = 40 if split == "train" else None
    packing.pack(inputs, out, split=split, shard_examples=examples, threads=0)
  return out


def put(folder, url):
  """Copies a folder into a bucket."""
  bucket = storage.Bucket(url)
  for path in folder.rglob("*"):
    if path.is_file():
      bucket.upload(path, str(path.relative_to(folder)))
  return bucket


def batches(source, start=0, **options):
  options = {"batch_size": 30, "seed": 3, "num_steps": 12, "keep_mb": 0, "threads": 2, **options}
  with loader.train_batches(source, PP, start_step=start, **options) as found:
    return [{k: np.array(v) for k, v in batch.items()} for batch in found]


def used_by(cache):
  """Bytes of the shards in a cache folder."""
  return sum(p.stat().st_blocks * 512 for p in (cache / "data" / "shards").glob("*.array_record"))


def check_same(some, others):
  assert len(some) == len(others)
  for a, b in zip(some, others, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      np.testing.assert_array_equal(a[key], b[key])


def test_a_record_is_read_from_a_file_of_which_only_its_bytes_are_there(folder, tmp_path):
  from array_record.python.array_record_module import ArrayRecordReader

  path = folder / "train-00001.array_record"
  content = path.read_bytes()
  layout = record_layout.layout_of(len(content), lambda start, end: content[start:end])
  assert (layout.records, layout.group, len(layout.offsets)) == (40, 1, 41)
  reader = ArrayRecordReader(str(path), remote_shards.READER)
  for n in range(0, 40, 3):
    start, end = layout.offsets[n : n + 2]
    part = tmp_path / f"{n}.array_record"
    part.write_bytes(
      bytes(start)
      + content[start:end]
      + bytes(layout.offsets[-1] - end)
      + content[layout.offsets[-1] :]
    )
    hole = ArrayRecordReader(str(part), remote_shards.READER)
    assert hole.read([n]) == reader.read([n])
    with pytest.raises(RuntimeError):
      hole.read([n + 1 if n < 39 else 0])
  for damage in (0, 5, 40, 70, 100):
    end = bytearray(content)
    end[-record_layout.BLOCK + damage] ^= 0x55
    try:
      again = record_layout.layout_of(len(end), lambda start, end_, e=end: bytes(e[start:end_]))
    except record_layout.LayoutError:
      continue
    assert again.offsets.tolist() == layout.offsets.tolist()  # in a byte that is not read


@emulated.needed
@pytest.mark.parametrize("cache_gb", [50.0, pytest.param(4e-4, marks=pytest.mark.slow)])
def test_batches_from_a_bucket_are_those_of_the_folder(folder, proxy, cache_gb, tmp_path):
  proxy.share = 0.05
  put(folder, "s3://bucket/packed")
  data = dict(name="packed", split="train[:90%]+test", cache_gb=cache_gb)
  local, remote = (make_source(**data, data_dir=d) for d in (folder, "s3://bucket/packed"))
  assert (len(local), local.class_names, local.labels()) == (
    len(remote),
    remote.class_names,
    remote.labels(),
  )
  expected = batches(local)
  check_same(batches(remote), expected)
  check_same(batches(make_source(**data, data_dir="s3://bucket/packed"), start=5), expected[5:])
  check_same(
    batches(remote, process_index=1, process_count=2, start=9),
    [{k: v[15:] for k, v in batch.items()} for batch in expected[9:]],
  )
  assert proxy.failed
  begun = time.monotonic()
  while (
    used := used_by(tmp_path / "cache")
  ) > cache_gb * 1e9:  # what was asked for ahead still comes
    assert time.monotonic() - begun < 10
    time.sleep(0.05)
  assert used


@emulated.needed
def test_only_what_is_read_is_fetched_and_that_once(folder, proxy, tmp_path):
  put(folder, "s3://bucket/few")
  data = dict(name="packed", split="train", data_dir="s3://bucket/few")
  source = make_source(**data)
  source[3], source[77]
  shards = list((tmp_path / "cache" / "data" / "shards").glob("*.array_record"))
  assert len(shards) == 2
  again = make_source(**data)
  proxy.share, proxy.only, proxy.status = 1.0, ("GET", "array_record"), 403
  assert again[3]["id"] == source[3]["id"]
  with pytest.raises(UserError, match=r"s3://bucket/few/train-00003.array_record: no permission"):
    again[130]


@emulated.needed
def test_what_is_wrong_with_an_object_is_named(folder, proxy, tmp_path):
  url, out = "s3://bucket/bad", tmp_path / "bad"
  data = dict(name="packed", split="train", data_dir=url)
  with pytest.raises(UserError, match=f"nothing at {url}"):
    make_source(**data)
  with pytest.raises(UserError, match=r"cache_gb=0; expected GB"):
    make_source(**data, cache_gb=0)
  with pytest.raises(
    UserError, match=r"'folder' is read from a folder of this machine.*flexivit pack"
  ):
    make_source(name="folder", split="train", data_dir=url)
  shutil.copytree(folder, out)
  bucket = put(out, url)
  shard = "train-00002.array_record"
  content = (out / shard).read_bytes()

  bucket.delete(shard)
  with pytest.raises(UserError, match=f"{url}/{shard} is missing"):
    make_source(**data)
  bucket.write(shard, content[:-100])
  with pytest.raises(UserError, match=f"{url}/{shard} has .* bytes, written were"):
    make_source(**data)
  bucket.delete("train-00002.json")
  with pytest.raises(UserError, match=f"{url}/train-00002.json is missing"):
    make_source(**data)
  bucket.write("train-00002.json", (out / "train-00002.json").read_bytes())

  flipped = bytearray(content)
  flipped[90] ^= 4
  bucket.write(shard, bytes(flipped))
  source = make_source(**data, cache_gb=5e-4)  # so that records come alone
  with pytest.raises(UserError, match=f"{url}/{shard} is damaged"):
    source[80]
  bucket.write(shard, content)
  with pytest.raises(UserError, match=f"{url}/{shard} has changed since it was opened"):
    source[81 + 30]
  assert make_source(**data)[80]["id"]

  bucket.write("manifest.json", (out / "manifest.json").read_bytes().replace(b"rows", b"rowz"))
  with pytest.raises(UserError, match=f"{url}/manifest.json is damaged"):
    make_source(**data)


@emulated.needed
def test_a_record_that_was_lost_in_the_cache_is_fetched_again(folder, proxy, tmp_path):
  put(folder, "s3://bucket/lost")
  data = dict(name="packed", split="train", data_dir="s3://bucket/lost")
  image = make_source(**data)[5]["image"]
  cache = tmp_path / "cache" / "data" / "shards"
  for path in cache.glob("*.array_record"):
    content = bytearray(path.read_bytes())
    content[:20_000] = bytes(20_000)  # as after a power failure
    path.write_bytes(content)
  np.testing.assert_array_equal(make_source(**data)[5]["image"], image)


TFDS = """
import io, sys, tensorflow_datasets as tfds
from PIL import Image
class Numbers(tfds.core.GeneratorBasedBuilder):
  VERSION = tfds.core.Version("1.0.0")
  def _info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({
      "image": tfds.features.Image(shape=(8, 8, 3)), "label": tfds.features.ClassLabel(num_classes=3)}))
  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples(90)}
  def _generate_examples(self, count):
    for i in range(count):
      file = io.BytesIO()
      Image.new("RGB", (8, 8), (i, 0, 0)).save(file, "PNG")
      file.seek(0)
      yield i, {"image": file, "label": i % 3}
Numbers(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""


@emulated.needed
@pytest.mark.slow
def test_tfds_data_in_a_bucket_are_those_of_the_folder(proxy, tmp_path):
  subprocess.run([sys.executable, "-c", TFDS, tmp_path / "tfds"], check=True, capture_output=True)
  bucket = put(tmp_path / "tfds", "s3://bucket/tfds")
  data = dict(name="numbers", split="train[10:80]")
  local = make_source(**data, data_dir=tmp_path / "tfds")
  remote = make_source(**data, data_dir="s3://bucket/tfds")
  assert "tensorflow" not in sys.modules
  check_same(batches(remote), batches(local))
  check_same(batches(remote, workers=2), batches(local))
  with pytest.raises(UserError, match="There is nothing at s3://bucket/tfds/other"):
    make_source(name="other", split="train", data_dir="s3://bucket/tfds")
  shard = "numbers/1.0.0/numbers-train.array_record-00000-of-00001"
  bucket.delete(shard)
  with pytest.raises(UserError, match=f"s3://bucket/tfds/{shard} is missing"):
    make_source(**data, data_dir="s3://bucket/tfds")


CONFIG = """
import ml_collections


def get_config(arg=""):
  del arg
  pp = "value_range(-1, 1)|onehot(4)|keep('image', 'labels')"
  return ml_collections.ConfigDict(dict(
    total_steps=12,
    log_every=1,
    input=dict(
      data=dict(name="packed", split="train", data_dir=""), pp=f"decode|flip_lr|{pp}", batch_size=30, keep_mb=0
    ),
    model=dict(variant="mu", patch_size=(8, 8), posemb_size=(4, 4), depth=1),
    flexi=dict(seqhw=dict(v=(4,))),
    optim=dict(lr=1e-2, wd=1e-3, schedule=dict(warmup_steps=2)),
    checkpoint=dict(every_steps=6, keep=2),
  ))
"""


@emulated.needed
@pytest.mark.slow
def test_a_run_may_go_on_from_a_bucket_that_began_from_a_folder(folder, proxy, tmp_path):
  put(folder, "s3://bucket/run")
  proxy.share = 0.05
  config = tmp_path / "config.py"
  config.write_text(CONFIG)

  def losses(run, *changes):
    line = ["train", "--config", str(config), "--workdir", str(tmp_path / run)]
    assert cli.main([*line, *(f"--config.input.data.{change}" for change in changes)]) == 0
    rows = (tmp_path / run / "metrics.jsonl").read_text().splitlines()
    return [row["loss"] for row in map(json.loads, rows) if "loss" in row]

  expected = losses("local", f"data_dir={folder}")
  assert len(expected) == 12
  assert losses("remote", "data_dir=s3://bucket/run", "cache_gb=1") == expected
  shutil.rmtree(tmp_path / "local" / "checkpoints" / "12")
  assert losses("local", "data_dir=s3://bucket/run", "cache_gb=5e-4") == expected
