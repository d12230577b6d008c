"""FlexiViT-S on ImageNet-1k with labels, from scratch (TFDS `imagenet2012`, prepared as array_record).

    flexivit train --config configs/i1k_sup.py --workdir runs/i1k_sup
    flexivit train --config configs/i1k_sup.py:epochs=300,variant=B --workdir runs/i1k_sup_b300
    flexivit train --config configs/i1k_sup.py:fixed=15 --workdir runs/i1k_sup_fixed15

Not run in full by us, and not a recipe of the paper, whose ImageNet-1k models are distilled. To compare with: its
source reports 76.5 % top-1 in 6-7 h on a TPU-v3-8 for a plain ViT-S/16 at 224 px in 90 epochs [BV]. At 240 px a
step here costs 14.4 GFLOPs an image, the mean of the ten sizes, where that ViT-S/16 takes 9.1.
If the data is not in TFDS's own folder, add --config.input.data.data_dir=DIR.

Sources: [BV] google-research/big_vision configs/vit_s16_i1k.py (arXiv 2205.01580), [FX] its
configs/proj/flexivit/i21k_sup.py; [P] FlexiViT, arXiv 2212.08013; [ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # of 240 pixels: patch sizes 48 ... 8 [P]


def get_config(arg=""):
  arg = parse_arg(arg, variant="S", epochs=90, fixed=0, debug=False)
  c = ml_collections.ConfigDict()
  c.name = common.name(240, arg.fixed, arg.variant)
  c.total_epochs = arg.epochs  # 90 or 300 [BV]

  pp = common.labelled(1000)  # [BV]
  imagenet = dict(name="imagenet2012", data_dir=common.data_dir())
  c.input = dict(
    data=imagenet | dict(split="train[:99%]"),  # the rest is for choices such as lr [BV]
    pp=f"decode|inception_crop(240)|flip_lr|randaug(2, 10)|{pp}",  # [BV], 240 for its 224 [P]
    batch_size=1024,  # [BV]
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))  # uniform [P]
  c.objective = dict(loss="softmax_xent", mixup_p=0.2)  # [BV]
  c.model = dict(
    variant=arg.variant,
    pool_type="gap",  # [BV]
    posemb="learn",  # [P]; [BV] has sincos2d, whose cells have no fixed place in the image
    posemb_size=(7, 7),  # [P]
    patch_size=(32, 32),  # [P]
    dtype="bfloat16",  # [ours]; the head is linear, that of [BV] has a hidden layer
  )
  c.optim = dict(
    lr=1e-3, wd=1e-4, clip=1.0, schedule=dict(decay_type="cosine", warmup_steps=10_000)
  )  # [BV]

  c.evals = common.evals(
    imagenet,
    dict(test="validation", val="train[99%:]"),  # [BV]
    pp=f"decode|resize_small(272)|central_crop(240)|{pp}",  # [FX]: 272 = 240 // 7 * 8
    batch_size=1000,  # [ours]
    seqhw=GRIDS,
  )
  c.evals.test.every_epochs, c.evals.val.every_epochs = 30, 5  # [ours]
  c.checkpoint = dict(every_steps=1000)  # [BV]
  c.mesh = dict(data=-1, fsdp=1)
  c.accumulate = "auto"  # the fewest microbatches that fit; equal but for rounding [ours]

  if arg.debug:
    common.debug(c, image_size=(250, 300), num_classes=1000)
    c.evals.val.data.split = "validation"
  return c
