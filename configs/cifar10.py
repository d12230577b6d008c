"""FlexiViT on CIFAR-10 (TFDS `cifar10`, prepared as array_record).

    flexivit train --config configs/cifar10.py --workdir runs/cifar10
    flexivit train --config configs/cifar10.py:fixed=8 --workdir runs/cifar10_fixed8

The second is a ViT of one patch size in the same budget.

Expect, in top-1 on the test images (seed 0): FlexiViT 55.5, 60.8, 65.5, 66.6 % at GRIDS, fixed=8 71.0 % at its own
size. 78 and 105 minutes on one core of a busy machine (docs/results.md).

Where the data is not in TFDS's own folder, add
--config.input.data.data_dir=DIR (for training and test). To prepare it, in another environment:
`pip install tensorflow-datasets tensorflow && tfds build cifar10 --file_format=array_record`.
The recipe is ours; the method is FlexiViT's (arXiv 2212.08013).
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (3, 4, 6, 8)  # of 48 pixels: patch sizes 16, 12, 8, 6 (of the original 32: 10.7, 8, 5.3, 4)


def get_config(arg=""):
  arg = parse_arg(arg, fixed=0, debug=False)
  c = ml_collections.ConfigDict()
  c.name = common.name(48, arg.fixed)
  c.total_epochs = 15

  pp = f"resize(48)|{common.labelled(10)}"
  c.input = dict(
    data=dict(name="cifar10", split="train", data_dir=common.data_dir()),
    pp=f"decode|random_crop(32, padding=4)|flip_lr|{pp}",
    batch_size=128,
    threads=1,
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.model = dict(
    width=128,
    depth=6,
    mlp_dim=512,
    num_heads=4,
    pool_type="tok",
    patch_size=(12, 12),
    posemb_size=(8, 8),
  )
  c.optim = dict(lr=1e-3, wd=1e-4, clip=1.0, schedule=dict(decay_type="cosine", warmup_steps=500))
  c.evals = dict(
    test=dict(
      data=dict(name="cifar10", split="test", data_dir=c.input.data.get_ref("data_dir")),
      pp=f"decode|{pp}",
      batch_size=250,
      seqhw=GRIDS,
      every_epochs=5,
    )
  )
  c.checkpoint = dict(every_epochs=1)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    common.debug(c, image_size=32, num_classes=10)
  return c
