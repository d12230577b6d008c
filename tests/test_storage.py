"""Objects in a bucket: addresses, conditions, back-off, and what is said of each refusal."""

import importlib.util
import pathlib
import re
import sys

import pytest

from flexivit_jax import errors, storage
from flexivit_jax.doctor import storage as doctor_storage

pytestmark = pytest.mark.faults

_spec = importlib.util.spec_from_file_location(
  "emulated", pathlib.Path(__file__).parent / "running" / "emulated.py"
)
emulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(emulated)


@pytest.mark.parametrize(
  ("path", "url"),
  [
    ("s3://bucket/run", "s3://bucket/run"),
    (pathlib.Path("s3://bucket/run"), "s3://bucket/run"),
    (pathlib.Path("gs://bucket/a/b/"), "gs://bucket/a/b"),
    ("gs://bucket", "gs://bucket"),
    ("runs/s3:/bucket", None),
    ("s3", None),
    ("s3:/", None),
    ("az://bucket/run", None),
  ],
)
def test_an_address_is_told_from_a_path(path, url):
  assert storage.address(path) == url


def test_without_the_package_it_is_said_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "obstore.store", None)
  with pytest.raises(errors.UserError, match=r"pip install 'flexivit_jax\[gcs\]'"):
    storage.Bucket("gs://bucket/run")


server_fixture, proxy_fixture = emulated.server_fixture, emulated.proxy_fixture


@emulated.needed
@pytest.mark.full
class TestBucket:
  def test_what_is_written_is_read_and_listed(self, proxy, tmp_path):
    bucket = storage.Bucket("s3://bucket/one")
    bucket.write("a", b"1")
    bucket.write("folder/b c%", b"22")
    assert bucket.read("a") == b"1" and bucket.read("none") is None and bucket.stat("none") is None
    assert {k: v.size for k, v in bucket.entries().items()} == {"a": 1, "folder/b c%": 2}
    assert list(bucket.entries("folder")) == ["folder/b c%"]
    bucket.delete("a")
    bucket.delete("a")
    assert list(bucket.entries()) == ["folder/b c%"]
    large = tmp_path / "large"
    large.write_bytes(bytes(range(256)) * 2**16)  # two pieces
    bucket.upload(large, "large")
    assert bucket.download("large", tmp_path / "back") and not bucket.download("no", tmp_path / "x")
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    bucket.check("probe")
    assert bucket.repeated == 0

  def test_one_of_two_writers_creates_and_one_replaces(self, proxy):
    bucket = storage.Bucket("s3://bucket/two")
    first = bucket.create("lock", b"1")
    assert first is not None and bucket.create("lock", b"2") is None
    second = bucket.replace("lock", b"3", first)
    assert second is not None and bucket.replace("lock", b"4", first) is None
    assert bucket.read("lock") == b"3" and bucket.replace("gone", b"5", first) is None

  def test_requests_that_fail_are_repeated_and_counted(self, proxy):
    bucket = storage.Bucket("s3://bucket/three", wait_s=0.001)
    proxy.share = 0.3
    for i in range(40):
      bucket.write(str(i), b"%d" % i)
    assert [bucket.read(str(i)) for i in range(40)] == [b"%d" % i for i in range(40)]
    # Also where the answer to a write under a condition is lost on its way.
    versions = [bucket.create("lock", b"mine")]
    for i in range(20):
      versions.append(bucket.replace("lock", b"%d" % i, versions[-1]))
    assert None not in versions and bucket.create("lock", b"other") is None
    assert 10 < bucket.repeated == proxy.failed

  def test_what_stays_busy_is_given_up_by_name(self, proxy):
    bucket = storage.Bucket("s3://bucket/four", attempts=3, wait_s=0.001)
    proxy.share = 1.0
    with pytest.raises(errors.UserError, match=r"^s3://bucket/four/x: given up after 3 attempts: "):
      bucket.write("x", b"1")
    assert proxy.failed == 3

  @pytest.mark.parametrize(
    ("status", "message"),
    [
      (403, "no permission: .*A run reads, writes"),
      (401, "the credentials are refused"),
      (400, "refused"),
    ],
  )
  def test_a_refusal_is_not_repeated(self, proxy, status, message):
    bucket = storage.Bucket("s3://bucket/five")
    proxy.share, proxy.status = 1.0, status
    with pytest.raises(errors.UserError, match=f"^s3://bucket/five/x: {message}"):
      bucket.check("x")
    assert proxy.failed == 1

  def test_a_bucket_that_is_not_there_is_named(self, proxy):
    with pytest.raises(errors.UserError, match="there is no bucket 'nobody'; make it"):
      storage.Bucket("s3://nobody/run").check("x")

  def test_a_server_that_ignores_conditions_is_refused(self, proxy, monkeypatch):
    bucket = storage.Bucket("s3://bucket/seven")
    put = bucket._put
    monkeypatch.setattr(bucket, "_put", lambda name, content, **options: put(name, content))
    with pytest.raises(errors.UserError, match="two runs could write one folder"):
      bucket.check("x")
    assert bucket.stat("x") is None

  def test_the_doctor_writes_reads_and_deletes(self, proxy):
    found = doctor_storage.check(pathlib.Path("s3://bucket/eight/run"), [])
    assert re.fullmatch(
      r"s3://bucket/eight/run: \d+ MiB/s written, \d+ read, .* 0 requests repeated", found
    )
    assert storage.Bucket("s3://bucket/eight").entries() == {}
    with pytest.raises(errors.UserError, match="there is no bucket 'nobody'"):
      doctor_storage.check(pathlib.Path("s3://nobody/run"), [])

  def test_keys_are_found_in_the_files_of_aws(self, proxy, monkeypatch, tmp_path):
    file = tmp_path / "credentials"
    file.write_text(
      "[other]\naws_access_key_id = a\naws_secret_access_key = b\nregion = eu-west-1\n"
    )
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_PROFILE", "other")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
      monkeypatch.delenv(key)
    storage.Bucket("s3://bucket/six").check("x")
    file.write_text("")
    # Nothing is left but to ask the machine's own service, which is none here.
    with pytest.raises(errors.UserError, match="no credentials are found; set AWS_ACCESS_KEY_ID"):
      storage.Bucket("s3://bucket/six", attempts=1).check("x")
