"""`flexivit export`: one model at several patch sizes, to run without this project; read back and compared."""

import argparse
import pathlib

import jax
import numpy as np

from flexivit_jax import arguments, artifact, errors, weights
from flexivit_jax.models import FlexiViT
from flexivit_jax.weights import certificate, stablehlo


def run(args: argparse.Namespace) -> None:
  """Writes args.out and its certificate; prints the differences."""
  model, params, record = weights.load_with_record(args.checkpoint, **arguments.loading(args))
  hw = certificate.image_hw(record, args.image_size)
  given = {} if args.platforms is None else {"platforms": args.platforms}
  stablehlo.write(args.out, model, params, record, image_hw=hw, sizes=args.seqhw, **given)
  rows = verify(args.out, model, params)
  for row in rows:
    print(f"seqhw {row.seqhw:3}: largest difference of the logits {row.difference:.1e}")
  if rows:
    certificate.write(args.out, args.checkpoint, rows, record, hw)
    print(f"wrote {args.out} and {certificate.path_of(args.out)}")
  else:
    print(f"wrote {args.out}, not compared with its source: that takes the platform cpu")


def verify(out: pathlib.Path, model: FlexiViT, params: dict) -> list[certificate.Row]:
  """Reads the artifact back and compares its logits with the model's, on the CPU; no rows if it cannot run there.

  Raises:
    UserError: they differ, and then the artifact is removed.
  """
  cpu = _cpu()
  with jax.default_device(cpu):
    loaded = artifact.load_artifact(out)
    if cpu is None or "cpu" not in loaded.record["platforms"]:
      return []
    *hw, channels = loaded.record["image_shape"]
    image, params = certificate.images(tuple(hw), channels), jax.tree.map(np.asarray, params)
    rows = [
      certificate.Row(s, certificate.logits(model, params, image, s), loaded.predict(image, s))
      for s in loaded.sizes
    ]
  for row in rows:
    if not row.difference <= row.limit:
      out.unlink()
      raise errors.UserError(
        f"The artifact differs at seqhw={row.seqhw} by {row.difference:.1e}, more than"
        f" {row.limit:.1e}; nothing is written. Please report this."
      )
  return rows


def _cpu() -> jax.Device | None:
  try:
    return jax.devices("cpu")[0]
  except RuntimeError:  # JAX_PLATFORMS leaves it out
    return None
