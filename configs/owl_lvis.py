"""OWL-ViT (arXiv 2205.06230) on LVIS, 1,203 classes by their names, with a FlexiViT that runs at all patch sizes.

    flexivit train --config configs/owl_lvis.py --workdir runs/owl
    flexivit train --config configs/owl_lvis.py:fixed=16 --workdir runs/owl_b16
    flexivit train --config configs/owl_lvis.py:fixed=30 --workdir runs/owl_b30

Not run by us. The FlexiViT paper (arXiv 2212.08013) trains OWL-ViT with a flexible and with two fixed backbones, B/16
and B/30: the flexible one is as good at every size, and 2 to 3 AP better than B/30 at fine ones; it gives no table.
Published for OWL-ViT of CLIP's B/16, trained on Objects365 and Visual Genome: 20.8 AP, 17.1 of rare classes [README].
Here all of LVIS is trained, rare classes included; for unseen ones leave them out of the file.

init: a run, or its file, with two towers: of configs/flexiclip.py, or any whose text tower is CLIP's (vocab, tokenizer
as there). fixed: one patch size in pixels. Data: DATA_DIR holds lvis_v1_train.json, lvis_v1_val.json, train2017/ and
val2017/ (docs/annotated_data.md).

Sources: [OWL] google-research/scenic, owl_vit/configs/clip_b16.py; [README] its README; [P] the FlexiViT paper;
[ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

PIXELS = 720  # [ours]: patches of 16 and of 30 pixels divide it; 768 [OWL]
PATCHES = (48, 40, 36, 30, 24, 20, 16)  # [ours], of 16 and 30 [P]


def get_config(arg=""):
  arg = parse_arg(
    arg, init="runs/flexiclip", fixed=0, steps=140_000, batch=256, tokenizer="tokenizer.json", vocab=32_768,
    data_dir="lvis", seed=0, debug=False,
  )  # fmt: skip
  sizes = common.tokens(PIXELS, PATCHES)
  c = ml_collections.ConfigDict()
  c.name = "OWL-ViT, LVIS" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_steps = arg.steps  # 140,000 [OWL]

  where = common.data_dir()
  where.set(arg.data_dir)
  text = common.BYTES if arg.debug else dict(common.BYTES, path=arg.tokenizer)
  text = ", ".join(f"{k}={v!r}" for k, v in text.items())
  seen = "inception_crop(area_min=30, min_area=0.6)|flip_lr"  # [OWL]; the flip [ours]
  asked = f"sample_queries(100, 50)|query_tokens({text}, length=16)"  # [OWL], one of 80 templates
  last = "pad_boxes(100, 'largest')|relative_boxes('xyxy')"
  c.input = dict(
    data=dict(name="lvis", split="train", data_dir=where),
    pp=f"decode|without_crowd|{seen}|mosaic({PIXELS}, fill=128)|merge_boxes(0.9)|{asked}|value_range(-1, 1)|{last}"
    "|keep('image', 'boxes', 'box_mask', 'box_targets', 'queries')",  # [OWL]
    batch_size=arg.batch,  # 256 [OWL]
  )
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="detection", queries=True)
  c.model = dict(
    name="owl_vit",
    backbone=dict(
      variant="B", pool_type="tok", patch_size=(32, 32), posemb_size=(7, 7), stochastic_depth=0.2, remat=True
    ),  # [OWL]; kernel and positions as of configs/flexiclip.py [P]
    text=dict(
      kind="clip", width=512, depth=12, mlp_dim=2048, num_heads=8, max_length=77, vocab_size=arg.vocab, eos_token=1,
      remat=True,  # all blocks are used; 0.1 of them dropped [OWL]
    ),
    embed_dim=512,
    box_bias="centre",  # [ours]; "corner" [OWL] begins where the sigmoid is flat in the last row and column
  )  # fmt: skip
  start = dict(checkpoint=arg.init)
  c.init = dict(backbone=dict(start, new_head=True), text=start) if arg.init else None
  c.optim = dict(
    lr=5e-5,  # [OWL], as all of these
    lr_mults=(("text/.*", 0.04),),  # 2e-6
    b2=0.999,
    clip_each=1.0,
    schedule=dict(decay_type="cosine", warmup_steps=1000),
  )
  c.accumulate = 8  # [ours]: 32 examples at once, one for each core of a v3-32; masks forbid "auto"
  c.evals = dict(
    test=dict(
      type="detection",
      rules="lvis",
      templates="clip_best",  # [OWL]
      data=dict(name="lvis", split="val", data_dir=where),
      pp=f"decode|origin|resize_keep({PIXELS}, 'contain')|pad({PIXELS}, fill=128)|value_range(-1, 1)|federated"
      "|pad_boxes(400)|keep('image', 'origin', 'boxes', 'box_labels', 'box_mask', 'neg_labels',"
      " 'not_exhaustive')",
      batch_size=256,
      seqhw=tuple(sizes.values()),
      every_steps=20_000,
    )
  )
  c.checkpoint = dict(every_steps=1000)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=(96, 128), num_classes=10)
    c.model.text.update(width=64, mlp_dim=64)
    for section in (c.input, c.evals.test):
      section.data.classes = tuple(f"class {k}" for k in range(10))
  return c
