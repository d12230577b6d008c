"""The model card of a flexified model."""

from flexivit_jax.flexify import recipe, retention
from flexivit_jax.models import FlexiViT
from flexivit_jax.sizes import size_text
from flexivit_jax.trees import Json

_TEXT = """# {title}

A Vision Transformer that runs at any patch size that divides its image, made from `{init}` with `flexivit flexify`.
{how}

## What is left of the original at each patch size

{table}

"Agreement" is how often this model names the same class as the original at its native size.

## Use

```bash
flexivit predict IMAGE --checkpoint model.npz --seqhw {seqhw}
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


def text(plan: recipe.FlexifyRecipe, student: FlexiViT, scores: Json, facts: Json) -> str:
  """Returns the card in Markdown; every number in it is from this run."""
  trained = (
    "Its weights were trained towards the original's answers at randomly drawn patch sizes, without labels."
    if "after" in scores
    else "Nothing was trained: kernel and position grid are resized, that is all."
  )
  return _TEXT.format(
    title=f"{facts['init'].rpartition('.')[0] or facts['init']}, flexified",
    init=facts["init"],
    how=trained,
    table=retention.table(scores),
    seqhw=size_text(plan.seqhw[len(plan.seqhw) // 2]),
    sizes=", ".join(str(size_text(size)) for size in plan.seqhw),
    side=plan.sides[0],
    facts="\n".join(f"- {name}: {value}" for name, value in facts.items()),
    kernel="x".join(map(str, student.patch_size)),
    grid="x".join(map(str, student.posemb_size)),
    n=scores["before"][0]["n"],
  )
