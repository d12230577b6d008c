"""PyTorch's own files: named arrays that torch.save wrote. PyTorch reads them; nothing in them is run."""

import importlib
import pathlib
import re
import types
import zipfile
from collections.abc import Iterator, Mapping

import numpy as np

from flexivit_jax import errors
from flexivit_jax.trees import Arrays, Json
from flexivit_jax.weights import optional
from flexivit_jax.weights.optional import Foreign

_DTYPES = (
  *("float64", "float32", "float16", "bfloat16", "bool"),
  *("int64", "int32", "int16", "int8", "uint8"),
)
# Classes beside tensors that training tools save, and that do nothing when they are made.
_HARMLESS = (
  *("argparse.Namespace", "types.SimpleNamespace", "numpy.dtype", "numpy.ndarray"),
  *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath", "pathlib.PureWindowsPath"),
  *("datetime.date", "datetime.datetime", "datetime.timedelta", "datetime.timezone"),
  *(
    "builtins.slice",
    "builtins.range",
    "builtins.frozenset",
    "decimal.Decimal",
    "fractions.Fraction",
  ),
)
_NOT_WEIGHTS = re.compile(
  r"(optim|opt_|lr_sched|sched|scaler|amp|rng|loops|hyper_param|hparams)", re.IGNORECASE
)
_LEVELS = 5  # of nested dicts; deeper ones are no weights


def read_torch(path: pathlib.Path) -> tuple[Arrays, Json]:
  """Returns (arrays by name, {}) of a file that torch.save wrote; half precision is widened.

  torch reads it with weights_only: no name in it is looked up that is not one of torch's own tensors or of `_HARMLESS`,
  and nothing in it is run. The levels of nested dicts are joined by dots: "state_dict.module.head.weight". What is no
  tensor is left out, and so is the state of an optimizer.

  Raises:
    UserError: PyTorch is not installed; the file is none of torch.save's, or asks for anything else to be loaded, or
      would expand; it holds no tensors.
  """
  torch, tensors = _opened(path)
  if not tensors:
    raise errors.UserError(f"{path} holds no tensors by name; expected the weights of a model.")
  _check_tensors(path, torch, tensors)
  return {n: _array(torch, tensor) for n, tensor in tensors.items()}, {}


def names(path: pathlib.Path) -> list[str]:
  """Returns the names that `read_torch` gives; reads no tensor.

  Raises:
    UserError: see `read_torch`.
  """
  _, tensors = _opened(path)
  return [*tensors]


def _opened(path: pathlib.Path) -> tuple[types.ModuleType, dict[str, Foreign]]:
  """Returns torch and the tensors of a file by name, which stay in the file until they are read."""
  _check_archive(path)
  torch = optional.require("torch", f"Reading {path.name}")
  try:
    with torch.serialization.safe_globals(_harmless()):
      content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
  except Exception as e:  # what a broken or evil file makes a reader raise cannot be foreseen
    raise errors.UserError(f"{path} cannot be read as PyTorch's weights: {_cause(e)}.") from e
  return torch, dict(_tensors(path, torch, content))


def _harmless() -> list[object]:
  """Classes that torch may make: `_HARMLESS`, and NumPy's numbers, as which many tools save a metric."""
  named = [getattr(importlib.import_module(m), n) for m, n in (x.rsplit(".", 1) for x in _HARMLESS)]
  kinds = [type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "u4", "u8", "?")]
  plain = [int, float, bool, str, list, dict, set, tuple]
  return [
    *named,
    *plain,
    *kinds,
    np.asarray(0.0)[()].__reduce__()[0],
    np.ndarray(0).__reduce__()[0],
  ]


def _tensors(
  path: pathlib.Path, torch: types.ModuleType, content: object, prefix: str = "", level: int = 0
) -> Iterator[tuple[str, Foreign]]:
  """The tensors of nested dicts with their joined names; those of an optimizer are left out."""
  if not isinstance(content, Mapping):
    kind = type(content).__name__
    raise errors.UserError(f"{path} holds one {kind}; expected weights by name.")
  for key, value in content.items():
    name = f"{prefix}{key}"
    if isinstance(value, torch.Tensor):
      yield name, value
    elif isinstance(value, Mapping) and level < _LEVELS and not _NOT_WEIGHTS.match(str(key)):
      yield from _tensors(path, torch, value, f"{name}.", level + 1)


def _check_archive(path: pathlib.Path) -> None:
  """Raises a UserError unless the file is a zip whose parts are stored as they are, as torch.save writes it."""
  try:
    with zipfile.ZipFile(path) as archive:
      members = archive.infolist()
  except (zipfile.BadZipFile, OSError, NotImplementedError) as e:
    raise errors.UserError(
      f"{path} cannot be read as PyTorch's weights: {e}. torch.save has written zip archives since 1.6 (2020); save an"
      " older file again with a newer PyTorch."
    ) from e
  packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
  total, size = sum(m.file_size for m in members), path.stat().st_size
  if packed or total > size:
    what = f"{packed[0]} is compressed" if packed else f"{size} bytes would expand to {total}"
    raise errors.UserError(
      f"{path} cannot be read as PyTorch's weights: {what}; torch.save never does that."
    )


def _cause(error: Exception) -> str:
  """One line of torch's many."""
  if refused := re.search(r"GLOBAL (\S+)", str(error)):
    return (
      f"it wants {refused[1]}, which is no tensor, and was not run. If you trust the file, open it with PyTorch and"
      " save its weights alone"
    )
  if reason := re.search(r"WeightsUnpickler error:\s*(\S[^\n]*)", str(error)):
    return reason[1].strip()
  lines = [line.strip() for line in str(error).splitlines() if line.strip()]
  return [*lines, type(error).__name__][0]


def _check_tensors(
  path: pathlib.Path, torch: types.ModuleType, tensors: dict[str, Foreign]
) -> None:
  """Raises a UserError for tensors that are no plain numbers, or larger than what is stored of them."""
  for name, tensor in tensors.items():
    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or dtype not in _DTYPES:
      raise errors.UserError(
        f"{path}: {name} is {tensor.layout} of {dtype}, on {tensor.device}; expected plain numbers."
      )
  total, size = sum(t.nbytes for t in tensors.values()), path.stat().st_size
  if (
    total > 2 * size
  ):  # a stride of 0 repeats one number as often as it likes; names may share their tensor
    raise errors.UserError(f"{path}: {size} bytes would expand to {total}; no weights do that.")


def _array(torch: types.ModuleType, tensor: Foreign) -> np.ndarray:
  """A copy, for the file is mapped into memory; half precision as float32."""
  half = tensor.dtype in (torch.bfloat16, torch.float16)
  return np.array((tensor.float() if half else tensor).detach().numpy())
