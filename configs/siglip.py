"""SigLIP (arXiv 2303.15343) whose image tower runs at all patch sizes; both towers begin from nothing.

    flexivit train --config configs/siglip.py --workdir runs/siglip
    flexivit train --config configs/siglip.py:data=captions,data_dir=photos,vocab=8192 --workdir runs/photos
    flexivit train --config configs/siglip.py:fixed=15 --workdir runs/siglip_b16

Not run by us. Published for SigLIP B/16 at 224 pixels, of one patch size and trained on WebLI, which is not public:
76.2 % top-1 on ImageNet without its labels, COCO R@1 64.4 and 47.2 % [README]. Nothing near that comes of COCO's
83,000 photos.

The tokenizer is made of your captions, as in configs/flexiclip.py, or is a .model of SentencePiece: add
tokenizer=FILE,end=</s>,vocab=32000. Texts are padded with the end token, so that the last token, which is pooled, is
always the same. The bias begins at the log-odds of a pair in the batch (-8.3 for 4,096), which is SigLIP's -10 at
32,768.

Sources: [SIG] the paper; [README] google-research/big_vision, configs/proj/image_text/README_siglip.md; [BV] its
models/proj/image_text/; [FX] FlexiViT (arXiv 2212.08013); [ours] chosen here.
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)  # of 240 pixels [FX]


def get_config(arg=""):
  arg = parse_arg(
    arg, fixed=0, epochs=32.0, batch=4096, tokenizer="tokenizer.json", end="[END]", vocab=32_768, data="coco_captions",
    data_dir="", seed=0, debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  c.name = f"SigLIP-B, patch {240 // arg.fixed} only" if arg.fixed else "SigLIP-B, flexible"
  c.seed = arg.seed
  c.total_epochs = arg.epochs  # [ours]

  end = "[END]" if arg.debug else arg.end
  path = "bytes" if arg.debug else arg.tokenizer
  train, test = common.pairs(dict(path=path, pad=end, end=end), 64)  # [SIG]; 16 at first
  data = common.captioned(arg.data, arg.data_dir)
  c.input = dict(
    data=data | dict(split="train"),
    pp=f"decode|resize(240)|{train}",  # [SIG]
    batch_size=arg.batch,  # 32,768 [SIG]
  )
  c.flexi = dict(seqhw=dict(v=(arg.fixed,) if arg.fixed else GRIDS))
  c.objective = dict(name="sigmoid_contrastive")  # [SIG]
  c.model = dict(
    name="two_towers",
    image=dict(variant="B", pool_type="map", patch_size=(32, 32), posemb_size=(7, 7)),  # [SIG, FX]
    text=dict(
      kind="siglip", variant="B", vocab_size=arg.vocab, max_length=64, num_classes=768
    ),  # [BV]
    temperature=0.1,  # [SIG]
    bias="auto",
  )
  c.optim = dict(
    lr=1e-3,  # [SIG], as all of these
    wd=1e-4,
    b2=0.95,
    clip=1.0,
    schedule=dict(decay_type="cosine", warmup_percent=0.1),  # [ours]
  )
  c.evals = common.retrieval(data, 240, test, GRIDS, every_percent=0.1)
  c.checkpoint = dict(every_percent=0.02)
  c.mesh = dict(data=-1, fsdp=1)

  if arg.debug:
    c.model.text.num_classes = 32
    common.debug(c, image_size=(250, 300), num_classes=10)
  return c
