"""The paper's experiments in miniature: CIFAR-10 (TFDS `cifar10`, prepared as array_record) on two CPU cores.

    flexivit train --config configs/miniature.py --workdir runs/miniature/flexivit
    flexivit train --config configs/miniature.py:fixed=6 --workdir runs/miniature/fixed6
    flexivit train --config configs/miniature.py:teacher=runs/miniature/fixed6 --workdir runs/miniature/distilled

`make miniature` runs them all, two at a time, and goes on where it was stopped; what came of it, with seeds, wall
times and what each tells of the paper's claims, is in docs/results.md. Expect of the first 42.8, 45.2, 48.0, 50.0 %
top-1 at GRIDS, of the second 56.2 % at 6x6 (six epochs, seed 0; 14 and 22 minutes on one core).

Where the data is not in TFDS's own folder, add --config.input.data.data_dir=DIR (for training and test).
All of it is ours: the experiments are FlexiViT's (arXiv 2212.08013), their scale and hyper-parameters are not.
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

# Of 48 pixels: patch sizes 24, 16, 12, 8 (of the original 32: 16, 10.7, 8, 5.3).
GRIDS = (2, 3, 4, 6)
STRIDES = (30, 15, 10, 6)  # with patches of 18 pixels: the same grids
DEPTHS = (1, 2, 3, 4)
SIZES = {
  "uniform": {},
  "flops": dict(share="flops"),
  "coarse_to_fine": dict(stages="coarse_to_fine"),
  "fine_to_coarse": dict(stages="fine_to_coarse"),
  "adaptive": dict(adapt=dict(every=50)),
}


def get_config(arg=""):
  arg = parse_arg(
    arg,
    fixed=0,  # one patch size: tokens a side
    teacher="",  # distil from this run, at its finest size
    init="",  # start from this run's weights
    resize="pi",  # how the kernel is resized: pi, plain, area, norm
    kernel=8,  # pixels a side of the stored kernel
    grid=6,  # cells a side of the stored position grid
    sizes="uniform",  # how often which size is drawn: a key of SIZES
    axis="seqhw",  # what is flexible: seqhw, stride (of patches of `kernel` pixels) or depth
    epochs=6.0,
    flops=0.0,  # length of the run in FLOPs, in the place of epochs
    seed=0,
    debug=False,
  )
  c = ml_collections.ConfigDict()
  c.name = common.name(48, arg.fixed)
  c.name += (", distilled" if arg.teacher else "") + (", from weights" if arg.init else "")
  c.seed = arg.seed
  c.total_epochs, c.total_flops = (None, arg.flops) if arg.flops else (arg.epochs, None)

  pp = f"resize(48)|{common.labelled(10)}"
  c.input = dict(
    data=dict(name="cifar10", split="train", data_dir=common.data_dir()),
    pp=f"decode|random_crop(32, padding=4)|flip_lr|{pp}",
    batch_size=128,
    threads=1,
  )
  axes = dict(seqhw=GRIDS, stride=STRIDES, depth=DEPTHS)
  values = choose("axis", arg.axis, axes)
  values = (arg.fixed,) if arg.fixed else values
  c.flexi = {arg.axis: dict(v=values, **choose("sizes", arg.sizes, SIZES))}
  if arg.axis == "depth":
    c.flexi.seqhw = dict(v=(6,))
  if arg.teacher:
    teacher = dict(checkpoint=arg.teacher, seqhw=6)
    c.objective = dict(name="distill", teachers=dict(fixed=teacher))
  if arg.init:
    c.init = dict(checkpoint=arg.init)
  c.model = dict(
    width=96,
    depth=4,
    mlp_dim=384,
    num_heads=3,
    pool_type="tok",
    kernel_resize=arg.resize,
    patch_size=(arg.kernel, arg.kernel),
    posemb_size=(arg.grid, arg.grid),
  )
  schedule = dict(decay_type="cosine", warmup_percent=0.128)
  c.optim = dict(lr=1e-3, wd=1e-4, clip=1.0, schedule=schedule)
  test = dict(name="cifar10", split="test", data_dir=c.input.data.get_ref("data_dir"))
  c.evals = dict(test=dict(data=test, pp=f"decode|{pp}", batch_size=250, every_percent=1 / 3))
  sizes = dict(seqhw=(6,), depth=DEPTHS) if arg.axis == "depth" else {arg.axis: values}
  c.evals.test.update(sizes if arg.axis != "seqhw" else dict(seqhw=GRIDS))
  if arg.teacher:
    c.evals.test.update(type="distance", teacher=teacher, labels=True)
  c.checkpoint = dict(every_percent=0.1)

  if arg.debug:
    common.debug(c, image_size=32, num_classes=10)
  return c
