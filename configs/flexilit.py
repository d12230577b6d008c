"""FlexiLiT: a locked FlexiViT-B and a BERT, at all patch sizes (FlexiViT's section 4.2 and figure 19).

    flexivit train --config configs/flexilit.py --workdir runs/flexilit
    flexivit train --config configs/flexilit.py:fixed=15 --workdir runs/flexilit_b16
    flexivit train --config configs/flexilit.py:fixed=8 --workdir runs/flexilit_b30

Not run by us; a miniature is configs/flexilit_emoji.py. The paper gives no numbers: with sizes drawn FlexiLiT is
never clearly worse than LiT with ViT-B/16 and B/30 (COCO R@1), and LiT at one size (the second) keeps its
flexibility, since the tower is locked (figure 19). The paper's data are not public; here it is COCO, as in
configs/lit_coco.py.

image: the paper's FlexiViT-B of ImageNet-21k, fetched once; or a file, a run. text: a folder of transformers with
BERT base, uncased, and its tokenizer.json. Data: `coco_captions` of TFDS as array_record (data_dir=DIR where it is
not in TFDS's own folder), or data=captions,data_dir=DIR for own photos in DIR/train and DIR/test
(docs/annotated_data.md).

Sources: [FX] the paper (arXiv 2212.08013); [LIT], [SIG] big_vision's lit_coco.py, siglip_lit_coco.py; [ours].
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # of 240 pixels [FX]


def get_config(arg=""):
  arg = parse_arg(
    arg, fixed=0, image="flexivit_b_i21k_300ep", text="bert-base-uncased", data="coco_captions", data_dir="", seed=0,
    debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  c.name = f"LiT-B, patch {240 // arg.fixed} only" if arg.fixed else "FlexiLiT-B"
  c.seed = arg.seed
  c.total_steps = 5000  # [LIT]

  bert = dict(path=arg.text, pad="[PAD]", end="[SEP]")
  # 16 % of COCO's captions have more than the 16 tokens of [LIT].
  train, test = common.pairs(common.BYTES if arg.debug else bert, 32)  # [ours]
  data = common.captioned(arg.data, arg.data_dir)
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"keep('image', 'captions')|decode|resize(240)|flip_lr|randaug(2, 10)|{train}",  # [LIT]
    batch_size=512,  # [SIG]
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.objective = dict(name="sigmoid_contrastive")  # [SIG]
  c.model = dict(
    name="two_towers",
    image=dict(variant="B", pool_type="tok", patch_size=(32, 32), posemb_size=(7, 7)),  # [FX]
    text=dict(kind="bert", variant="B", vocab_size=30_522, max_length=32, pool_type="first", num_classes=768),  # [LIT]
    temperature=0.1,  # [LIT]
    bias="auto",  # [ours]: -6.2 for batches of 512
  )  # fmt: skip
  c.init = dict(image=dict(checkpoint=arg.image, new_head=True), text=dict(checkpoint=arg.text))
  c.optim = dict(
    lr=1e-3,  # [LIT], as all of these
    wd=0.01,
    clip=1.0,
    freeze=("image/.*",),
    schedule=dict(decay_type="cosine", warmup_steps=150),
  )
  c.evals = common.retrieval(data, 240, test, GRIDS, every_steps=1000)
  c.checkpoint = dict(every_steps=500)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    c.model.text.num_classes = 32
    common.debug(c, image_size=(250, 300), num_classes=10)
  return c
