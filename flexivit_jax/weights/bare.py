"""The arrays of a file without what training tools put around them."""

import functools
import pathlib
from typing import NamedTuple

from flexivit_jax.trees import Arrays
from flexivit_jax.weights import contents, npz, segmenter, torch_files, wrappers
from flexivit_jax.weights.open_clip import names as open_clip_names
from flexivit_jax.weights.torchvision import names as torchvision_names

# .pth.tar is timm's, .ckpt Lightning's; both are torch.save's.
READERS = npz.READERS | dict.fromkeys(
  (".pth", ".pt", ".bin", ".tar", ".ckpt"), torch_files.read_torch
)


class Content(NamedTuple):
  """Arrays by their bare names, and what is known of them.

  Attributes:
    arrays: by name.
    notes: for the user.
    is_open_clip: whether they had OpenCLIP's names (now timm's).
    variant: of the encoder of a Segmenter's file, see `segmenter.variant_of`; None of others.
  """

  arrays: Arrays
  notes: list[str]
  is_open_clip: bool = False
  variant: segmenter.Variant | None = None


def has_reader(path: pathlib.Path) -> bool:
  """Tells whether `read` takes a file with this suffix."""
  return path.suffix.lower() in READERS


def read(path: pathlib.Path, *, ema: bool = False) -> Content:
  """Reads a file and takes off what tools put around the weights; OpenCLIP's and torchvision's names become timm's.

  Args:
    path: with a suffix in `READERS`.
    ema: take the EMA of the weights where both are there.

  Raises:
    UserError: the file cannot be read, or is of another kind than its suffix says; see `wrappers.unwrap`.
  """
  suffix = path.suffix.lower()
  contents.check(path, suffix if suffix in npz.READERS else contents.TORCH)
  arrays, _ = READERS[suffix](path)
  bare, notes = wrappers.unwrap(arrays, ema=ema)
  if segmenter.prefix_of(arrays) is not None:
    variant = segmenter.variant_of(path)
    # Its head is that of the weights it began with, and was never used since.
    encoder = {name: a for name, a in bare.items() if name not in ("head.weight", "head.bias")}
    return Content(encoder, [*notes, *variant.notes], variant=variant)
  if open_clip_names.is_open_clip(bare):
    return Content(open_clip_names.to_timm(bare), [*notes, open_clip_names.NOTE], True)
  if torchvision_names.is_torchvision(bare):
    return Content(torchvision_names.to_timm(bare), [*notes, torchvision_names.NOTE])
  return Content(bare, notes)


@functools.cache
def suffixes() -> str:
  """Returns the suffixes of files with weights, for messages."""
  return ", ".join(sorted(READERS))
