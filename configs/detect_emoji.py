"""OWL-ViT in miniature: emoji on photos are found by their names, also by names never trained; one CPU, minutes.

    flexivit train --config configs/detect_emoji.py --workdir runs/scenes_own
    flexivit train --config configs/detect_emoji.py:init=vit_ti.npz,vectors=names.npz --workdir runs/scenes
    flexivit train --config configs/detect_emoji.py:init=vit_ti.npz,vectors=names.npz,fixed=16 --workdir runs/scenes_p16
    flexivit train --config configs/detect_emoji.py:init=vit_ti.npz,vectors=shuffled.npz --workdir runs/scenes_shuffled

Training shows four of five names ("base"), the test all; AP50 of base and of novel names, while all compete, is
measured apart ("ap50_base", "ap50_novel"); in eval_novel.json only novel names compete. A detector that knows nothing
of words finds novel names by chance: so does the last run, whose names have the vectors of other names. What came of it
is in docs/detection.md; `tools/paper/detection.py emoji` runs all of it.

init: a ViT-Ti/16 with a class token. vectors: of the names, from all-MiniLM-L6-v2, which stays as it is. Without it a
small text tower of bytes begins from nothing, which learns the names that it is shown. photos: a folder; without it,
gradients are behind the emoji. fixed: one patch size in pixels, of a scene of `pixels`. All of it is ours. The data,
370 animals, foods and activities, and the vectors:

    python tools/maintain/unpack_emoji.py emoji_captions_96.npz cutouts --cutouts --without flags smileys-emotion \
      people-body symbols objects travel-places
    python tools/maintain/name_vectors.py cutouts/metadata.jsonl --text minilm --out names.npz
    python tools/maintain/name_vectors.py cutouts/metadata.jsonl --text minilm --out shuffled.npz --shuffled
"""

import ml_collections

from flexivit_jax.config import parse_arg
from flexivit_jax.configs import common

PATCHES = (48, 32, 24, 16)
LENGTH = 48  # bytes of a name
BOXES = 6  # of a scene, at most


def get_config(arg=""):
  arg = parse_arg(
    arg, init="", vectors="", fixed=0, photos="", data_dir="cutouts", box_bias="centre", pixels=192, steps=1600,
    lr=1e-3, seed=0, debug=False,
  )  # fmt: skip
  c = ml_collections.ConfigDict()
  sizes = common.tokens(arg.pixels, PATCHES)
  c.name = "OWL-ViT, emoji scenes" + (f", patch {arg.fixed} only" if arg.fixed else "")
  c.seed = arg.seed
  c.total_steps = arg.steps

  where = common.data_dir()
  where.set(arg.data_dir)
  data = dict(name="scenes", data_dir=where, image_size=arg.pixels, backgrounds=arg.photos or None)
  text = ", ".join(f"{key}={value!r}" for key, value in common.BYTES.items())
  named = f"query_tokens({text}, length={LENGTH}, templates='{{}}', canonical=False)"
  named = f"query_vectors({arg.vectors!r})" if arg.vectors else named
  c.input = dict(
    data=data | dict(split="train", num_examples=40_000, names="base"),
    pp=f"decode|sample_queries(100, 94)|{named}|value_range(-1, 1)|pad_boxes({BOXES})|relative_boxes('xyxy')"
    "|keep('image', 'boxes', 'box_mask', 'box_targets', 'queries')",
    batch_size=16,
    threads=1,
  )
  c.flexi = dict(seqhw=dict(v=common.drawn(arg.fixed, sizes)))
  c.objective = dict(name="detection", queries=True)
  c.model = dict(
    name="owl_vit",
    backbone=dict(variant="Ti", pool_type="tok", patch_size=(16, 16), posemb_size=(14, 14), gelu="exact"),
    embed_dim=192,
    box_bias=arg.box_bias,
  )  # fmt: skip
  if arg.vectors:
    c.model.query_length = 384
  else:
    c.model.text = dict(
      kind="bert", width=192, depth=3, mlp_dim=768, num_heads=3, vocab_size=258, max_length=LENGTH
    )
  c.init = dict(backbone=dict(checkpoint=arg.init, new_head=True)) if arg.init else None
  c.optim = dict(
    lr=arg.lr, wd=arg.lr / 10, clip=1.0, layer_decay=(("backbone", 0.8),),
    lr_mults=(("backbone/.*", 0.2),) if arg.init else (),
    schedule=dict(decay_type="cosine", warmup_percent=0.05),
  )  # fmt: skip
  names = dict(vectors=arg.vectors) if arg.vectors else dict(templates="{}", canonical=False)
  section = dict(
    type="detection",
    **names,
    data=data | dict(split="test", num_examples=1000, names="all"),
    pp=f"decode|origin|value_range(-1, 1)|pad_boxes({BOXES})"
    "|keep('image', 'origin', 'boxes', 'box_labels', 'box_mask')",
    batch_size=16,
    seqhw=tuple(sizes.values()),
    every_percent=1.0,
  )
  c.evals = dict(test=section, novel=dict(section, data=dict(section["data"]), only="novel"))
  c.checkpoint = dict(every_percent=0.25)

  if arg.debug:
    c.init = None
    common.debug(c, image_size=arg.pixels // 2, num_classes=10)
    del c.evals.novel  # synthetic images have no groups of classes
    for section in (c.input, c.evals.test):
      section.data.classes = tuple(f"class {k}" for k in range(10))
  return c
