"""A file whose suffix is not what it holds is one line that says what it is and how to name it."""

import tarfile
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import bare, contents

ARRAYS = {"patch_embed.proj.weight": np.zeros((4, 3, 2, 2), np.float32)}


def write(kind, path):
  if kind == contents.NPZ:
    with path.open("wb") as file:
      np.savez(file, **ARRAYS)
  elif kind == contents.SAFETENSORS:
    save_file(ARRAYS, path)
  else:  # as far as the names in the archive go
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("archive/data.pkl", b"")
      if kind == contents.SCRIPT:
        archive.writestr("archive/code/__torch__.py", b"")


@pytest.mark.parametrize("suffix", sorted(bare.READERS))
@pytest.mark.parametrize(
  "kind", [contents.NPZ, contents.SAFETENSORS, contents.TORCH, contents.SCRIPT]
)
def test_what_a_file_holds_is_told_by_its_content(tmp_path, kind, suffix):
  path = tmp_path / f"weights{suffix}"
  write(kind, path)
  assert contents.kind(path) == kind
  same = suffix == kind or (kind == contents.TORCH and suffix not in (".npz", ".safetensors"))
  if same:
    return
  with pytest.raises(UserError) as error:
    weights.load(path)
  want = "torch.jit.load" if kind == contents.SCRIPT else f"name it weights{kind}"
  assert want in str(error.value)


def test_the_advice_works(tmp_path, timm_state_dict):
  save_file(timm_state_dict(), tmp_path / "weights.pth")
  with pytest.raises(UserError, match=r"name it weights\.safetensors"):
    weights.load(tmp_path / "weights.pth", num_heads=4)
  (tmp_path / "weights.pth").rename(tmp_path / "weights.safetensors")
  weights.load(tmp_path / "weights.safetensors", num_heads=4)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", bytes(20), b"\x80\x02}q."])
def test_a_damaged_file_has_no_kind(tmp_path, content):
  path = tmp_path / "weights.pth"
  path.write_bytes(content)
  assert contents.kind(path) is None


def test_an_archive_of_files_is_one_to_unpack(tmp_path):
  save_file(ARRAYS, tmp_path / "weights.safetensors")
  with tarfile.open(tmp_path / "weights.tar", "w") as archive:
    archive.add(tmp_path / "weights.safetensors", "weights.safetensors")
  with pytest.raises(UserError, match="unpack it"):
    weights.load(tmp_path / "weights.tar")
