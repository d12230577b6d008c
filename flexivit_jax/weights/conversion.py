"""Weights in any format that `load` reads, written as big_vision's .npz or for another framework.

The certificate beside it holds the logits of the source and of what was written on the same images. An .npz is read
back and compared at several patch sizes; the source runs as it was published, its input normalised with its own mean
and standard deviation. A folder for timm or transformers is compared at its one size, in that framework where it is
installed.
"""

import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax import errors, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.grid import common_divisors
from flexivit_jax.sizes import SeqHw, Size, size_args, size_text
from flexivit_jax.trees import Json, Params
from flexivit_jax.weights import certificate, optional
from flexivit_jax.weights.export import frameworks


class Framework(NamedTuple):
  """Writes a model's folder, and runs it on normalised pixels where the package is installed."""

  save: Callable[..., None]
  run: Callable[[pathlib.Path, np.ndarray], np.ndarray]
  package: str


FRAMEWORKS = {
  "timm": Framework(weights.save_timm, frameworks.timm_logits, "timm"),
  "transformers": Framework(
    weights.save_transformers, frameworks.transformers_logits, "transformers"
  ),
}
FORMATS = ("big_vision", *FRAMEWORKS)


def convert_to(
  framework: str,
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  seqhw: SeqHw | None = None,
  image_size: int | None = None,
  verify: bool = True,
  **options: Any,
) -> tuple[list[certificate.Row], str]:
  """Writes a folder for another framework, and returns the certificate's row and what it was compared in.

  Args:
    framework: a name in `FRAMEWORKS`.
    source: what `weights.load` takes.
    out: a folder that is not there yet.
    seqhw: tokens per side, or (per column, per row); None: the kernel and the positions as they are stored.
    image_size: pixels a side; by default the model's own, or 240.
    verify: compare; without it there is no certificate.
    **options: as in `weights.load`.

  Raises:
    UserError: see `weights.load`, `weights.save_timm` and `weights.save_transformers`; or logits that differ, and then
      nothing is left behind.
  """
  save, execute, package = FRAMEWORKS[framework]
  model, params, record = weights.load_with_record(source, **{"dtype": "float32", **options})
  weights.print_notes(record)
  hw = certificate.image_hw(record, image_size)
  if seqhw is None:
    (ph, pw), (gh, gw) = model.patch_size, model.posemb_size
    hw = ph * gh, pw * gw
  save(out, model, params, record, image_hw=hw, seqhw=seqhw)
  if not verify:
    return [], ""
  try:
    image = certificate.images(hw, params["embedding"]["kernel"].shape[2])
    size = seqhw or _square(model.grid(hw).grid_hw)
    compared = optional.version(package) or "flexivit_jax, for it is not installed"
    target = execute(out, image) if optional.version(package) else _read_back(out, image)
    row = certificate.Row(size, certificate.logits(model, params, image, seqhw), target)
    if not row.difference <= row.limit:
      raise errors.UserError(
        f"The written model differs by {row.difference:.1e}, more than {row.limit:.1e}; nothing is"
        " written. Please report this."
      )
  except Exception:
    shutil.rmtree(out)
    raise
  certificate.write(out, source, [row], record | {"compared_in": compared}, hw)
  return [row], compared


def _square(size: Size) -> SeqHw:
  return size[0] if size[0] == size[1] else size


def _read_back(out: pathlib.Path, image: np.ndarray) -> np.ndarray:
  return certificate.logits(*weights.load(out), image, None)


def convert(
  source: pathlib.Path,
  out: pathlib.Path,
  *,
  image_size: int | None = None,
  exact: bool = True,
  verify: bool = True,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  flexify: tuple[Size, Size] | None = None,
  **fields: Any,
) -> list[certificate.Row]:
  """Writes `out` and the certificate beside it, and returns the certificate's rows.

  Args:
    source: what `weights.load` takes, and as there: mean, std, flexify, fields.
    out: a name that ends in .npz.
    image_size: pixels a side for the certificate; by default the model's own, or 240.
    verify: compare; without it there is no certificate.
    exact: the native size must give the same logits; a flexified model does so only nearly.

  Raises:
    UserError: see `weights.load` and `weights.save_npz`; or logits that differ, and then nothing is left behind.
  """
  options = dict(mean=mean, std=std, flexify=flexify, **fields)
  model, params, record = weights.load_with_record(source, **options)
  weights.print_notes(record)
  weights.save_npz(out, model, params, record)
  if not verify:
    return []
  try:
    folded = _folded(record)
    plain: Json = {name: [0.5] * len(values) for name, values in folded.items()}
    published, target = weights.load(source, **plain, **fields), weights.load(out)
    hw = certificate.image_hw(record, image_size)
    rows = compare(published, target, hw, folded.get("mean"), folded.get("std"))
    _judge(rows, hw, published[0], exact, folded=bool(folded))
  except Exception:
    out.unlink()
    raise
  certificate.write(out, source, rows, record, hw)
  return rows


def compare(
  source: tuple[FlexiViT, Params],
  target: tuple[FlexiViT, Params],
  hw: Size,
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


def _folded(record: Json) -> Json:
  """Mean and std that were folded in when the source was read; not those of a file that has them folded already."""
  as_published = record["format"] == record["source"]["format"]
  return record.get("folded_input", {}) if as_published else {}


def _judge(
  rows: list[certificate.Row], hw: Size, model: FlexiViT, exact: bool, folded: bool
) -> None:
  for row in rows:
    native = model.patch_size == model.grid(hw, **size_args(row.seqhw)).patch_hw
    # Where its kernel shrinks, a folded input is exact only nearly; a flexified model, nowhere.
    if exact and (native or not folded) and not row.difference <= row.limit:
      raise errors.UserError(
        f"The converted model differs at seqhw={size_text(row.seqhw)} by {row.difference:.1e}, more than"
        f" {row.limit:.1e}; nothing is written. Please report this."
      )


def _sizes(hw: Size, native: Size, most: int = 5) -> list[int]:
  """Up to five grids that divide the image, from 2 to 32 tokens a side, the native one among them."""
  fitting = [s for s in common_divisors(hw) if 2 <= s <= 32]
  if not fitting:
    raise errors.UserError(f"No patch size divides an image of {hw}; give --image_size.")
  stored = [s for s in fitting if (hw[0] // s, hw[1] // s) == native]
  others = [s for s in fitting if s not in stored]
  ends = np.linspace(0, len(others) - 1, min(most - len(stored), len(others)))
  return sorted([*stored, *(others[round(i)] for i in ends)])
