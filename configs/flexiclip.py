"""FlexiCLIP: CLIP (arXiv 2103.00020) whose image tower runs at all patch sizes; both towers begin from nothing.

    flexivit train --config configs/flexiclip.py --workdir runs/flexiclip
    flexivit train --config configs/flexiclip.py:data=captions,data_dir=photos,vocab=8192 --workdir runs/photos
    flexivit train --config configs/flexiclip.py:fixed=15 --workdir runs/clip_b16

Not run by us, and no number is published: the paper trains FlexiCLIP and shows curves alone
(google-research/big_vision issue 94 asks for the weights). CLIP from nothing needs hundreds of millions of pairs;
with COCO's 83,000 it does not get far, and a locked pretrained tower (configs/flexilit.py) is the better choice.

The tokenizer is made of your captions, once: `flexivit tokenizer name=captions data_dir=photos split=train --out
tokenizer.json --size 8192`; vocab=N is how many tokens it prints. Photos with captions: docs/annotated_data.md,
folders train and test; or `coco_captions` of TFDS. SigLIP's loss and text tower instead: configs/siglip.py.

Sources: [CLIP] the paper, table 18 to 20; [OC] mlfoundations/open_clip; [FX] FlexiViT (arXiv 2212.08013); [ours].
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # of 240 pixels [FX]


def get_config(arg=""):
  arg = parse_arg(
    arg, fixed=0, epochs=32.0, batch=4096, tokenizer="tokenizer.json", vocab=32_768, data="coco_captions", data_dir="",
    seed=0, debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  c.name = f"CLIP-B, patch {240 // arg.fixed} only" if arg.fixed else "FlexiCLIP-B"
  c.seed = arg.seed
  c.total_epochs = arg.epochs  # 32 [CLIP]

  own = dict(common.BYTES, path=arg.tokenizer)
  train, test = common.pairs(common.BYTES if arg.debug else own, 77)  # [CLIP]
  data = common.captioned(arg.data, arg.data_dir)
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"decode|inception_crop(240, area_min=90)|{train}",  # [OC]; no flip: captions say left and right
    batch_size=arg.batch,  # 32,768 [CLIP]
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.objective = dict(name="softmax_contrastive", max_scale=100.0)  # [CLIP]
  c.model = dict(
    name="two_towers",
    embed_dim=512,  # [CLIP], as the text tower but for the tokens
    image=dict(variant="B", pool_type="tok", patch_size=(32, 32), posemb_size=(7, 7)),  # [FX]
    text=dict(
      kind="clip", width=512, depth=12, mlp_dim=2048, num_heads=8, max_length=77, vocab_size=arg.vocab,
      eos_token=1,  # "[END]" of `flexivit tokenizer`
    ),
    temperature=0.07,
    bias=None,
  )  # fmt: skip
  c.optim = dict(
    lr=5e-4,  # [CLIP], as the next three
    wd=1e-4,  # 0.2 times lr
    b2=0.98,
    eps=1e-6,
    clip=1.0,  # [ours]
    schedule=dict(decay_type="cosine", warmup_percent=0.02),
  )
  c.evals = common.retrieval(data, 240, test, GRIDS, every_percent=0.1)
  c.checkpoint = dict(every_percent=0.02)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    common.debug(c, image_size=(250, 300), num_classes=10)
    c.model.text.update(width=64, mlp_dim=64)
  return c
