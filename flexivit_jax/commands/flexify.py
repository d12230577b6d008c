"""`flexivit flexify`: see `flexivit_jax.flexify`."""

import argparse

from flexivit_jax.commands import options
from flexivit_jax.devices import compilation
from flexivit_jax.flexify import flexify, retention


def run(args: argparse.Namespace) -> None:
  """Flexifies args.init and prints what is left of it at each size."""
  compilation.keep_programs()
  names = (
    "epochs",
    "image_size",
    "seqhw",
    "batch_size",
    "lr",
    "seed",
    "buffers",
    "moment",
    "on_error",
  )
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  kept = flexify(args.init, args.data, args.out, loading=options.loading(args), **given)
  print(retention.table(kept))
  print(f"wrote {args.out / 'model.npz'}, retention.json and README.md, the model card")
