"""The record of an ONNX export: what is damaged is found, without onnx."""

import hashlib
import json

import pytest

from flexivit_jax import errors
from flexivit_jax.weights import onnx_folder

PARTS = {"weights.bin": b"weights", "seqhw_04.onnx": b"four", "seqhw_15.onnx": b"fifteen"}


@pytest.fixture
def folder(tmp_path):
  """Files as an export has them, of no real graph."""
  for name, data in PARTS.items():
    (tmp_path / name).write_bytes(data)
  record = {"format": "flexivit onnx 1", "sizes": [4, 15]}
  record["sha256"] = {name: hashlib.sha256(data).hexdigest() for name, data in PARTS.items()}
  (tmp_path / "record.json").write_text(json.dumps(record))
  return tmp_path


def test_an_undamaged_export_gives_its_record(folder):
  assert onnx_folder.read_record(str(folder))["sizes"] == [4, 15]


@pytest.mark.parametrize("name", PARTS)
def test_a_flipped_bit_and_a_missing_file_are_found(folder, name):
  data = bytearray((folder / name).read_bytes())
  data[2] ^= 1
  (folder / name).write_bytes(data)
  with pytest.raises(errors.UserError, match=rf"{name} is missing or damaged \(wrong sha256\)"):
    onnx_folder.read_record(folder)
  (folder / name).unlink()
  with pytest.raises(errors.UserError, match=f"{name} is missing or damaged"):
    onnx_folder.read_record(folder)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"format": "flexivit onnx 2"}, "its format is 'flexivit onnx 2'; expected 'flexivit onnx 1'"),
    ({"sizes": [4, 15, 30]}, r"seqhw_30\.onnx is missing"),
    ({"sizes": ["../4"]}, "cannot be read as an ONNX export"),
    ({"sha256": {}}, r"weights\.bin is missing or damaged"),
    ({"sha256": 3}, "cannot be read as an ONNX export"),
  ],
)
def test_a_record_that_says_something_else_is_refused(folder, change, message):
  record = json.loads((folder / "record.json").read_text())
  (folder / "record.json").write_text(json.dumps(record | change))
  with pytest.raises(errors.UserError, match=message):
    onnx_folder.read_record(folder)


@pytest.mark.parametrize("text", ["", "[1]", "{}", "\x00"])
def test_what_is_no_record_is_refused(folder, text):
  (folder / "record.json").write_text(text)
  with pytest.raises(errors.UserError, match="cannot be read as an ONNX export"):
    onnx_folder.read_record(folder)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
  with pytest.raises(errors.UserError, match="cannot be read as an ONNX export"):
    onnx_folder.read_record(tmp_path / "nowhere")
