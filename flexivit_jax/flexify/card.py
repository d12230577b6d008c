"""The model card of a flexified model, and the folder that it lies in."""

import json
import pathlib
from typing import Any

from flexivit_jax import weights
from flexivit_jax.flexify import recipe, retention
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import size_text
from flexivit_jax.trees import Json, Params

# The front matter is what Hugging Face's hub reads; the licence, that of the original, is for its owner to add.
_TEXT = """---
library_name: flexivit_jax
pipeline_tag: {task}
tags:
- flexivit
- vision
- jax
---

# {title}

A Vision Transformer that runs at any patch size that divides its image, made from `{init}` with `flexivit flexify`.
{how}

## What is left of the original at each patch size

{table}

{meaning}

## Use

```bash
{use}
```

`--seqhw` is the number of tokens per side: {sizes}. More is finer and slower. Images are {side} x {side} pixels.

## How it was made

{facts}

The patch-embedding kernel is stored with {kernel} pixels and the position grid with {grid} cells; both are resized for
the patch size at hand (FlexiViT, arXiv 2212.08013).

## Limits

Measured on {n} held-out images from the same folder as the training images: what it does on other images was not
measured. It can know no more than the original, whose licence and limits hold for it too.
"""


_CLASSES = (
  '"Agreement" is how often this model names the same class as the original at its native size.',
  "flexivit predict IMAGE --checkpoint model.npz --seqhw {seqhw}",
)
_EMBEDDINGS = (
  '"Cosine" is that of the angle between the embeddings of this model and of the original at its native size, the mean'
  ' and the 5th percentile\nover images. "Neighbours": of the images nearest to an image by the original, how many are'
  " among its nearest by this model.",
  "flexivit embed PHOTOS --checkpoint model.npz --out features.npz --seqhw {seqhw}",
)

_BOXES = (
  'A box is "kept" where this model has one of the same class with an IoU of 0.5 or more; "added" are its boxes that'
  " the\noriginal does not have. Boxes count from a score of 0.1 on.",
  "flexivit predict IMAGE --checkpoint model.npz --seqhw {seqhw}",
)


def write(out: pathlib.Path, scores: Json, made: tuple[Any, Params, Json], card: str) -> None:
  """Writes OUT/retention.json, OUT/model.npz and OUT/README.md.

  The first one first: it says that the other two files are of this command.

  Args:
    out: the folder, which is made.
    scores: content of retention.json, which gets the digest of the weights.
    made: (model, params, record).
    card: see `text`.
  """
  out.mkdir(parents=True, exist_ok=True)
  scores["weights"] = weights.towers.digest(*made[:2])
  (out / "retention.json").write_text(json.dumps(scores, indent=1, allow_nan=False) + "\n")
  (out / "model.npz").unlink(missing_ok=True)
  weights.save_npz(out / "model.npz", *made)
  (out / "README.md").write_text(card)


def text(plan: recipe.FlexifyRecipe, student: FlexiViT, scores: Json, facts: Json) -> str:
  """Returns the card in Markdown; every number in it is from this run."""
  taught = "answers" if plan.embedding is None else "embeddings"
  taught = "boxes and scores" if plan.boxes else taught
  trained = (
    f"Its weights were trained towards the original's {taught} at randomly drawn patch sizes, without labels."
    if "after" in scores
    else "Nothing was trained: kernel and position grid are resized, that is all."
  )
  meaning, use = _CLASSES if plan.embedding is None else _EMBEDDINGS
  meaning, use = _BOXES if plan.boxes else (meaning, use)
  task = "image-classification" if plan.embedding is None else "image-feature-extraction"
  return _TEXT.format(
    task="object-detection" if plan.boxes else task,
    meaning=meaning,
    use=use.format(seqhw=size_text(plan.seqhw[len(plan.seqhw) // 2])),
    title=f"{facts['init'].rpartition('.')[0] or facts['init']}, flexified",
    init=facts["init"],
    how=trained,
    table=retention.table(scores),
    sizes=", ".join(str(size_text(size)) for size in plan.seqhw),
    side=plan.sides[0],
    facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
    kernel="x".join(map(str, student.patch_size)),
    grid="x".join(map(str, student.posemb_size)),
    n=scores["before"][0]["n"],
  )
