"""FlexiViT on your own images: from scratch, or from a pretrained Vision Transformer.

    flexivit train --config configs/folder.py --workdir runs/folder
    flexivit train --config configs/folder.py:data_dir=photos/ --workdir runs/folder
    flexivit train --config configs/folder.py:init=vit_ti.npz,data_dir=photos --workdir runs/photos
    flexivit train --config configs/folder.py:init=vit_ti.npz,layer_decay=0.75,freeze=6 --workdir runs/photos

Images are DATA_DIR/train/CLASS/*.jpg and DATA_DIR/val/CLASS/*.jpg (also png, webp, ...); the classes are counted.
Without a folder `val`, add train=train[:90%],val=train[90%:]. What to expect depends on the images: a few hundred a
class are few for a model that starts from nothing, and enough for one that starts from a pretrained file.

init: a file or folder of timm, transformers or big_vision, a run, a published name: whatever `flexivit inspect` reads.
All fields of the model are taken from it; the head is new. What it does not say, how its input is normalised or how
many heads it has, is --config.init.mean=, --config.init.std= and --config.init.num_heads=.
fixed: one patch size, in tokens a side, with images as large as the model was made for: init=FILE,fixed=14 is patch 16
of 224 pixels. Without it all patch sizes of 8 to 48 pixels. res: pixels a side, 120 from scratch and 240 with init.
epochs, lr: 100 and 1e-3 from scratch, 20 and 1e-4 with init. layer_decay, freeze: docs/recipes.md.
The recipe is ours; the method is FlexiViT's (arXiv 2212.08013).
"""

import ml_collections

from flexivit_jax.config import grids, parse_arg
from flexivit_jax.configs import common

DATA_DIR = "images"
GRIDS = (5, 6, 8, 10, 12, 15)  # of 120 pixels, from scratch: patch sizes 24, 20, 15, 12, 10, 8


def get_config(arg=""):
  arg = parse_arg(
    arg, data_dir=DATA_DIR, num_classes=0, init="", fixed=0, res=0, epochs=0.0, lr=0.0,
    layer_decay=1.0, freeze="", train="train", val="val", debug=False,
  )  # fmt: skip
  res = arg.res or (120 if not arg.init else 240)
  if arg.init and arg.fixed and not arg.res and not arg.debug:
    from flexivit_jax.weights import native_side

    res = native_side(arg.init)
  sizes = GRIDS if res == 120 else grids(res)
  c = ml_collections.ConfigDict()
  c.name = common.name(res, arg.fixed)
  c.total_epochs = arg.epochs or (20 if arg.init else 100)

  pp = common.labelled(arg.num_classes or "")  # "" counts the classes
  c.input = dict(
    data=dict(name="folder", split=arg.train, data_dir=arg.data_dir),
    pp=f"decode_inception_crop({res}, area_min=20)|flip_lr|{pp}",
    batch_size=32 if arg.init else 64,
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else sizes))
  c.objective = dict(mixup_p=0.2)
  c.model = dict(width=192, depth=6, mlp_dim=768, num_heads=3, pool_type="gap")
  lr = arg.lr or (1e-4 if arg.init else 1e-3)
  c.optim = dict(
    lr=lr, wd=lr / 10, clip=1.0, schedule=dict(decay_type="cosine", warmup_percent=0.05)
  )
  if arg.init:
    c.model = dict(like=arg.init)
    c.init = dict(checkpoint=arg.init, new_head=True)
    c.optim.lr_mults = (("head/.*", 10.0),)  # it starts from nothing
  if arg.layer_decay != 1:
    c.optim.layer_decay = arg.layer_decay
  if arg.freeze:  # how many blocks, or "all_but_head"
    c.optim.freeze = int(arg.freeze) if arg.freeze.isdecimal() else arg.freeze
  c.evals = dict(
    test=dict(
      data=dict(name="folder", split=arg.val, data_dir=c.input.data.get_ref("data_dir")),
      pp=f"decode|resize_small({res * 17 // 15})|central_crop({res})|{pp}",
      batch_size=64,
      seqhw=sizes,
      every_percent=0.1,
    )
  )
  c.checkpoint = dict(every_percent=0.1)

  if arg.debug:
    if arg.init:  # without the file
      c.init, c.model = None, dict(variant="mu")
    if isinstance(c.optim.get("freeze"), int):
      c.optim.freeze = min(c.optim.freeze, 1)
    common.debug(c, image_size=(150, 200), num_classes=arg.num_classes or 10)
    c.model.depth = 1
  return c
