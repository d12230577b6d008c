"""FlexiViT on your own images, from scratch: edit the two lines below.

    flexivit train --config configs/folder.py --workdir runs/folder
    flexivit train --config configs/folder.py:data_dir=photos/,num_classes=5 --workdir runs/folder

Images are DATA_DIR/train/CLASS/*.jpg and DATA_DIR/val/CLASS/*.jpg (also png, webp, ...). Without a folder `val`, let
the splits below be "train[:90%]" and "train[90%:]". What to expect depends on the images: a few hundred a class are
few for a model that starts from nothing. The recipe is ours; the method is FlexiViT's (arXiv 2212.08013).
"""

import ml_collections

from flexivit_jax.config import parse_arg

DATA_DIR = "images"
NUM_CLASSES = 10
GRIDS = (5, 6, 8, 10, 12, 15)  # of 120 pixels: patch sizes 24, 20, 15, 12, 10, 8


def get_config(arg=""):
  arg = parse_arg(arg, data_dir=DATA_DIR, num_classes=NUM_CLASSES, fixed=0, debug=False)
  c = ml_collections.ConfigDict()
  c.name = f"ViT, patch {120 // arg.fixed} only" if arg.fixed else "FlexiViT"
  c.total_epochs = 100

  pp = f"value_range(-1, 1)|onehot({arg.num_classes})|keep('image', 'labels')"
  c.input = dict(
    data=dict(name="folder", split="train", data_dir=arg.data_dir),
    pp=f"decode_inception_crop(120, area_min=20)|flip_lr|{pp}",
    batch_size=64,
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.objective = dict(mixup_p=0.2)
  c.model = dict(width=192, depth=6, mlp_dim=768, num_heads=3, pool_type="gap")
  c.optim = dict(
    lr=1e-3, wd=1e-4, clip=1.0, schedule=dict(decay_type="cosine", warmup_percent=0.05)
  )
  c.evals = dict(
    test=dict(
      data=dict(name="folder", split="val", data_dir=c.input.data.get_ref("data_dir")),
      pp=f"decode|resize_small(136)|central_crop(120)|{pp}",
      batch_size=64,
      seqhw=GRIDS,
      every_percent=0.1,
    )
  )
  c.checkpoint = dict(every_percent=0.1)

  if arg.debug:  # four steps on synthetic images of the same shapes: does everything work together?
    data = dict(name="synthetic", image_size=(150, 200), num_classes=arg.num_classes)
    data |= dict(num_examples=20)
    c.input.data, c.input.batch_size = data | dict(split="train[:16]"), 8
    test = c.evals.test
    test.data, test.batch_size, test.every_percent = data | dict(split="test"), 8, 0.5
    c.model.depth = 1
    c.total_epochs, c.checkpoint.every_percent = 2, 0.5
  return c
