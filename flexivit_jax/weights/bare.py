"""The arrays of a file without what training tools put around them."""

import functools
import pathlib
from typing import Any

from flexivit_jax.trees import Arrays
from flexivit_jax.weights import contents, npz, torch_files, wrappers
from flexivit_jax.weights.open_clip import names as open_clip_names
from flexivit_jax.weights.torchvision import names as torchvision_names

# .pth.tar is timm's, .ckpt Lightning's; both are torch.save's.
READERS = npz.READERS | dict.fromkeys(
  (".pth", ".pt", ".bin", ".tar", ".ckpt"), torch_files.read_torch
)


def read(path: pathlib.Path, *, ema: bool = False) -> tuple[Arrays, dict[str, Any]]:
  """Returns (arrays by their bare names, record) of a file; in a file of others the record has "notes" only.

  Args:
    path: with a suffix in `READERS`.
    ema: take the EMA of the weights where both are there.

  Raises:
    UserError: it cannot be read; see `wrappers.unwrap`.
  """
  suffix = path.suffix.lower()
  contents.check(path, suffix if suffix in npz.READERS else contents.TORCH)
  arrays, record = READERS[suffix](path)
  if record and not ema:  # ours
    return arrays, record
  return unwrapped(arrays, ema=ema)


def unwrapped(arrays: Arrays, *, ema: bool = False) -> tuple[Arrays, dict[str, list[str]]]:
  """Returns the arrays without wrappers, by names that have a reader, and {"notes": ...}."""
  bare, notes = wrappers.unwrap(arrays, ema=ema)
  if open_clip_names.is_open_clip(bare):
    bare, notes = open_clip_names.to_timm(bare), [*notes, open_clip_names.NOTE]
  elif torchvision_names.is_torchvision(bare):
    bare, notes = torchvision_names.to_timm(bare), [*notes, torchvision_names.NOTE]
  return bare, {"notes": notes}


@functools.cache
def suffixes() -> str:
  """The suffixes of files with weights, for messages."""
  return ", ".join(sorted(READERS))
