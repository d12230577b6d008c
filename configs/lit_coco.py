"""LiT on COCO's captions: a locked ViT-B/16 and a BERT that learns to say what it sees (arXiv 2111.07991).

    flexivit train --config configs/lit_coco.py --workdir runs/lit_coco
    flexivit train --config configs/lit_coco.py:loss=sigmoid --workdir runs/lit_coco_sigmoid

Not run by us. Published for the first: 47.2 % image to text and 32.1 % text to image (R@1, COCO), 20.7 % top-1 on
ImageNet without its labels (`coco_B16B` in [README]): the one public number of LiT that a small group can reproduce.
The second is SigLIP's loss in batches of 512 [SIG]; no number is published. What the README leaves open: the batch of
coco_B16B (that of [LIT] here), and whether its R@1 is of Karpathy's split `test`, which is measured here, or of
`val`.

image: ViT-B/16 of AugReg, on ImageNet-21k [LIT]: https://storage.googleapis.com/vit_models/augreg/ has it as
B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz. text: a folder of transformers with BERT base, uncased,
and its tokenizer.json. Data: `coco_captions` of TFDS as array_record; if it is not in TFDS's own folder, add
data_dir=DIR. All patch sizes: configs/flexilit.py.

Sources: [README], [LIT], [SIG] google-research/big_vision, configs/proj/image_text/: README_lit.md, lit_coco.py,
siglip_lit_coco.py; [BERT] its models/proj/flaxformer/bert.py; [ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import choose, parse_arg
from flexivit_jax.configs import common

# Objective and batch size of a loss [LIT, SIG].
LOSSES = {"softmax": ("softmax_contrastive", 4096), "sigmoid": ("sigmoid_contrastive", 512)}


def get_config(arg=""):
  arg = parse_arg(
    arg, image="B_16-i21k.npz", text="bert-base-uncased", loss="softmax", data="coco_captions", data_dir="",
    debug=False,
  )  # fmt: skip
  objective, batch_size = choose("loss", arg.loss, LOSSES)
  c = ml_collections.ConfigDict()
  c.name = f"LiT-B/16, COCO, {arg.loss}"
  c.total_steps = 5000  # [LIT, SIG]

  bert = dict(path=arg.text, pad="[PAD]", end="[SEP]")
  train, test = common.pairs(common.BYTES if arg.debug else bert, 16)  # [LIT]
  data = common.captioned(arg.data, arg.data_dir)
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"keep('image', 'captions')|decode|resize(224)|flip_lr|randaug(2, 10)|{train}",  # [LIT]
    batch_size=batch_size,
  )
  c.flexi = dict(seqhw=dict(v=(14,)))
  c.objective = dict(name=objective)
  if arg.loss == "softmax":
    c.objective.max_scale = None  # [LIT]
  c.model = dict(
    name="two_towers",
    image=dict(variant="B", pool_type="tok", patch_size=(16, 16), posemb_size=(14, 14)),  # [LIT]
    text=dict(
      kind="bert", variant="B", vocab_size=30_522, max_length=16, pool_type="first", num_classes=768  # [BERT]
    ),
    temperature=0.1,  # [LIT]
    bias=-2.71 if arg.loss == "sigmoid" else None,  # [SIG]
  )  # fmt: skip
  c.init = dict(image=dict(checkpoint=arg.image, new_head=True), text=dict(checkpoint=arg.text))
  c.optim = dict(
    lr=1e-3,  # [LIT], as all of these
    wd=0.01,
    clip=1.0,
    freeze=("image/.*",),
    schedule=dict(decay_type="cosine", warmup_steps=150),
  )
  c.evals = common.retrieval(data, 224, test, (14,), every_steps=500)  # [LIT]
  c.checkpoint = dict(every_steps=1000)  # [LIT]
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.init = None
    c.model.text.num_classes = 32
    common.debug(c, image_size=(250, 300), num_classes=10)
  return c
