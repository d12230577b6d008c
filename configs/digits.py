"""FlexiViT on scikit-learn's handwritten digits: the demo.

    flexivit train --config configs/digits.py --workdir runs/digits
    flexivit train --config configs/digits.py:fixed=8 --workdir runs/digits_fixed8

The second is a ViT of one patch size, trained with the same FLOPs.

Expect, in top-1 on 360 images: FlexiViT 95.3-98.6 % at its five sizes (seed 0; seeds 1 and 2: 94.7-98.9 %), the fixed
one 98.3 % at its own size and 10.3-57.2 % at the others (seed 0). With compilation they take 67 and 41 seconds of CPU
time, 75 and 46 of wall time on two cores that did other work too (docs/log.md, 2026-11-28).

Data: 1,437 images for training, 360 for test, in a
scikit-learn wheel. The recipe is ours; the method is FlexiViT's (arXiv 2212.08013).
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (2, 3, 4, 6, 8)  # of 24 pixels: patch sizes 12, 8, 6, 4, 3
FLOPS = 2.3023e12  # of FlexiViT's run; a test compares


def get_config(arg=""):
  arg = parse_arg(arg, fixed=0, debug=False)
  c = ml_collections.ConfigDict()
  c.name = common.name(24, arg.fixed)
  c.total_steps = 2000

  pp = f"decode|resize(24)|{common.labelled(10)}"
  c.input = dict(data=dict(name="digits", split="train"), pp=pp, batch_size=32, threads=1)
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.model = dict(
    width=64,
    depth=4,
    mlp_dim=256,
    num_heads=4,
    pool_type="tok",
    patch_size=(4, 4),  # of 12, which learns more slowly: docs/log.md, 2026-11-23
    posemb_size=(8, 8),
  )
  c.optim = dict(lr=1e-3, wd=1e-4, clip=1.0, schedule=dict(decay_type="cosine", warmup_steps=100))
  test = dict(name="digits", split="test")
  c.evals = dict(test=dict(data=test, pp=pp, batch_size=360, seqhw=GRIDS, every_steps=500))
  c.checkpoint = dict(every_steps=500)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    common.debug(c, image_size=8, num_classes=10)
  elif arg.fixed:  # as many steps as cost what FlexiViT's do: 797 for fixed=8
    c.total_steps, c.total_flops = None, FLOPS
  return c
