"""OWL-ViT with learned queries on BCCD in miniature: blood cells in photos of 240 x 320 pixels, 3 classes; one CPU.

    flexivit train --config configs/detect_bccd.py --workdir runs/bccd_own
    flexivit train --config configs/detect_bccd.py:init=vit_ti.npz --workdir runs/bccd
    flexivit train --config configs/detect_bccd.py:init=vit_ti.npz,fixed=16 --workdir runs/bccd_p16

init: a plain ViT-Ti with 16 x 16 patches, from which the backbone starts; without it from nothing. fixed: one patch
size in pixels, 40, 20, 16 or 10. box_bias: where a box begins, "centre" or "corner" of its patch.
Data: DATA_DIR has images/ and instances_{train,val,test}.json in COCO's format, 205, 87 and 72 photos; MIT licence, by
Shenggan/BCCD_Dataset. A platelet is 20 pixels a side, a red cell 50, a white one 100.
Expect AP50 of 53 % at patch 40, 68 at 20, 72 at 16 and 71 at 10, one seed; fixed models are better at their own size
and fail at others. A table of all is in docs/detection.md. The recipe is ours.
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

HW = (240, 320)
GRIDS = {40: (6, 8), 20: (12, 16), 16: (15, 20), 10: (24, 32)}  # by patch size
BOXES = 32  # rows; a photo has 30 at most


def get_config(arg=""):
  arg = parse_arg(
    arg, init="", fixed=0, box_bias="centre", data_dir="bccd", epochs=60.0, lr=1e-3, seed=0, debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  sizes = {40: 0.3, 20: 0.4, 16: 0.2, 10: 0.1}  # how often; all alike would cost 1.7 times as much
  if arg.fixed:
    sizes = {choose("fixed", str(arg.fixed), {str(p): p for p in GRIDS}): 1.0}
  c.name = "OWL-ViT, BCCD" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_epochs = arg.epochs

  where = common.data_dir()
  where.set(arg.data_dir)
  data = dict(name="coco", data_dir=where)
  boxes = f"value_range(-1, 1)|pad_boxes({BOXES})"
  crop = f"inception_crop({HW}, area_min=40, ratio_min=1.1, ratio_max=1.6, min_area=0.5)|flip_lr"
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"decode|{crop}|{boxes}|relative_boxes('xyxy')|keep('image', 'boxes', 'box_mask', 'box_labels')",
    batch_size=8,
    threads=1,
  )
  c.flexi = dict(grid_hw=dict(v=tuple(GRIDS[p] for p in sizes), p=tuple(sizes.values())))
  c.objective = dict(name="detection")
  c.model = dict(
    name="owl_vit",
    backbone=dict(variant="Ti", pool_type="tok", patch_size=(16, 16), posemb_size=(14, 14), gelu="exact"),
    embed_dim=64,
    merge="class_token",
    box_bias=arg.box_bias,
  )  # fmt: skip
  if arg.init:
    c.init = dict(backbone=dict(checkpoint=arg.init, new_head=True))
  c.optim = dict(
    lr=arg.lr, wd=arg.lr / 10, clip=1.0, layer_decay=0.8,
    schedule=dict(decay_type="cosine", warmup_percent=0.05),
  )  # fmt: skip
  c.evals = dict(
    test=dict(
      type="detection",
      data=data | dict(split="test"),
      pp=f"decode|origin|{boxes}|keep('image', 'origin', 'boxes', 'box_mask', 'box_labels')",
      batch_size=8,
      seqhw=tuple(GRIDS.values()),
      every_percent=1.0,
    )
  )
  c.checkpoint = dict(every_percent=0.25)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=HW, num_classes=3)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=HW, num_classes=3)
  return c
