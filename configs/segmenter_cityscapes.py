"""Segmenter (arXiv 2105.05633) on Cityscapes, 19 classes, with a FlexiViT that runs at all patch sizes.

    flexivit train --config configs/segmenter_cityscapes.py --workdir runs/cityscapes
    flexivit train --config configs/segmenter_cityscapes.py:decoder=linear --workdir runs/cityscapes_linear
    flexivit train --config configs/segmenter_cityscapes.py:fixed=16 --workdir runs/cityscapes_p16
    flexivit train --config configs/segmenter_cityscapes.py:init=vit_b.npz,optim=adamw --workdir runs/cityscapes_vit

Not run by us. Published for Segmenter-L, patch 16: 79.1 % mIoU at a single scale, 81.3 at several [P]. The FlexiViT
paper (arXiv 2212.08013) shows FlexiViT-B here, as good as or better than fixed models at patches 16 and 30, without
exact numbers.

Data: DATA_DIR holds leftImg8bit/ and gtFine/ with the *_labelIds.png as they are published (docs/annotated_data.md);
or TFDS: --config.input.data="{'name': 'cityscapes/semantic_segmentation', 'split': 'train', 'image_key': 'image_left',
'mask_key': 'segmentation_label', 'labels': 'train_ids'}", and the same of evals.test.data with 'split': 'validation'.
init: the published FlexiViT-B, or what `flexivit inspect` reads; init= (nothing) begins from nothing. fixed: one patch
size in pixels, of PATCHES.

Sources: [P] Segmenter's paper and rstrudel/segmenter, segm/config.yml, segm/data/; [ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

PATCHES = (48, 32, 24, 20, 16, 12)  # [ours]; 20 does not divide 768: padded
CROP = 768  # [P]


def get_config(arg=""):
  arg = parse_arg(
    arg, init=common.FLEXIVIT_B, decoder="mask", fixed=0, optim="sgd", data_dir="cityscapes", epochs=216.0, seed=0,
    debug=False,
  )  # fmt: skip
  sizes = common.tokens(CROP, PATCHES)
  c = ml_collections.ConfigDict()
  c.name = "Segmenter, Cityscapes" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_epochs = arg.epochs  # [P]

  where = common.data_dir()
  where.set(arg.data_dir)
  values = "value_range(-1, 1)|pad(768, fill=0)|keep('image', 'mask')"
  c.input = dict(
    data=dict(name="cityscapes", split="train", data_dir=where),
    pp=f"decode|scale_jitter(1024, long=2048)|balanced_crop(768)|flip_lr|photometric_distortion|{values}",  # [P]
    batch_size=8,  # [P]
  )
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="segmentation")
  c.model, c.init = common.segmenter(arg.init, arg.decoder)
  optimizers = dict(
    sgd=common.polynomial(1e-2),  # [P]
    adamw=dict(
      lr=1e-4, wd=1e-5, clip=1.0, layer_decay=0.75, schedule=dict(decay_type="cosine", warmup_percent=0.01)
    ),  # [ours]
  )  # fmt: skip
  c.optim = choose("optim", arg.optim, optimizers)
  c.evals = dict(
    test=dict(
      type="segmentation",
      data=dict(name="cityscapes", split="val", data_dir=where),
      pp="decode|value_range(-1, 1)|keep('image', 'mask')",
      batch_size=1,
      short_side=1024,  # [P], as the window and its stride
      window=CROP,
      window_stride=512,
      seqhw=tuple(sizes.values()),
      every_percent=0.1,
    )
  )
  c.checkpoint = dict(every_percent=0.02)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(96, 192), num_classes=10)
  return c
