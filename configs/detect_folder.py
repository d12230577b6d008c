"""Detection in your own images: what is where, at any patch size. Edit DATA, or give data=.

    flexivit train --config configs/detect_folder.py --workdir runs/parts
    flexivit train --config configs/detect_folder.py:data_dir=parts,init=vit_b.npz --workdir runs/parts
    flexivit train --config configs/detect_folder.py:data=yolo,init=vit_b.npz,fixed=16 --workdir runs/parts_p16

data=coco: DATA_DIR/images/ and DATA_DIR/annotations/instances_train.json, instances_val.json; data=yolo:
images/train, labels/train and a file of names; data=voc: JPEGImages, Annotations, ImageSets/Main/train.txt. Other
layouts: docs/annotated_data.md; the arguments there go into DATA. Without `val`, add train=train[:90%],val=train[90%:].

What to expect depends on the images: a few hundred are enough for a model that starts from a pretrained file, and few
for one that begins with nothing: init=FILE, what `flexivit inspect` reads; the backbone takes its fields from it.
Photos are resized to fit crop x crop pixels and padded; training sees random parts of them, and keeps a box of which
half is left. An image has at most BOXES boxes, more are an error; patches of 48 pixels have 64 tokens at 384, and a box
each: the first lines of a run say how many boxes have no token. fixed: one patch size, in pixels. The classes are those
of the data, one learned query each; for queries of words see configs/owl_lvis.py. The recipe is ours; the methods are
FlexiViT's (arXiv 2212.08013) and OWL-ViT's (arXiv 2205.06230).
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

DATA: dict = {}  # more arguments of the data, e.g. dict(annotations="labels_{split}.json")
BOXES = 100
PATCHES = (48, 32, 24, 16, 12)


def get_config(arg=""):
  arg = parse_arg(
    arg, data="coco", data_dir="parts", init="", fixed=0, crop=384, epochs=0.0, lr=0.0, train="train", val="val",
    seed=0, debug=False,
  )  # fmt: skip
  sizes = common.tokens(arg.crop, PATCHES)
  c = ml_collections.ConfigDict()
  c.name = "OWL-ViT" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_epochs = arg.epochs or (60 if arg.init else 300)

  where = common.data_dir()
  where.set(arg.data_dir)
  data = dict(DATA, name=choose("data", arg.data, ("coco", "voc", "yolo")), data_dir=where)
  values, boxes = "value_range(-1, 1)", f"pad_boxes({BOXES})"
  crop = f"inception_crop({arg.crop}, area_min=30, min_area=0.5)|flip_lr"
  c.input = dict(
    data=dict(data, split=arg.train),
    pp=f"decode|without_crowd|{crop}|{values}|{boxes}|relative_boxes('xyxy')"
    "|keep('image', 'boxes', 'box_mask', 'box_labels')",
    batch_size=16,
  )
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="detection")
  c.model, c.init = common.detector(arg.init)
  lr = arg.lr or (1e-3 if arg.init else 5e-4)
  c.optim = dict(
    lr=lr, wd=lr / 10, clip=1.0, schedule=dict(decay_type="cosine", warmup_percent=0.05)
  )
  if arg.init:
    c.optim.layer_decay = 0.8
  c.evals = dict(
    test=dict(
      type="detection",
      data=dict(data, split=arg.val),
      pp=f"decode|origin|with_crowd|resize_keep({arg.crop}, fit='contain')|{values}|pad({arg.crop}, fill=0)"
      f"|{boxes}|keep('image', 'origin', 'boxes', 'box_mask', 'box_labels', 'box_crowd')",
      batch_size=16,
      seqhw=tuple(sizes.values()),
      every_percent=0.1,
    )
  )
  c.checkpoint = dict(every_percent=0.1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(96, 128), num_classes=10)
  return c
