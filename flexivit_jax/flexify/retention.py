"""Retention at each patch size: agreement with the original model, and accuracy if there are labels.

Of a model without classes: the cosine to the original's embeddings, and the nearest neighbours in common.
"""

from jax.sharding import Mesh

from flexivit_jax import experiment
from flexivit_jax.devices import sharding
from flexivit_jax.flexify import recipe
from flexivit_jax.models import FlexiViT
from flexivit_jax.objectives.distill import Teacher
from flexivit_jax.sizes import Size, size_args, size_text
from flexivit_jax.trees import Json, Params

Rows = list[Json]


def measure(plan: recipe.FlexifyRecipe, model: FlexiViT, params: Params, mesh: Mesh) -> Rows:
  """Returns a row for each size: seqhw, patch, n, and agree1, agree5, kl, ..., top1 if there are labels; or without
  classes cosine, cosine_p5, neighbours, and zero_shot if there are names.
  """
  params = sharding.replicate(params, mesh)
  scores = _evaluation(plan, recipe.evaluation(plan)).make(model, mesh).run(params)
  side = plan.sides[0]
  patches = (model.grid((side, side), **size_args(size)).patch_hw for size in plan.seqhw)
  return [{"patch": patch_text(p), **row} for p, row in zip(patches, scores, strict=True)]


def patch_text(patch: Size) -> int | str:
  """Returns pixels of a patch, one number where it is square."""
  return patch[0] if patch[0] == patch[1] else size_text(patch)


def original(plan: recipe.FlexifyRecipe, teacher: Teacher, mesh: Mesh) -> Json:
  """Returns the original's native size, and its accuracy there if there are labels."""
  native, (patch, _) = plan.sides[1], teacher.model.patch_size
  native_size = {"image_size": native, "patch": patch}
  if not plan.labelled:
    return native_size
  section = dict(
    data=plan.sources["test"],
    pp=recipe.labelled(plan, native),
    batch_size=plan.batch_size,
    seqhw=(native // patch,),
    **plan.skipping,
  )
  params = sharding.replicate(teacher.params, mesh)
  (row,) = _evaluation(plan, section).make(teacher.model, mesh).run(params)
  return native_size | {"top1": row["top1"], "top5": row["top5"], "n": row["n"]}


def _evaluation(plan: recipe.FlexifyRecipe, section: Json) -> experiment.Evaluation:
  return experiment.build_evaluation("", section, every=1, classes=(plan.classes,))


def table(scores: Json) -> str:
  """Returns a Markdown table: before and after at each size, in percent; cosines as they are."""
  stages = [stage for stage in ("before", "after") if stage in scores]
  metrics = [(key, name) for key, name in _COLUMNS.items() if key in scores["before"][0]]
  columns = [(stage, key, f"{name} {stage}") for key, name in metrics for stage in stages]
  head = "| patch | grid | " + " | ".join(title for _, _, title in columns) + " |"
  lines = [head, "|---" * (2 + len(columns)) + "|"]
  for i, row in enumerate(scores["before"]):
    cells = [_cell(key, scores[stage][i][key]) for stage, key, _ in columns]
    lines.append(f"| {row['patch']} | {_grid(row['seqhw'])} | " + " | ".join(cells) + " |")
  return "\n".join([*lines, "", summary(scores)])


_COLUMNS = {
  "agree1": "agreement",
  "top1": "top-1",
  "cosine": "cosine",
  "cosine_p5": "5th percentile",
  "neighbours": "neighbours",
  "zero_shot": "same name",
  "kept": "boxes kept",
  "extra": "boxes added",
}


def _cell(key: str, value: float) -> str:
  return f"{value:.3f}" if key.startswith("cosine") else f"{100 * value:.1f}"


def _grid(seqhw: int | str) -> str:
  return seqhw if isinstance(seqhw, str) else f"{seqhw}x{seqhw}"


def summary(scores: Json) -> str:
  """Returns sentences about the images and the original model behind the numbers."""
  first, row = scores["original"], scores["before"][0]
  if "kept" in row:
    return (
      f"Percent of the {row['boxes']} boxes that the original (patch {first['patch']} at {first['image_size']} px)"
      f" finds in {row['n']} images that were not trained on; added: percent of the model's boxes that the original"
      " does not have."
    )
  text = "Percent of" if "agree1" in row else "Cosine to the original's embedding, and"
  text += (
    ""
    if "agree1" in row
    else (f" percent of the {recipe.NEIGHBOURS} nearest neighbours that are the original's too, of")
  )
  text += f" {row['n']} images that were not trained on. The original"
  text += f" is of patch {first['patch']} at {first['image_size']} px"
  text += f", top-1 {100 * first['top1']:.1f}." if "top1" in first else "."
  return f"{text} {scores['note']}" if "note" in scores else text
