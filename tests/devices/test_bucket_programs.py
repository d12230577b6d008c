"""Compiled programs in a bucket: a second machine compiles nothing, and a bucket that fails stops no run."""

import collections
import importlib.util
import os
import pathlib
import subprocess
import sys

import jax
import pytest

from flexivit_jax import errors, storage
from flexivit_jax.devices import bucket_programs, compilation

_spec = importlib.util.spec_from_file_location(
  "emulated", pathlib.Path(__file__).parents[1] / "running" / "emulated.py"
)
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)

URL = "gs://bucket/compiled"
COUNT = """
import collections, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: events.update([name.rpartition("/")[2]]))
from flexivit_jax import cli
code = cli.main(sys.argv[1:])
print(code, events["cache_misses"], events["cache_hits"])
"""


class Objects:
  """Stands for a bucket."""

  def __init__(self, url, **options):
    del options
    self.url, self.asked = url, collections.Counter()
    self.objects, self.error = {}, None

  def _request(self, kind):
    self.asked[kind] += 1
    if self.error:
      raise self.error

  def read(self, name):
    self._request("read")
    return self.objects.get(name)

  def write(self, name, content):
    self._request("write")
    self.objects[name] = content


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """One to which JAX's cache leads."""
  monkeypatch.setattr(bucket_programs, "_places", {})
  monkeypatch.setattr(storage, "Bucket", Objects)
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path))
  keep = {k: v for k, v in jax.config.values.items() if "cache" in k and k.startswith("jax_")}
  jax.config.update("jax_compilation_cache_dir", URL)
  try:
    assert compilation.keep_programs() is None
    (place,) = bucket_programs._places.values()
    yield place
  finally:
    for name, value in keep.items():
      jax.config.update(name, value)


def test_jaxs_cache_keeps_its_entries_in_the_bucket(bucket, tmp_path):
  from jax._src import lru_cache

  cache = lru_cache.LRUCache(jax.config.values["jax_compilation_cache_dir"], max_size=-1)
  assert cache.get("step") is None
  cache.put("step", b"program")
  bucket._pool.shutdown()
  objects = bucket._bucket
  assert objects.url == f"{URL}/{compilation._processor()}"
  assert objects.objects == {"step-cache": b"program"}
  before = objects.asked["read"]
  assert cache.get("step") == b"program" and objects.asked["read"] == before + 1
  # Else a path of this machine were part of every key.
  assert jax.config.values["jax_persistent_cache_enable_xla_caches"] == "none"


def test_a_bucket_that_fails_costs_one_warning(bucket, caplog):
  folder = bucket_programs.ProgramPath(jax.config.values["jax_compilation_cache_dir"])
  bucket._bucket.error = errors.UserError("gs://bucket/compiled/x: no permission")
  assert not (folder / "a").exists() and not (folder / "b").exists()
  (folder / "a").write_bytes(b"program")
  bucket._pool.shutdown()
  assert bucket._bucket.asked == {"read": 1}
  assert [r.getMessage() for r in caplog.records] == [
    "Compiled programs are not kept in the bucket: gs://bucket/compiled/x: no permission"
  ]


@emulated.needed
@pytest.mark.slow
def test_a_second_machine_compiles_nothing(tmp_path):
  with emulated.server() as url:
    proxy = emulated.Failing(url)
    proxy.share = 0.05

    def started(machine):
      env = {**os.environ, **emulated.environment(proxy.url, tmp_path / machine)}
      env["JAX_COMPILATION_CACHE_DIR"] = "s3://bucket/compiled"
      command = [sys.executable, "-c", COUNT, "train", "--config=configs/digits.py:debug"]
      command.append(f"--workdir=s3://bucket/runs/{machine}")
      run = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
      assert run.stdout.strip(), run.stderr
      return tuple(map(int, run.stdout.splitlines()[-1].split()))

    code, compiled, found = started("first")
    assert (code, found) == (0, 0) and compiled > 5
    assert started("second") == (0, 0, compiled)
    proxy.only, proxy.share, proxy.status = ("", "compiled"), 1.0, 403
    assert started("third") == (0, compiled, 0)
    proxy.close()
