"""FlexiLiT in miniature: a locked flexible ViT-Ti and MiniLM on emoji and their names; one CPU, tens of minutes.

    flexivit train --config configs/flexilit_emoji.py --workdir runs/emoji_own
    flexivit train --config configs/flexilit_emoji.py:image=runs/vit_ti,text=minilm --workdir runs/emoji
    flexivit train --config configs/flexilit_emoji.py:image=runs/vit_ti,text=minilm,fixed=10 --workdir runs/emoji_p16

Expect, of the second: R@1 of 395 held-out emoji, the mean of both ways, of 25 % at patch 40, 28 at 32, 31 at 20, 16 and
10; ridge regression from the same image vectors has 19 to 25 with MiniLM's vectors, 28 to 32 with bags of words; chance
is 0.25. The third trains at one size and is measured at all (figure 19 of FlexiViT's paper): as good near it, 6 to 9
points worse at 32 and 40. Intervals: docs/image_text.md. `tools/paper/emoji.py` runs all of it.

image: a ViT-Ti/16 flexified (docs/flexify.md), a run or file. text: the folder of all-MiniLM-L6-v2, of which the last
block and a new projection learn. Without text= a small tower begins from nothing, with a tokenizer of the captions:
`flexivit tokenizer name=captions data_dir=emoji split=train --out tokenizer.json --size 2000`; without image= the image
tower begins from nothing, too, and is not locked. Data: `python tools/maintain/unpack_emoji.py emoji_captions_96.npz
emoji`; --shuffled makes the control, --without flags leaves the flags out, which are many and alike. All of it is ours.
With image= add --config.tower_cache=DIR: the locked tower then runs once for each image and size.
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

LENGTH = 16  # tokens of a caption, of which 5 of 1852 have more
GRIDS = (4, 5, 8, 10, 16)  # of 160 pixels: patch sizes 40, 32, 20, 16, 10
MINILM = dict(
  kind="bert", width=384, depth=6, mlp_dim=1536, num_heads=12, vocab_size=30_522, max_length=LENGTH, pool_type="mean"
)  # fmt: skip
OWN = dict(
  kind="bert", width=192, depth=3, mlp_dim=768, num_heads=3, vocab_size=2000, max_length=LENGTH
)


def get_config(arg=""):
  arg = parse_arg(
    arg, fixed=0, image="", text="", tokenizer="tokenizer.json", data_dir="emoji", epochs=12.0, seed=0, debug=False
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  c.name = f"LiT, emoji, patch {160 // arg.fixed} only" if arg.fixed else "FlexiLiT, emoji"
  c.seed = arg.seed
  c.total_epochs = arg.epochs

  own = dict(common.BYTES, path=arg.tokenizer)
  tokenizer = dict(path=arg.text, pad="[PAD]", end="[SEP]") if arg.text else own
  train, test = common.pairs(common.BYTES if arg.debug else tokenizer, LENGTH, captions=1)
  data = common.captioned("captions", arg.data_dir)
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"decode|resize(160)|{train}",  # no flip: captions say left and right
    batch_size=128,
    threads=1,
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.objective = dict(name="softmax_contrastive")
  c.model = dict(
    name="two_towers",
    # Buffers and operators are those of timm's ViT-Ti/16, which `flexivit flexify` keeps.
    image=dict(
      variant="Ti",
      pool_type="tok+gap",
      patch_size=(16, 16),
      posemb_size=(14, 14),
      gelu="exact",
      kernel_operator="cubic_antialias",
      grid_operator="cubic_antialias",
    ),
    text=dict(MINILM if arg.text else OWN, num_classes=2 * 192),
    temperature=0.05,
    bias=None,
  )
  c.init = {
    k: dict(checkpoint=v) for k, v in dict(image=arg.image, text=arg.text).items() if v
  } or None
  frozen = ("image/.*",) if arg.image else ()
  if arg.image:
    c.init.image.new_head = True
  if arg.text:
    frozen += (r"text/(embedding|pos_embedding|pre_norm|Transformer/encoderblock_[0-4])(/.*)?",)
  c.optim = dict(
    lr=3e-3, wd=1e-4, clip=1.0, b2=0.95, freeze=frozen or None,
    schedule=dict(decay_type="cosine", warmup_percent=0.05),
  )  # fmt: skip
  c.evals = dict(
    test=dict(
      type="retrieval",
      data=data | dict(split="test"),
      pp=f"decode|resize(160)|{test}",
      batch_size=128,
      seqhw=GRIDS,
      every_percent=1.0,
    )
  )
  c.checkpoint = dict(every_percent=1.0)

  if arg.debug:
    c.init = c.optim.freeze = None
    common.debug(c, image_size=(96, 96), num_classes=10)
    c.model.text.num_classes = 64
  return c
