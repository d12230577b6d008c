"""`flexivit convert`: weights in any format that `load` reads, written as big_vision's .npz, with a certificate.

The certificate holds the logits of the source and of the written file, read back, on the same images at several patch
sizes. The source runs as it was published: its input normalised with its own mean and standard deviation, its kernel
and grid of their native size.
"""

import argparse
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from flexivit_jax import arguments, errors, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flexivit import common_divisors
from flexivit_jax.weights import certificate


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  rows = convert(
    args.file,
    args.out,
    image_size=args.image_size,
    exact=not args.flexify,
    **arguments.loading(args),
  )
  for row in rows:
    print(f"seqhw {row.seqhw:3}: largest difference of the logits {row.difference:.1e}")
  print(f"wrote {args.out} and {certificate.path_of(args.out)}")


def convert(
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  image_size: int | None = None,
  exact: bool = True,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: Any = None,
  **fields: Any,
) -> list[certificate.Row]:
  """Writes `out` and the certificate beside it, and returns the certificate's rows.

  Args:
    source: what `weights.load` takes, and as there: mean, std, flexify, fields.
    out: a name that ends in .npz.
    image_size: pixels a side for the certificate; by default the model's own, or 240.
    exact: the native size must give the same logits; a flexified model does so only nearly.

  Raises:
    UserError: see `weights.load` and `weights.save_npz`; or logits that differ, and then nothing is left behind.
  """
  given = dict(mean=mean, std=std, flexify=flexify, **fields)
  model, params, record = weights.load_with_record(source, **given)
  weights.save_npz(out, model, params, record)
  try:
    # Half is what changes nothing, also where the source says another mean and std.
    half = None if mean is None else (0.5,) * len(mean)
    published = weights.load(source, mean=half, std=half, **fields)
    target = weights.load(out)
    hw = certificate.image_hw(record, image_size)
    rows = compare(published, target, hw, mean, std)
    _judge(rows, hw, published[0], exact, folded=mean is not None)
  except Exception:
    out.unlink()
    raise
  certificate.write(out, source, rows, record, hw)
  return rows


def compare(
  source: tuple[FlexiViT, dict],
  target: tuple[FlexiViT, dict],
  hw: tuple[int, int],
  mean: Sequence[float] | None,
  std: Sequence[float] | None,
) -> list[certificate.Row]:
  """Runs two models on the same two images at up to five patch sizes, the source's own among them."""
  channels = source[1]["embedding"]["kernel"].shape[2]
  image = certificate.images(hw, channels)
  raw = image
  if mean is not None and std is not None:
    raw = (((image + 1) / 2 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
  sizes = _sizes(hw, source[0].patch_size)
  return [
    certificate.Row(s, certificate.logits(*source, raw, s), certificate.logits(*target, image, s))
    for s in sizes
  ]


def _judge(
  rows: list[certificate.Row], hw: tuple[int, int], model: FlexiViT, exact: bool, folded: bool
) -> None:
  for row in rows:
    native = model.patch_size == (hw[0] // row.seqhw, hw[1] // row.seqhw)
    # Where its kernel shrinks, a folded input is exact only nearly; a flexified model, nowhere.
    if exact and (native or not folded) and not row.difference <= row.limit:
      raise errors.UserError(
        f"The converted model differs at seqhw={row.seqhw} by {row.difference:.1e}, more than"
        f" {row.limit:.1e}; nothing is written. Please report this."
      )


def _sizes(hw: tuple[int, int], native: tuple[int, int], most: int = 5) -> list[int]:
  """Up to five grids that divide the image, from 2 to 32 tokens a side, the native one among them."""
  fitting = [s for s in common_divisors(hw) if 2 <= s <= 32]
  if not fitting:
    raise errors.UserError(f"No patch size divides an image of {hw}; give --image_size.")
  own = [s for s in fitting if (hw[0] // s, hw[1] // s) == native]
  others = [s for s in fitting if s not in own]
  ends = np.linspace(0, len(others) - 1, min(most - len(own), len(others)))
  return sorted([*own, *(others[round(i)] for i in ends)])
