"""The loader of artifacts: as good as the model, alone, and not to be deceived."""

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate, npz
from flexivit_jax.weights.export import artifact, stablehlo

FIELDS = dict(num_classes=5, patch_size=(6, 6), posemb_size=(3, 3))
FIELDS |= dict(width=16, depth=1, mlp_dim=24, num_heads=4)
VARIATIONS = {
  "tok": {},
  "gap, sincos2d": dict(pool_type="gap", posemb="sincos2d"),
  "map, scan": dict(pool_type="map", scan=True, depth=2),
  "no head": dict(num_classes=0),
  "no head, two tokens": dict(num_classes=0, pool_type="tok+gap"),
}


def make(**fields):
  """Returns (model, params): small, every array random and NumPy."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, *model.patch_size, 3), np.float32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  rng = np.random.default_rng(0)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(n, hw=(24, 24)):
  return np.random.default_rng(n).uniform(-1, 1, (n, *hw, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  """An artifact with two sizes."""
  out = tmp_path_factory.mktemp("artifact") / "vit.zip"
  stablehlo.write(out, *make(), {}, image_hw=(24, 24), sizes=(4, 8))
  return out


@pytest.mark.parametrize("fields", VARIATIONS.values(), ids=VARIATIONS)
def test_logits_are_the_models_at_every_size_and_batch(fields, tmp_path):
  model, params = make(**fields)
  out, hw = tmp_path / "vit.zip", (24, 48)
  stablehlo.write(out, model, params, {}, image_hw=hw, sizes=(2, 4, 8))
  loaded = artifact.load_artifact(out)
  assert loaded.sizes == (2, 4, 8)
  for size in loaded.sizes:
    want = certificate.logits(model, params, images(5, hw), size)
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(loaded.predict(images(5, hw), size), want, atol=1e-5)
    np.testing.assert_allclose(loaded.predict(images(5, hw)[:1], size), want[:1], atol=1e-5)


def test_a_size_that_is_not_there_lists_those_that_are(path):
  with pytest.raises(ValueError, match=r"size=6 is not in this artifact; it has \(4, 8\)"):
    artifact.load_artifact(path).predict(images(1), 6)


def test_images_of_another_shape_are_refused(path):
  with pytest.raises(ValueError, match=r"shape \[24, 24, 3\], got \[32, 32, 3\]"):
    artifact.load_artifact(path).predict(images(1, (32, 32)), 4)
  with pytest.raises(ValueError, match=r"Expected floats .* got \[24, 24, 3\], uint8"):
    artifact.load_artifact(path).predict(np.zeros((1, 24, 24, 3), np.uint8), 4)


def test_weights_are_stored_once_and_each_size_has_only_its_own(path):
  with zipfile.ZipFile(path) as file:
    names = set(file.namelist())
    with file.open("weights.npz") as part, np.load(part) as arrays:
      assert not {"embedding/kernel", "pos_embedding"} & set(arrays.files)
    with file.open("4/embedding.npz") as part, np.load(part) as arrays:
      shapes = {name: arrays[name].shape for name in arrays.files}
  assert shapes == {"embedding/kernel": (6, 6, 3, 16), "pos_embedding": (1, 16, 16)}
  programs = {f"{size}/{part}" for size in (4, 8) for part in ("embedding.npz", "program.mlirbc")}
  assert names == {"weights.npz", "record.json"} | programs


def _flipped(path, out, position, bit=0):
  data = bytearray(path.read_bytes())
  data[position] ^= 1 << bit
  out.write_bytes(data)
  return out


def test_a_flipped_bit_in_any_part_is_refused(path, tmp_path):
  with zipfile.ZipFile(path) as file:
    starts = [(i.header_offset + 30 + len(i.filename), i.file_size) for i in file.infolist()]
  for position in [start + size // 2 for start, size in starts]:
    with pytest.raises(ValueError, match="copy or export it again"):
      artifact.load_artifact(_flipped(path, tmp_path / "bad.zip", position))


@hypothesis.settings(max_examples=15)
@hypothesis.given(st.data())
def test_a_flipped_bit_anywhere_is_refused(path, data):
  position = data.draw(st.integers(0, path.stat().st_size - 1))
  bad = _flipped(path, path.with_name("bad.zip"), position, data.draw(st.integers(0, 7)))
  with pytest.raises(ValueError, match="copy or export it again"):
    artifact.load_artifact(bad)


def test_parts_that_were_exchanged_are_refused(path, tmp_path):
  bad = tmp_path / "bad.zip"
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(bad, "w") as new:
    for name in old.namelist():
      new.writestr(name, old.read({"4/embedding.npz": "8/embedding.npz"}.get(name, name)))
  with pytest.raises(ValueError, match=r"4/embedding\.npz is damaged \(wrong sha256\)"):
    artifact.load_artifact(bad)


def test_other_files_are_refused(tmp_path):
  file = tmp_path / "vit.zip"
  file.write_bytes(b"no zip")
  with pytest.raises(ValueError, match="cannot be read"):
    artifact.load_artifact(file)
  np.savez(tmp_path / "vit.npz", a=np.zeros(3))
  with pytest.raises(ValueError, match="cannot be read"):
    artifact.load_artifact(tmp_path / "vit.npz")
  with zipfile.ZipFile(file, "w") as new:
    new.writestr("record.json", '{"format": "flexivit artifact 4"}')
  with pytest.raises(ValueError, match="its format is 'flexivit artifact 4'"):
    artifact.load_artifact(file)


ALONE = """
import sys
import numpy as np
from artifact import load_artifact
vit = load_artifact("vit.zip")
np.save("logits.npy", vit.predict(np.load("images.npy"), 8))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_the_loader_runs_where_the_project_is_not(path, tmp_path):
  shutil.copy(path, tmp_path)
  shutil.copy(artifact.__file__, tmp_path / "artifact.py")
  np.save(tmp_path / "images.npy", images(3))
  code = f"import sys; sys.path.insert(0, '.')\n{ALONE}"
  env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
  command = [sys.executable, "-P", "-c", code]
  done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert not {"flexivit_jax", "flax", "flatbuffers", "safetensors"} & set(done.stdout.split())
  model, params = make()
  want = certificate.logits(model, params, images(3), 8)
  np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), want, atol=1e-5)


def test_a_program_that_this_jax_cannot_read_says_what_it_was_made_with(path, tmp_path):
  bad = tmp_path / "bad.zip"
  with zipfile.ZipFile(path) as old, zipfile.ZipFile(bad, "w") as new:
    parts = {name: old.read(name) for name in old.namelist()}
    parts["4/program.mlirbc"] = parts["4/program.mlirbc"].replace(b"vhlo", b"vhla")
    record = json.loads(parts["record.json"]) | {"jax": "99.0"}
    record["sha256"]["4/program.mlirbc"] = hashlib.sha256(parts["4/program.mlirbc"]).hexdigest()
    for name, data in (parts | {"record.json": json.dumps(record).encode()}).items():
      new.writestr(name, data)
  npz.seal(bad)
  with pytest.raises(ValueError, match=r"Made with jax 99\.0, not readable by"):
    artifact.load_artifact(bad)


def test_the_loader_is_short():
  """Fewer than 70 lines of functions and classes, their docstrings and empty lines left out."""
  tree = ast.parse(Path(artifact.__file__).read_text())
  nodes = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
  texts = {line for n in nodes if _is_text(n) for line in range(n.lineno, n.end_lineno + 1)}
  blocks = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
  lines = {
    line for n in ast.walk(tree) if hasattr(n, "lineno") for line in (n.lineno, n.end_lineno)
  }
  begin = min(block.lineno for block in blocks)
  assert len({line for line in lines if line >= begin} - texts) < 70


def _is_text(node):
  return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
