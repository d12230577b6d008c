"""FlexiViT-B on ImageNet-21k, distilled from ViT-B/8: the paper's distillation (its figure 5).

    flexivit train --config configs/i21k_distill.py --workdir runs/i21k_distill
    flexivit train --config configs/i21k_distill.py:init=random --workdir runs/i21k_distill_random
    flexivit train --config configs/i21k_distill.py:kernel=48,grid=15 --workdir runs/i21k_distill_48_15

Not run by us; of figure 5 no numbers are known to us. The teacher, also the start, is the AugReg B/8, a file of
google-research/vision_transformer (gs://vit_models/augreg); give its path with teacher=FILE. ImageNet-21k as in
i21k_sup.py; if it is not in TFDS's own folder, add --config.input.data.data_dir=DIR.

A defect of the source is corrected here: its training preprocessing resizes the teacher's image out of the student's,
which has been resized to 240 and mapped to [-1, 1] before, and maps it again, so that the teacher sees an almost
constant picture. Here both are made of the same crop. Its distances too take ImageNet-21k's splits of ImageNet-1k.

Sources: [BV] google-research/big_vision configs/proj/flexivit/i21k_distill.py; [P] FlexiViT, arXiv 2212.08013, by
summaries and its authors' answers; [ours] chosen here. init: figure 5 [P]; kernel, grid: figure 17 [P]; resize, sizes
[ours].
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # of 240 pixels: patch sizes 48 ... 8 [BV]
FILE = "B_8-i21k-300ep-lr_0.001-aug_medium2-wd_0.1-do_0.0-sd_0.0.npz"  # [BV]


def get_config(arg=""):
  arg = parse_arg(
    arg, epochs=90, fixed=0, teacher=FILE, init="teacher", kernel=8, grid=7, resize="pi",
    sizes="uniform", debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  c.name = common.name(240, arg.fixed, "B")
  c.total_epochs = arg.epochs  # 90 [BV]

  imagenet = dict(name="imagenet21k", data_dir=common.data_dir())
  c.input = dict(
    data=imagenet | dict(split="full[51200:]"),  # [BV]
    pp="decode|inception_crop|flip_lr|copy('image', 'teacher_image')|resize(240)|"
    + common.two_images("resize(224, key='teacher_image')"),  # [BV], with key= for its outkey=
    batch_size=4096,  # [BV]
    prefetch=8,  # [BV] of i21k_sup
  )
  flexible = choose("sizes", arg.sizes, dict(uniform={}, flops=dict(share="flops")))
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS, **flexible))  # uniform [BV]
  shape = dict(variant="B/8", posemb_size=(28, 28), num_classes=21843)
  teacher = dict(checkpoint=arg.teacher, image="teacher_image", model=shape)
  c.objective = dict(name="distill", teachers=dict(b8=teacher), mixup_p=1.0)  # KL, t=1 [BV]
  if choose("init", arg.init, ("teacher", "random")) == "teacher":
    c.init = dict(checkpoint=arg.teacher)  # [BV]
  c.model = dict(
    variant="B",  # [BV]
    pool_type="tok",  # [BV]
    patch_size=(arg.kernel, arg.kernel),  # (8, 8) [BV]
    posemb_size=(arg.grid, arg.grid),  # (7, 7) [BV]
    kernel_resize=arg.resize,
    dtype="bfloat16",  # [ours]
  )
  c.optim = dict(
    lr=1e-4, wd=1e-5, clip=1.0, schedule=dict(decay_type="cosine", warmup_steps=5000)
  )  # [BV]

  pp = "decode|copy('image', 'teacher_image')|resize_small(256, key='teacher_image')|"  # [ours]: 224 / 7 * 8
  pp += "resize_small(272)|central_crop(240)|"
  pp += common.two_images("central_crop(224, key='teacher_image')", num_classes=21843)
  splits = dict(test="full[:25600]", val="full[25600:51200]", train="full[51200:76800]")  # [BV]
  far = dict(type="distance", pp=pp, teacher=teacher, labels=True, batch_size=1024, seqhw=GRIDS)
  c.evals = common.evals(imagenet, splits, every_steps=5000, **far)  # [BV]
  c.checkpoint = dict(every_steps=1000)  # [BV]
  c.mesh = dict(data=-1, fsdp=1)
  c.accumulate = "auto"  # the fewest microbatches that fit; equal but for rounding [ours]

  if arg.debug:
    del c.evals.train, c.evals.val  # the same program three times
    tiny = dict(image="teacher_image", model=shape | dict(variant="mu/8"))
    c.objective.teachers.b8 = c.evals.test.teacher = tiny
    c.init = None
    common.debug(c, image_size=(250, 300), num_classes=21843)
  return c
