"""The record of an ONNX export: what is damaged is found, without onnx."""

import json

import pytest

from flexivit_jax import errors
from flexivit_jax.weights import folders
from flexivit_jax.weights.export import onnx as onnx_folder

PARTS = {"weights.bin": b"weights", "seqhw_04.onnx": b"four", "seqhw_15.onnx": b"fifteen"}
RECORD = {"format": "flexivit onnx 1", "sizes": [4, 15]}


def export(tmp_path, record):
  """Files as an export has them, of no real graph."""
  with folders.new(tmp_path / "out") as part:
    for name, data in PARTS.items():
      (part / name).write_bytes(data)
    (part / "record.json").write_text(record)
  return tmp_path / "out"


@pytest.fixture
def folder(tmp_path):
  return export(tmp_path, json.dumps(RECORD))


def test_an_undamaged_export_gives_its_record(folder):
  assert onnx_folder.read_record(str(folder)) == RECORD


@pytest.mark.parametrize("name", [*PARTS, "record.json"])
def test_a_flipped_bit_and_a_missing_file_are_found(folder, name):
  data = bytearray((folder / name).read_bytes())
  data[2] ^= 1
  (folder / name).write_bytes(data)
  with pytest.raises(
    errors.UserError, match=rf"{name} has other bytes .* Copy or write it again.$"
  ):
    onnx_folder.read_record(folder)
  (folder / name).unlink()
  with pytest.raises(errors.UserError, match=f"{name} is missing"):
    onnx_folder.read_record(folder)


def test_without_its_manifest_it_is_damaged(folder):
  (folder / "flexivit_manifest.txt").unlink()
  with pytest.raises(errors.UserError, match=r"flexivit_manifest\.txt cannot be read"):
    onnx_folder.read_record(folder)


@pytest.mark.parametrize(
  ("record", "message"),
  [
    (
      json.dumps(RECORD | {"format": "flexivit onnx 2"}),
      "its format is 'flexivit onnx 2'; expected 'flexivit onnx 1'",
    ),
    (json.dumps(RECORD | {"sizes": ["../4"]}), "cannot be read"),
    *((text, "cannot be read") for text in ("", "[1]", "{}", "\x00")),
  ],
)
def test_a_record_that_says_something_else_is_refused(tmp_path, record, message):
  with pytest.raises(errors.UserError, match=message):
    onnx_folder.read_record(export(tmp_path, record))


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
  with pytest.raises(errors.UserError, match="is no export of ours"):
    onnx_folder.read_record(tmp_path / "nowhere")
