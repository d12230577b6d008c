"""Segmenter (arXiv 2105.05633) on ADE20K, 150 classes, with a FlexiViT that runs at all patch sizes.

    flexivit train --config configs/segmenter_ade20k.py --workdir runs/ade20k
    flexivit train --config configs/segmenter_ade20k.py:decoder=linear --workdir runs/ade20k_linear
    flexivit train --config configs/segmenter_ade20k.py:fixed=16 --workdir runs/ade20k_p16
    flexivit train --config configs/segmenter_ade20k.py:init=vit_b.npz,optim=adamw --workdir runs/ade20k_vit

Not run by us. Published for Segmenter-B with the mask decoder, trained at each patch size by itself, single scale:
43.1 % mIoU at patch 32, 48.1 at 16, 49.5 at 8 [P]; a flexible one should have all three. The FlexiViT paper's own runs
with Segmenter are of Cityscapes.

Data: DATA_DIR is the folder ADEChallengeData2016 with images/ and annotations/ (docs/annotated_data.md). TFDS has no
prepared form of these masks. init: the published FlexiViT-B, or what `flexivit inspect` reads; init= (nothing) begins
from nothing. fixed: one patch size in pixels, of PATCHES. For the published multi-scale figures, after training:
--config.evals.test.scales=(0.5,0.75,1,1.25,1.5,1.75) --config.evals.test.flip=True.

Sources: [P] Segmenter's paper and rstrudel/segmenter, segm/config.yml, segm/data/; [ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

PATCHES = (32, 24, 20, 16, 12, 10, 8)  # [ours]; 24, 20, 12, 10 do not divide 512: padded
CROP = 512  # [P]


def get_config(arg=""):
  arg = parse_arg(
    arg, init=common.FLEXIVIT_B, decoder="mask", fixed=0, optim="sgd", data_dir="ADEChallengeData2016", steps=160_000,
    seed=0, debug=False,
  )  # fmt: skip
  sizes = common.tokens(CROP, PATCHES)
  c = ml_collections.ConfigDict()
  c.name = "Segmenter, ADE20K" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_steps = arg.steps  # 64 epochs [P]

  where = common.data_dir()
  where.set(arg.data_dir)
  values = "value_range(-1, 1)|pad(512, fill=0)|keep('image', 'mask')"
  c.input = dict(
    data=dict(name="ade20k", split="training", data_dir=where),
    pp=f"decode|scale_jitter(512, long=2048)|balanced_crop(512)|flip_lr|photometric_distortion|{values}",  # [P]
    batch_size=8,  # [P]
  )
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="segmentation")
  c.model, c.init = common.segmenter(arg.init, arg.decoder)
  optimizers = dict(
    sgd=common.polynomial(1e-3),  # [P]
    adamw=dict(
      lr=1e-4, wd=1e-5, clip=1.0, layer_decay=0.75, schedule=dict(decay_type="cosine", warmup_steps=1500)
    ),  # [ours]
  )  # fmt: skip
  c.optim = choose("optim", arg.optim, optimizers)
  c.evals = dict(
    test=dict(
      type="segmentation",
      data=dict(name="ade20k", split="validation", data_dir=where),
      pp="decode|value_range(-1, 1)|keep('image', 'mask')",
      batch_size=1,
      short_side=CROP,  # [P], as the window
      window=CROP,
      seqhw=tuple(sizes.values()),
      every_steps=16_000,
    )
  )
  c.checkpoint = dict(every_steps=2000)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(96, 128), num_classes=10)
  return c
