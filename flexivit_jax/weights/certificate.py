"""Certificates: the logits of a model and of what was made of it, on the same images, at several patch sizes."""

import json
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import SeqHw, Size, size_args, size_text
from flexivit_jax.trees import Json, Params

_TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order differ by less


class Row(NamedTuple):
  """Logits [n, k] at one patch size and their largest difference."""

  seqhw: SeqHw
  source: Float[np.ndarray, "n k"]
  target: Float[np.ndarray, "n k"]

  @property
  def difference(self) -> float:
    """Returns the largest difference between source and target."""
    return float(np.abs(self.source - self.target).max())

  @property
  def limit(self) -> float:
    """Returns the largest difference that rounding can explain."""
    return _TOLERANCE * max(1.0, float(np.abs(self.source).max()))


def path_of(out: pathlib.Path) -> pathlib.Path:
  """Returns OUT.certificate.json, beside the file that it is about."""
  return out.with_name(f"{out.stem}.certificate.json")


def write(
  out: pathlib.Path,
  source: pathlib.Path,
  rows: Sequence[Row],
  record: Json,
  hw: tuple[int, int],
) -> None:
  """Writes the certificate of `out`, made of `source`, beside it."""
  certificate = {
    # A published name may have a slash in it.
    "source": source.name if source.exists() else str(source),
    "target": out.name,
    "record": record,
    "images": f"2 seeded ones of {hw[0]}x{hw[1]} pixels: smooth colours and noise",
    "rows": [
      {
        "seqhw": size_text(row.seqhw),
        "largest_difference": row.difference,
        "source_logits": row.source.tolist(),
        "target_logits": row.target.tolist(),
      }
      for row in rows
    ],
  }
  path_of(out).write_text(json.dumps(certificate) + "\n")


def image_hw(record: Json, image_size: int | None) -> Size:
  """Returns pixels (h, w): a square of `image_size`, else what the record says, else 240."""
  if image_size:
    return image_size, image_size
  h, w, *_ = record.get("image_size") or record.get("image_shape") or (240, 240)
  return h, w


def images(hw: tuple[int, int], channels: int) -> Float[np.ndarray, "2 h w c"]:
  """Returns smooth colours with noise on top, in [-1, 1]: they have structure at every patch size."""
  rng = np.random.default_rng(0)
  y, x = (np.linspace(0, 1, side) for side in hw)
  phase, turns = rng.uniform(0, 6.3, (2, channels)), rng.uniform(1, 9, (2, 2, channels))
  wave = np.sin(
    turns[0][:, None, None] * y[None, :, None, None]
    + turns[1][:, None, None] * x[None, None, :, None]
    + phase[:, None, None]
  )
  return (0.7 * wave + 0.3 * rng.uniform(-1, 1, wave.shape)).astype(np.float32)


def logits(
  model: FlexiViT, params: Params, image: Float[np.ndarray, "n h w c"], seqhw: SeqHw | None
) -> Float[np.ndarray, "n k"]:
  """Runs the model in full precision; without `seqhw` at its own patch size."""
  size = {} if seqhw is None else size_args(seqhw)
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x, **size)[0])(params, image))
