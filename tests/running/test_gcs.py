"""Objects and a run in gs://, against a stand-in for Google's server."""

import importlib.util
import pathlib

import pytest

from flexivit_jax import errors, storage, train
from flexivit_jax.running import bucket_lock, bucket_run

pytestmark = pytest.mark.faults


def _load(name):
  spec = importlib.util.spec_from_file_location(name, pathlib.Path(__file__).parent / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


gcs_module, buckets = _load("gcs"), _load("test_bucket_run")
gcs_fixture, settings, local = gcs_module.gcs_fixture, buckets.settings, buckets.local
needed = pytest.mark.skipif("obstore" in buckets.emulated.MISSING, reason="needs obstore")


@needed
def test_objects_are_written_read_listed_and_replaced_under_conditions(gcs):
  bucket = storage.Bucket("gs://bucket/run", wait_s=0.01)
  gcs.share = 0.2
  assert bucket.read("a/b") is None and bucket.stat("a/b") is None
  bucket.write("a/b", b"hello")
  assert bucket.read("a/b") == b"hello" and bucket.read_range("a/b", 1, 3) == b"el"
  assert bucket.create("a/b", b"other") is None
  first = bucket.create("a/c", b"1")
  assert bucket.stat("a/c").version == first and first.generation
  second = bucket.replace("a/c", b"2", first)
  assert bucket.replace("a/c", b"3", first) is None and bucket.read("a/c") == b"2"
  assert bucket.stat("a/c").version == second != first
  assert {name: entry.size for name, entry in bucket.entries("a").items()} == {"a/b": 5, "a/c": 1}
  bucket.delete("a/b")
  bucket.delete("a/b")
  assert bucket.entries().keys() == {"a/c"}
  bucket.check("probe")
  assert set(gcs.objects) == {"run/a/c"} and gcs.failed > 0
  with pytest.raises(errors.UserError, match="there is no bucket 'none'"):
    storage.Bucket("gs://none/run").write("a", b"")


@needed
@pytest.mark.slow
def test_a_run_has_the_bits_of_a_local_one_and_its_lock_refuses_another(gcs, settings, local):
  gcs.share, url = 0.05, "gs://bucket/gcs/run"
  with bucket_run.opened(url), pytest.raises(errors.UserError, match="is in use by process"):
    train.train(settings[0], pathlib.Path(url))
  for _ in range(2):  # the second one fetches what the first has written
    train.train(settings[0], pathlib.Path(url))
    assert gcs.failed > 0 and bucket_lock.NAME not in storage.Bucket(url).entries()
    assert buckets.emulated.content(bucket_run.fetched(url)) == buckets.emulated.content(local)
