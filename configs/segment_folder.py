"""Semantic segmentation of your own images: which class each pixel is, at any patch size. Edit DATA_DIR and CLASSES.

    flexivit train --config configs/segment_folder.py --workdir runs/scenes
    flexivit train --config configs/segment_folder.py:data_dir=scenes,init=vit_b.npz --workdir runs/scenes
    flexivit train --config configs/segment_folder.py:init=vit_b.npz,fixed=16,decoder=linear --workdir runs/scenes_p16

Images are DATA_DIR/images/train/NAME.jpg, and their masks DATA_DIR/masks/train/NAME.png, whose values are the numbers
of the classes, 255 for none; the same for `val`. CLASSES names them in their order; with () the names are a line each
in DATA_DIR/classes.txt. Without `val`, add train=train[:90%],val=train[90%:]. Masks of colours, other folders, a 0 that
is no class: docs/annotated_data.md; the arguments there go into DATA.

What to expect depends on the images: a few hundred are few for a model that begins with nothing, and enough for one
that starts from a pretrained file: init=FILE, what `flexivit inspect` reads; the backbone takes its fields from it.
crop: pixels a side that a step sees; images are first resized so that their short side is about that long. Patches of
8 to 48 pixels are drawn, coarse ones as often as fine ones; the fine ones cost most. fixed: one of them, in pixels.
class_weights=(1, 5, ...) or {'car': 5} in `objective` helps rare classes. Sliding windows make the evaluation of images
of any size. The recipe is ours; the methods are FlexiViT's (arXiv 2212.08013) and Segmenter's (arXiv 2105.05633).
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

DATA_DIR = "scenes"
CLASSES = ()  # ("background", "road", "car")
DATA = dict(name="masks")  # e.g. dict(name="masks", colors="label_colors.txt")
PATCHES = (48, 32, 24, 16, 12, 8)


def get_config(arg=""):
  arg = parse_arg(
    arg, data_dir=DATA_DIR, init="", decoder="mask", fixed=0, crop=384, epochs=0.0, lr=0.0, train="train", val="val",
    seed=0, debug=False,
  )  # fmt: skip
  sizes = common.tokens(arg.crop, PATCHES)
  c = ml_collections.ConfigDict()
  c.name = "Segmenter" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_epochs = arg.epochs or (40 if arg.init else 200)

  where = common.data_dir()
  where.set(arg.data_dir)
  data = dict(DATA, data_dir=where)
  if CLASSES:
    data["classes"] = CLASSES
  values = f"value_range(-1, 1)|pad({arg.crop}, fill=0)|keep('image', 'mask')"
  crop = f"scale_jitter({arg.crop})|balanced_crop({arg.crop})|flip_lr|photometric_distortion"
  c.input = dict(data=dict(data, split=arg.train), pp=f"decode|{crop}|{values}", batch_size=8)
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="segmentation")
  c.model, c.init = common.segmenter(arg.init, arg.decoder)
  lr = arg.lr or (3e-4 if arg.init else 1e-3)
  c.optim = dict(
    lr=lr, wd=lr / 10, clip=1.0, schedule=dict(decay_type="cosine", warmup_percent=0.05)
  )
  if arg.init:
    c.optim.layer_decay = 0.8
  c.evals = dict(
    test=dict(
      type="segmentation",
      data=dict(data, split=arg.val),
      pp="decode|value_range(-1, 1)|keep('image', 'mask')",
      batch_size=1,
      short_side=arg.crop,
      window=arg.crop,
      seqhw=tuple(sizes.values()),
      every_percent=0.1,
    )
  )
  c.checkpoint = dict(every_percent=0.1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(96, 128), num_classes=10)
  return c
