"""Fine-tuning a FlexiViT on another data set, at one patch size or at all (the paper's figures 7 and 8).

    flexivit train --config configs/transfer.py --workdir runs/pets
    flexivit train --config configs/transfer.py:fixed=8 --workdir runs/pets_fixed8
    flexivit train --config configs/transfer.py:data=imagenet2012,fixed=8,res=240 --workdir runs/i1k_cheap
    flexivit train --config configs/transfer.py:data=cifar100,init=runs/i21k_sup --workdir runs/cifar100

Not run in full by us. The third trains cheaply, on an 8x8 grid, and is evaluated at all: the paper reports 81.8 % top-1
at 8x8 and 85.3 % of the same weights at 24x24 (secondary sources; its resolution and hyper-parameters are not known to
us). data: oxford_iiit_pet, oxford_flowers102, food101, cifar10, cifar100, sun397 or imagenet2012, from TFDS as
array_record; if it is not in TFDS's own folder, add data_dir=DIR. init: a published name (fetched once), a file, a run;
of another model than the default's, add --config.model="{'like': 'FILE'}". Images in folders: configs/folder.py.

Sources: [BV] google-research/big_vision configs/transfer.py, the nearest public recipe, not the paper's; [FX] its
configs/proj/flexivit/README.md; [TFDS] the data sets' pages; [ours] chosen here. lr: [BV] tries 0.003 to 0.03.
"""

import ml_collections

from flexivit_jax import errors
from flexivit_jax.config import choose, grids, parse_arg
from flexivit_jax.configs import common

# classes, splits for training and test [TFDS], steps [BV] where given, [ours] of food101 and sun397
DATA = {
  "oxford_iiit_pet": (37, "train", "test", 500),
  "oxford_flowers102": (102, "train", "test", 500),
  "food101": (101, "train", "validation", 10_000),
  "cifar10": (10, "train", "test", 10_000),
  "cifar100": (100, "train", "test", 10_000),
  "sun397": (397, "train", "test", 10_000),
  "imagenet2012": (1000, "train", "validation", 20_000),
}


def get_config(arg=""):
  arg = parse_arg(
    arg, data="oxford_iiit_pet", init="flexivit_b_i21k_300ep", variant="B", kernel=32, grid=7, res=384,
    fixed=0, lr=0.01, seed=0, data_dir="", debug=False,
  )  # fmt: skip
  if arg.data == "folder":
    raise errors.UserError(
      "transfer.py takes data sets of TFDS; for your own images in folders, give"
      f" configs/folder.py:init={arg.init},data_dir={arg.data_dir or 'DIR'}."
    )
  classes, train, test, steps = choose("data", arg.data, DATA)
  c = ml_collections.ConfigDict()
  c.name = f"{arg.data}, " + (f"patch {arg.res // arg.fixed} only" if arg.fixed else "flexible")
  c.seed = arg.seed
  c.total_steps = steps

  pp = common.labelled(classes)
  crop = f"inception_crop({arg.res})"  # [ours]
  if arg.data != "imagenet2012":
    crop = f"resize({arg.res * 7 // 6})|random_crop({arg.res})"  # 448 and 384 [BV]
  where = common.data_dir()  # TFDS's own folder
  where.set(arg.data_dir or None)
  data = dict(name=arg.data, data_dir=where)
  c.input = dict(
    data=data | dict(split=train),
    pp=f"decode|{crop}|flip_lr|{pp}",
    batch_size=512,  # [BV]
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else grids(arg.res)))
  c.init = dict(checkpoint=arg.init, new_head=True)
  c.model = dict(
    variant=arg.variant,
    pool_type="tok",
    patch_size=(arg.kernel, arg.kernel),  # of the file that it starts from [FX]: keep its size
    posemb_size=(arg.grid, arg.grid),
    dtype="bfloat16",  # [ours]
  )
  c.optim = dict(
    name="momentum",  # [BV]
    lr=arg.lr,
    wd=0.0,  # [BV]
    clip=1.0,  # [BV]
    schedule=dict(decay_type="cosine", warmup_steps=min(500, steps // 5)),  # [ours]
  )
  c.evals = dict(
    test=dict(
      data=data | dict(split=test),
      pp=f"decode|resize({arg.res})|{pp}",  # [ours]
      batch_size=256,
      seqhw=grids(arg.res),
      every_percent=0.25,
    )
  )
  c.checkpoint = dict(every_percent=0.1)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(250, 300), num_classes=classes)
  return c
