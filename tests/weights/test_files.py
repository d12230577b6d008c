"""Files that are broken, or made to do harm, are errors: nothing is unpickled and no memory is taken."""

import json
import subprocess
import sys
import tracemalloc
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT
from flexivit_jax.running import checkpoint
from flexivit_jax.weights import npz, optional

pytestmark = pytest.mark.faults


def test_a_bomb_is_refused_before_memory_is_taken(tmp_path):
  file = tmp_path / "bomb.npz"
  np.savez_compressed(file, a=np.zeros(2**26, np.float32))  # 0.26 MB of 268
  assert file.stat().st_size < 2**20
  tracemalloc.start()
  with pytest.raises(UserError, match=r"would expand to \d+; weights do not compress like that"):
    npz.read_npz(file)
  assert tracemalloc.get_traced_memory()[1] < 2**24
  tracemalloc.stop()


def test_small_files_may_compress_as_well_as_they_like(tmp_path):
  np.savez_compressed(tmp_path / "zeros.npz", a=np.zeros(2**20, np.float32))
  arrays, record = npz.read_npz(tmp_path / "zeros.npz")
  assert arrays["a"].shape == (2**20,) and record == {}


def test_a_header_that_promises_more_than_there_is_is_refused(tmp_path):
  np.save(tmp_path / "a.npy", np.zeros(1000, np.float32))
  lie = (tmp_path / "a.npy").read_bytes().replace(b"(1000,)", b"(9999,)")
  with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
    archive.writestr("a.npy", lie)
  with pytest.raises(UserError, match=r"a\.npy says 40124 bytes and has 4128"):
    npz.read_npz(tmp_path / "lie.npz")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_stands_there_twice_is_refused(tmp_path):
  np.save(tmp_path / "a.npy", np.zeros(3))
  with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
    for _ in range(2):
      archive.write(tmp_path / "a.npy", "a.npy")
  with pytest.raises(UserError, match=r"a\.npy stands there twice"):
    npz.read_npz(tmp_path / "twice.npz")


def test_safetensors_come_back_and_half_precision_is_widened(tmp_path):
  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, -2], ml_dtypes.bfloat16),
    "c": np.array([0.5], np.float16),
    "d": np.array([3], np.int64),
  }
  save_file(arrays, tmp_path / "w.safetensors")
  got, record = npz.read_safetensors(tmp_path / "w.safetensors")
  assert record == {} and got.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(got[name], array.astype(got[name].dtype))
    assert got[name].dtype == (np.int64 if name == "d" else np.float32)


def _header(header, size):
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + bytes(size)


def _f32(begin, end):
  return {"dtype": "F32", "shape": [(end - begin) // 4], "data_offsets": [begin, end]}


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\x80\x04\x95" + bytes(50),  # the beginning of a pickle
    (10**12).to_bytes(8, "little") + b"{}",
    _header({"a": _f32(0, 400)}, 8),  # truncated
    _header({"a": _f32(0, 8), "b": _f32(4, 12)}, 12),  # overlap
    _header({"a": _f32(0, 4), "b": _f32(8, 12)}, 12),  # hole
    _header({"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]}}, 4),
  ],
)
def test_safetensors_that_do_not_fit_their_header_are_refused(tmp_path, content):
  (tmp_path / "w.safetensors").write_bytes(content)
  with pytest.raises(UserError, match=r"w.safetensors cannot be read as .safetensors: \S"):
    npz.read_safetensors(tmp_path / "w.safetensors")


# An audit hook cannot be taken away again, so this runs in a process of its own.
NO_PICKLE = """
import sys
import numpy, safetensors, flexivit_jax.weights as weights, flexivit_jax.errors as errors
import pickle
seen = []
sys.addaudithook(lambda event, args: seen.append(args) if event == "pickle.find_class" else None)
for path in sys.argv[1:]:
  try:
    weights.load(path, num_heads=4)
    print("loaded")
  except errors.UserError as e:
    print("refused")
assert not seen, seen
pickle.loads(pickle.dumps(numpy.zeros))
assert seen, "the hook sees nothing"
"""


def _save_run(folder):
  fields = dict(width=16, depth=1, mlp_dim=24, num_heads=4, patch_size=(4, 4), num_classes=3)
  params = jax.jit(FlexiViT(**fields).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
  checkpoints.save(1, params, {"step": jnp.int32(1)}, {"model": {"name": "flexivit", **fields}})
  checkpoints.close()


def test_nothing_is_unpickled_on_any_path(timm_state_dict, tmp_path):
  state_dict = timm_state_dict()
  np.savez(tmp_path / "good.npz", **state_dict)
  save_file(state_dict, tmp_path / "good.safetensors")
  evil = np.array([np.zeros], object)
  np.savez(tmp_path / "evil.npz", **state_dict, evil=evil)
  np.savez(tmp_path / "evil_record.npz", **state_dict, **{npz.RECORD: evil})
  (tmp_path / "evil.safetensors").write_bytes(evil.dumps())
  _save_run(tmp_path / "run")
  names = ["good.npz", "good.safetensors", "run", "evil.npz", "evil_record.npz", "evil.safetensors"]
  command = [sys.executable, "-c", NO_PICKLE, *(str(tmp_path / name) for name in names)]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["loaded"] * 3 + ["refused"] * 3


def test_half_precision_is_widened_and_others_are_left_as_they_are():
  for dtype in (np.float64, np.int32, np.float32):
    assert npz.widened(np.ones(2, dtype)).dtype == dtype
  raw = np.array([1.5, 3], ml_dtypes.bfloat16).view("V2")
  np.testing.assert_array_equal(npz.widened(raw), np.array([1.5, 3], np.float32))


def _no_torch(name):
  raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_pytorchs_files_need_pytorch(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(optional.importlib, "import_module", _no_torch)
  file = tmp_path / f"w.{suffix}"
  with zipfile.ZipFile(file, "w") as archive:
    archive.writestr("w/data.pkl", b"")
  with pytest.raises(UserError, match=rf"Reading w.{suffix} needs the package torch, which is not"):
    weights.load(file)


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_pytorchs_files_are_looked_at_before_pytorch_is(tmp_path, monkeypatch, suffix):
  monkeypatch.setattr(optional.importlib, "import_module", pytest.fail)
  file = tmp_path / f"w.{suffix}"
  file.write_bytes(b"\x80\x02}q\x00.")  # torch.save before 1.6: a bare pickle
  with pytest.raises(UserError, match=r"not a zip file. torch.save has written zip archives since"):
    weights.load(file)
  with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("w/data/0", bytes(2**20))
  with pytest.raises(UserError, match=r"w/data/0 is compressed"):
    weights.load(file)
