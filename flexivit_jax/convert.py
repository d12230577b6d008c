"""`flexivit convert`: weights in any format that `load` reads, written as big_vision's .npz, with a certificate.

The certificate holds the logits of the source and of the written file, read back, on the same images at several patch
sizes. The source runs as it was published: its input normalised with its own mean and standard deviation, its kernel
and grid of their native size.
"""

import argparse
import json
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from flexivit_jax import arguments, errors, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flexivit import common_divisors

_TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by less


class Row(NamedTuple):
  """Logits [n, k] at one patch size and their largest difference."""

  seqhw: int
  source: Float[np.ndarray, "n k"]
  target: Float[np.ndarray, "n k"]

  @property
  def difference(self) -> float:
    """The largest one between source and target."""
    return float(np.abs(self.source - self.target).max())


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
  print(f"wrote {args.out} and {certificate_of(args.out)}")


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
) -> list[Row]:
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
    published, target = weights.load(source, **fields), weights.load(out)
    hw = _image_hw(record, image_size)
    rows = compare(published, target, hw, mean, std)
    _judge(rows, hw, published[0], exact, folded=mean is not None)
  except Exception:
    out.unlink()
    raise
  certificate_of(out).write_text(json.dumps(_certificate(rows, source, out, record, hw)) + "\n")
  return rows


def certificate_of(out: pathlib.Path) -> pathlib.Path:
  """OUT.certificate.json, beside the file that it is about."""
  return out.with_name(f"{out.stem}.certificate.json")


def compare(
  source: tuple[FlexiViT, dict],
  target: tuple[FlexiViT, dict],
  hw: tuple[int, int],
  mean: Sequence[float] | None,
  std: Sequence[float] | None,
) -> list[Row]:
  """Runs two models on the same two images at up to five patch sizes, the source's own among them."""
  channels = source[1]["embedding"]["kernel"].shape[2]
  image = _images(hw, channels)
  raw = image
  if mean is not None and std is not None:
    raw = (((image + 1) / 2 - np.asarray(mean)) / np.asarray(std)).astype(np.float32)
  sizes = _sizes(hw, source[0].patch_size)
  return [Row(s, _logits(*source, raw, s), _logits(*target, image, s)) for s in sizes]


def _judge(
  rows: list[Row], hw: tuple[int, int], model: FlexiViT, exact: bool, folded: bool
) -> None:
  for row in rows:
    native = model.patch_size == (hw[0] // row.seqhw, hw[1] // row.seqhw)
    limit = _TOLERANCE * max(1.0, float(np.abs(row.source).max()))
    # Where its kernel shrinks, a folded input is exact only nearly; a flexified model, nowhere.
    if exact and (native or not folded) and not row.difference <= limit:
      raise errors.UserError(
        f"The converted model differs at seqhw={row.seqhw} by {row.difference:.1e}, more than"
        f" {limit:.1e}; nothing is written. Please report this."
      )


def _certificate(
  rows: list[Row], source: pathlib.Path, out: pathlib.Path, record: dict[str, Any], hw: Any
) -> dict[str, Any]:
  return {
    "source": source.name,
    "target": out.name,
    "record": record,
    "images": f"2 seeded ones of {hw[0]}x{hw[1]} pixels: smooth colours and noise",
    "rows": [
      {
        "seqhw": row.seqhw,
        "largest_difference": row.difference,
        "source_logits": row.source.tolist(),
        "target_logits": row.target.tolist(),
      }
      for row in rows
    ],
  }


def _image_hw(record: dict[str, Any], image_size: int | None) -> tuple[int, int]:
  if image_size:
    return image_size, image_size
  h, w, *_ = record.get("image_size") or record.get("image_shape") or (240, 240)
  return h, w


def _images(hw: tuple[int, int], channels: int) -> Float[np.ndarray, "2 h w c"]:
  """Smooth colours with noise on top, in [-1, 1]: structure at every patch size."""
  rng = np.random.default_rng(0)
  y, x = (np.linspace(0, 1, side) for side in hw)
  phase, turns = rng.uniform(0, 6.3, (2, channels)), rng.uniform(1, 9, (2, 2, channels))
  wave = np.sin(
    turns[0][:, None, None] * y[None, :, None, None]
    + turns[1][:, None, None] * x[None, None, :, None]
    + phase[:, None, None]
  )
  return (0.7 * wave + 0.3 * rng.uniform(-1, 1, wave.shape)).astype(np.float32)


def _sizes(hw: tuple[int, int], native: tuple[int, int], most: int = 5) -> list[int]:
  """Up to five grids that divide the image, from 2 to 32 tokens a side, the native one among them."""
  fitting = [s for s in common_divisors(hw) if 2 <= s <= 32]
  if not fitting:
    raise errors.UserError(f"No patch size divides an image of {hw}; give --image_size.")
  own = [s for s in fitting if (hw[0] // s, hw[1] // s) == native]
  others = [s for s in fitting if s not in own]
  ends = np.linspace(0, len(others) - 1, min(most - len(own), len(others)))
  return sorted([*own, *(others[round(i)] for i in ends)])


def _logits(
  model: FlexiViT, params: dict, image: np.ndarray, seqhw: int
) -> Float[np.ndarray, "n k"]:
  with jax.default_matmul_precision("highest"):
    return np.asarray(
      jax.jit(lambda p, x: model.apply({"params": p}, x, seqhw=seqhw)[0])(params, image)
    )
