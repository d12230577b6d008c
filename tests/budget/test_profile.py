import json
import zipfile

import pytest
from hypothesis import given, settings, strategies as st

from flexivit_jax import errors
from flexivit_jax.budget import profile

ROWS = (
  profile.Row(8, 1, 20.0, 24.0, 1.5, 0.7, 0.69, 0.71, 1000, 1.2, 1.1, 90.0),
  profile.Row((4, 6), 4, 40.0, 41.0, 0.5, 0.6, 0.59, 0.61, 1000, runtime="onnx", dtype="int8"),
)
METRIC = dict(name="top1", better="max", interval="binomial", unit="%")
ONE = profile.Profile(
  "a" * 64,
  "cpu, 2 cores",
  METRIC,
  dict(name="digits", n=360),
  (48, 48, 3),
  dict(jax="0.10.2"),
  90.0,
  ROWS,
)


def test_written_and_read(tmp_path):
  path = tmp_path / "model.npz.profile.json"
  profile.write(path, ONE)
  assert profile.read(path) == [ONE]
  assert profile.of(path, ONE.weights) == [ONE]


def test_profiles_of_other_weights_and_devices_stay(tmp_path):
  path = tmp_path / profile.NAME
  others = [ONE._replace(device="TPU v4"), ONE._replace(weights="b" * 64)]
  for one in (ONE, *others, ONE._replace(peak_gflops=1.0)):
    profile.write(path, one)
  assert profile.read(path) == [*others, ONE._replace(peak_gflops=1.0)]
  assert [one.device for one in profile.of(path, ONE.weights)] == ["TPU v4", "cpu, 2 cores"]


def test_other_weights_are_refused(tmp_path):
  path = tmp_path / profile.NAME
  with pytest.raises(errors.UserError, match=r"There is no profile .*flexivit profile"):
    profile.of(path, ONE.weights)
  profile.write(path, ONE)
  with pytest.raises(
    errors.UserError, match=r"profile of other weights .*aaaaaaaaaaaa; these are cccc"
  ):
    profile.of(path, "c" * 64)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_file_is_an_error_and_never_another_profile(tmp_path_factory, data):
  path = tmp_path_factory.mktemp("p") / profile.NAME
  whole = bytearray(profile.text_of([ONE]).encode())
  at = data.draw(st.integers(0, len(whole) - 1))
  if data.draw(st.booleans()):
    whole[at] ^= 1 << data.draw(st.integers(0, 6))
  else:
    del whole[at:]
  path.write_bytes(bytes(whole))
  try:
    assert profile.read(path) == [ONE]  # a letter of what nobody reads: white space
  except errors.UserError as e:
    assert str(path) in str(e)


@pytest.mark.parametrize(
  ("change", "problem"),
  [
    (
      lambda c: c | {"format": "flexivit profile 2"},
      "format 'flexivit profile 2'; this version reads",
    ),
    (lambda c: c | {"profiles": []}, "wrong sha256"),
    (lambda c: [], "damaged, or no file of this kind"),
    (lambda c: {"rows": []}, "damaged, or no file of this kind"),
  ],
)
def test_other_files_and_formats(tmp_path, change, problem):
  path = tmp_path / profile.NAME
  path.write_text(json.dumps(change(json.loads(profile.text_of([ONE])))))
  with pytest.raises(errors.UserError, match=problem):
    profile.read(path)


@pytest.mark.parametrize(
  "fields", [dict(ms=0.0), dict(batch=0), dict(low=0.9), dict(runtime="torch"), dict(gflops=-1.0)]
)
def test_numbers_that_nothing_measures(tmp_path, fields):
  path = tmp_path / profile.NAME
  path.write_text(profile.text_of([ONE._replace(rows=(ROWS[0]._replace(**fields),))]))
  with pytest.raises(errors.UserError, match="is damaged"):
    profile.read(path)


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_an_export_carries_the_profiles_of_its_source(tmp_path, kind):
  record = json.dumps({"sizes": [8], "profile": profile.content_of([ONE])})
  if kind == "zip":
    out = tmp_path / "vit.zip"
    with zipfile.ZipFile(out, "w") as file:
      file.writestr("record.json", record)
  else:
    out = tmp_path
    (out / "record.json").write_text(record)
  path = profile.path_of(out, ONE.weights)
  assert profile.of(path, ONE.weights) == [ONE]
  here = ONE._replace(device="here")
  profile.write(path, here)
  assert profile.of(path, ONE.weights) == [ONE, here]


def test_an_export_without_profiles_has_none(tmp_path):
  (tmp_path / "record.json").write_text("{}")
  assert profile.read(profile.path_of(tmp_path, "a")) == []


def test_where_it_lies(tmp_path, monkeypatch):
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "cache"))
  (tmp_path / "model.npz").touch()
  assert profile.path_of(tmp_path, "a") == tmp_path / "profile.json"
  assert profile.path_of(tmp_path / "model.npz", "a") == tmp_path / "model.npz.profile.json"
  assert profile.path_of("s3://bucket/run", "a") == tmp_path / "cache/profiles/a.profile.json"


class TestDevices:
  def test_that_of_the_device(self):
    assert profile.on_device([ONE, ONE._replace(device="TPU v4")], "TPU v4").device == "TPU v4"

  def test_another_device_is_refused(self):
    with pytest.raises(
      errors.UserError, match=r"another device .cpu, 2 cores; this is TPU v4.*--estimate"
    ):
      profile.on_device([ONE], "TPU v4")

  def test_an_estimate_is_scaled_and_says_so(self):
    scaled = profile.on_device([ONE], "TPU v4", 900.0)
    assert (scaled.estimated, scaled.device) == ("cpu, 2 cores", "TPU v4")
    assert [row.ms for row in scaled.rows] == pytest.approx([2.0, 4.0])
    assert [row.ms_p90 for row in scaled.rows] == pytest.approx([2.4, 4.1])
    assert [row.value for row in scaled.rows] == [0.7, 0.6]
    with pytest.raises(errors.UserError, match="peak_gflops=0"):
      profile.on_device([ONE], "TPU v4", 0.0)
