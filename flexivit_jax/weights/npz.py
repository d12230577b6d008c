"""Named arrays in files, in and out: `.npz`, and `.safetensors` as far as they are read.

Nothing is unpickled, and sizes are read before memory is taken.
"""

import collections
import json
import math
import os
import pathlib
import zipfile
import zlib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import safetensors

from flexivit_jax import errors, files, trees
from flexivit_jax.models import Model, TwoTowers, vit, vit_part
from flexivit_jax.trees import Arrays, Json, Params
from flexivit_jax.weights import tower_names
from flexivit_jax.weights.export import artifact

# The entry of an .npz that holds the record: JSON in UTF-8 as uint8. It stands beside "params/...", where big_vision's
# loader, which takes "params" and leaves the rest, does not see it; bytes ("V") would stop it, text ("U") too.
RECORD = "flexivit_record"
_NO_WEIGHTS = ("opt/", "chrono")


def read_npz(
  path: pathlib.Path, *, max_expansion: float = 20, always_allowed: int = 2**24
) -> tuple[Arrays, Json]:
  """Returns (arrays by name, record) of an .npz; half precision is widened, an optimizer's arrays are left out.

  Args:
    path: the file.
    max_expansion: the arrays may take this many times the size of the file; weights hardly compress.
    always_allowed: bytes that the arrays may take in any case.

  Raises:
    UserError: not an .npz, arrays of Python objects (which would have to be unpickled), a name that stands there
      twice, an array that is not as long as its header says, or a file that expands too much.
  """
  if not zipfile.is_zipfile(path):
    raise errors.UserError(
      f"{path} cannot be read as .npz: it is no zip archive, or only part of one."
    )
  try:
    _check_headers(path, max_expansion, always_allowed)
    with np.load(path, allow_pickle=False) as archive:
      names = [n for n in archive.files if not n.startswith((*_NO_WEIGHTS, RECORD))]
      record = _decode(archive[RECORD]) if RECORD in archive.files else {}
      arrays = {name: widened(archive[name]) for name in names}
    if record.pop("sealed", False) and not artifact.is_sealed(path):
      raise ValueError("it is damaged (wrong sha256); copy or write it again")
    return arrays, record
  except (zipfile.BadZipFile, zlib.error, ValueError, OSError, RuntimeError) as e:
    raise errors.UserError(f"{path} cannot be read as .npz: {e}") from e


def has_record(path: pathlib.Path) -> bool:
  """Tells whether a file is an .npz with a record, as `save_npz` writes it; reads no array."""
  try:
    with zipfile.ZipFile(path) as archive:
      return path.suffix.lower() == ".npz" and f"{RECORD}.npy" in archive.namelist()
  except (zipfile.BadZipFile, OSError, NotImplementedError):
    return False


def read_record(path: pathlib.Path) -> Json:
  """Returns the record of a file that `save_npz` wrote; reads no array.

  Raises:
    UserError: the file cannot be read.
  """
  try:
    with np.load(path, allow_pickle=False) as archive:
      return _decode(archive[RECORD])
  except (zipfile.BadZipFile, zlib.error, ValueError, OSError, RuntimeError) as e:
    raise errors.UserError(f"{path} cannot be read as .npz: {e}") from e


def read_safetensors(path: pathlib.Path) -> tuple[Arrays, Json]:
  """Returns (arrays by name, {}) of a .safetensors file; half precision is widened.

  Raises:
    UserError: the header is not that of such a file, or does not fit its length.
  """
  try:
    with safetensors.safe_open(path, framework="np") as file:
      return {name: widened(file.get_tensor(name)) for name in file.keys()}, {}  # noqa: SIM118
  except (safetensors.SafetensorError, OSError, TypeError, AttributeError) as e:
    raise errors.UserError(f"{path} cannot be read as .safetensors: {e}") from e


READERS: dict[str, Callable[[pathlib.Path], tuple[Arrays, Json]]] = {
  ".npz": read_npz,
  ".safetensors": read_safetensors,
}


def save_npz(path: str | os.PathLike[str], model: Model, params: Params, record: Json) -> None:
  """Writes an .npz in big_vision's names ("params/..."), which `load` and big_vision's own loader read.

  Those of two towers are "params/img/...", "params/txt/...", "params/t" and "params/b"; of another model of parts, a
  Segmenter, "params/backbone/..." and its own.

  The record, with the fields of the model, goes in as one more entry that big_vision does not look at. The file
  appears under its name only when it is complete.

  Raises:
    UserError: another suffix, or a file that is there already.
  """
  path = pathlib.Path(path)
  if path.suffix != ".npz":
    raise errors.UserError(f"{path}: only .npz can be written; give a name that ends so.")
  if path.exists():
    raise errors.UserError(f"{path} is there already; remove it or give another name.")
  if (own := vit_part(model)) is None:
    flat = trees.flatten(vit.unstack_blocks(params))
    fields = record["model"] | {"scan": False}
  else:
    params = {**params, own: vit.unstack_blocks(params[own])}
    both = isinstance(model, TwoTowers)
    flat = tower_names.to_big_vision(params) if both else trees.flatten(params)
    fields = record["model"] | {own: {**record["model"][own], "scan": False}}
  record = record | {"model": fields}
  arrays = {f"params/{name}": np.asarray(array) for name, array in flat.items()}
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays[RECORD] = encode(record | {"sealed": True})
  with files.replacing(path) as part:
    with part.open("wb") as file:
      np.savez(file, allow_pickle=False, **arrays)
    seal(part)


def encode(record: Json) -> np.ndarray:
  """Returns a record as the array that `read_npz` reads back."""
  return np.frombuffer(json.dumps(record, allow_nan=False).encode(), np.uint8)


def seal(path: pathlib.Path) -> None:
  """Ends a zip archive with the sha256 of the rest as its comment: its own checksums leave out dates and the like."""
  with zipfile.ZipFile(path, "a") as archive:
    archive.comment = bytes(64)
  with path.open("r+b") as file:
    file.seek(-64, os.SEEK_END)
    file.write(files.sha256(path, without_last=64).encode())


def widened(array: np.ndarray) -> np.ndarray:
  """Widens half precision to float32, exactly; leaves other arrays. NumPy files hold bfloat16 as two raw bytes."""
  if array.dtype.kind == "V" and array.dtype.itemsize == 2:
    array = array.view(ml_dtypes.bfloat16)
  half = array.dtype in (np.float16, ml_dtypes.bfloat16)
  return array.astype(np.float32) if half else array


def _decode(array: np.ndarray) -> Json:
  record = json.loads(array.tobytes().decode())
  if not isinstance(record, dict):
    raise ValueError(f"{RECORD} holds no JSON object")
  return record


def _check_headers(path: pathlib.Path, max_expansion: float, always_allowed: int) -> None:
  with zipfile.ZipFile(path) as archive:
    members = archive.infolist()
    times = collections.Counter(m.filename for m in members)
    if twice := [name for name, n in times.items() if n > 1]:
      raise ValueError(f"{', '.join(twice)} stands there twice")
    for member in members:
      size = _promised_bytes(archive, member)
      if size != member.file_size:
        raise ValueError(f"{member.filename} says {size} bytes and has {member.file_size}")
  total, packed = sum(m.file_size for m in members), path.stat().st_size
  if total > max(max_expansion * packed, always_allowed):
    raise ValueError(
      f"{packed} bytes would expand to {total}; weights do not compress like that (limit: {max_expansion} times)"
    )


def _promised_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> int:
  """Returns the length of a .npy file by its own header; reads no more than that."""
  with archive.open(member) as file:
    version = np.lib.format.read_magic(file)
    readers = {
      (1, 0): np.lib.format.read_array_header_1_0,
      (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in readers:
      raise ValueError(f"version {version} of the .npy format holds no plain numbers")
    shape, _, dtype = readers[version](file)
    if dtype.hasobject:
      raise ValueError("Object arrays would have to be unpickled; save plain numbers")
    return file.tell() + math.prod(shape) * dtype.itemsize
