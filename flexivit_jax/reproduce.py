"""`flexivit reproduce`: what the paper shows, how to do it here, at what cost, and ours beside what is published."""

import argparse
import json
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from flexivit_jax import config, errors, plan, published

_I1K = "imagenet2012"
_SETS = (_I1K, "imagenet2012_real", "imagenet_v2", "imagenet_a", "imagenet_r", "imagenet_sketch")
_S_B_L = tuple(f"FlexiViT-{v} i1k" for v in "SBL")
_EVAL = "flexivit eval --config configs/i1k_sup.py --out RESULTS.json --checkpoint"


class Item(NamedTuple):
  """A figure or table of the paper.

  Attributes:
    title: what it shows.
    how: the commands; empty where the project cannot do it yet.
    configs: those whose training it needs, for the cost.
    data, weights: TFDS data sets, and names of published checkpoints that do in the place of training.
    published: of which numbers are known, a name for `published.read`; None: of none.
    differs: how the protocol here differs from that of the published numbers.
  """

  title: str
  how: tuple[str, ...] = ()
  configs: tuple[str, ...] = ()
  data: tuple[str, ...] = ()
  weights: tuple[str, ...] = ()
  published: str | None = None
  differs: str = ""


def _train(*configs: str) -> dict[str, Any]:
  how = tuple(f"flexivit train --config {c} --workdir RUN" for c in configs)
  return {"how": how, "configs": configs}


_LENGTHS = (90, 300, 600, 1200)

ITEMS: dict[str, Item] = {
  "fig1": Item(
    "one FlexiViT-L at two patch sizes",
    how=(f"{_EVAL} 'FlexiViT-L i1k' --seqhw 10,24",),
    data=(_I1K,),
    weights=("FlexiViT-L i1k",),
    published="fig1",
    differs="milliseconds are those of the machine at hand, the paper's of a TPU v3",
  ),
  "fig2": Item(
    "ImageNet-1k: accuracy against speed of S, B, L at four lengths and ten sizes (appendix, tables 1-4: other sets)",
    how=(
      f"{_EVAL} 'FlexiViT-S i1k' --seqhw all   # B, L; flexivit_s_i1k_90ep, _300ep, _600ep",
      "the other sets: docs/evaluation_sets.md",
    ),
    configs=tuple(
      f"configs/i1k_distill.py:variant={v},epochs={e}" for v in "SBL" for e in _LENGTHS
    ),
    data=_SETS,
    weights=_S_B_L,
    published="fig2",
    differs="milliseconds as in fig1; published accuracies are read off the figure",
  ),
  "timm": Item(
    "third party: the released checkpoints at patch 16 in timm's protocol, on six data sets",
    how=(f"{_EVAL} 'FlexiViT-S i1k' --seqhw 15",),
    data=_SETS,
    weights=_S_B_L,
    published="timm",
    differs="timm resizes bicubic, keeps the aspect, crops 0.95; the config's evaluation squashes to 272 and crops 240",
  ),
  "fig3": Item(
    "ImageNet-21k: fixed ViT-B/16 and B/30 are not flexible, FlexiViT-B is",
    **_train("configs/i21k_sup.py", "configs/i21k_sup.py:fixed=15", "configs/i21k_sup.py:fixed=8"),
    data=("imagenet21k",),
    weights=("FlexiViT-B i21k 300ep", "ViT-B/16 i21k", "ViT-B/30 i21k"),
    published="fig3",
    differs="sources disagree on whether the paper's baselines were resized plainly or by PI-resize",
  ),
  "fig4": Item(
    "a trained kernel under PI-resize and its competitors",
    how=("python tools/patch_curve.py CHECKPOINT DIR --out RUN",),
    data=(_I1K,),
  ),
  "bwconrad": Item(
    "third party: fixed ViTs at other patch sizes by PI-resize alone",
    how=("python tools/patch_curve.py CHECKPOINT DIR --out RUN",),
    data=(_I1K,),
    published="bwconrad",
  ),
  "fig5": Item(
    "distillation from ViT-B/8, from the teacher's weights or from random ones",
    **_train("configs/i21k_distill.py", "configs/i21k_distill.py:init=random"),
    data=("imagenet21k",),
  ),
  "fig6": Item(
    "representations at different patch sizes (CKA)",
    how=("python tools/representations.py CHECKPOINT --config configs/i1k_sup.py --out RUN",),
    data=(_I1K,),
    weights=("FlexiViT-B i1k",),
    differs="the paper embeds distances by t-SNE, we by classical scaling, which keeps them and has no random start",
  ),
  "fig7": Item(
    "transfer of FlexiViT-B, ViT-B/16 and ViT-B/30: classification (the other tasks are not in this project)",
    **_train(*(f"configs/transfer.py:data={d}" for d in ("oxford_iiit_pet", "food101", "cifar100", "sun397"))),
    data=("oxford_iiit_pet", "food101", "cifar100", "sun397"),
    weights=("FlexiViT-B i21k 300ep", "ViT-B/16 i21k", "ViT-B/30 i21k"),
  ),
  "fig8": Item(
    "cheap fine-tuning on an 8 x 8 grid, use at a finer one",
    **_train("configs/transfer.py:data=imagenet2012,fixed=8,res=240"),
    data=(_I1K,),
    weights=("FlexiViT-B i21k 300ep",),
    published="fig8",
  ),
  "fig9-12": Item("flexible transfer, LiT, CLIP, OWL-ViT"),
  "curriculum": Item(
    "faster pre-training by a curriculum of patch sizes",
    **_train("configs/i21k_sup.py:sizes=coarse_to_fine"),
    data=("imagenet21k",),
    differs="the paper's schedule is not published; ours goes from coarse to fine",
  ),
  "fig13": Item(
    "token similarity over patch sizes (attention relevance is not there yet)",
    how=(
      "python tools/token_similarity.py CHECKPOINT --config configs/i1k_sup.py --out RUN --seqhw 15 --with 5,10,30",
    ),
    data=(_I1K,),
    weights=("FlexiViT-B i1k",),
  ),
  "ensembles": Item(
    "ensembles of one FlexiViT over patch sizes, at equal compute",
    how=("python tools/sizes_together.py CHECKPOINT --config configs/i1k_sup.py --out RUN",),
    data=(_I1K,),
    weights=("FlexiViT-B i1k",),
  ),
  "fig17": Item(
    "sizes of the stored kernel and of the grid of positions",
    **_train("configs/i21k_distill.py:kernel=48,grid=15"),
    data=("imagenet21k",),
    differs="the values that the paper tried are not known",
  ),
  "fig19": Item("LiT of a fixed patch size keeps flexibility"),
  "fig25": Item("shape or texture, by patch size"),
  "fig30": Item(
    "patch sizes that were not trained",
    how=(f"{_EVAL} 'FlexiViT-B i1k' --seqhw 4,40,48",),
    data=(_I1K,),
    weights=("FlexiViT-B i1k",),
  ),
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
  """Lists the items, or shows one, beside results where there are some."""
  if args.item is None:
    print("\n".join(listing(costs=args.costs)))
  elif args.results is None:
    print("\n".join(about(args.item)))
  else:
    found = json.loads(_read(args.results))
    print("\n".join(compare(args.item, found, model=args.model, setting=args.setting)))


def listing(*, costs: bool = False) -> list[str]:
  """A line or two for each item; with `costs` the hours of training on a TPU v3-32 at 40 % of its peak."""
  lines = []
  for name, item in ITEMS.items():
    known = (
      f"{len(published.read(item.published))} numbers known"
      if item.published
      else "no numbers known"
    )
    lines.append(f"{name}: {item.title}; {known}")
    if not item.how:
      lines.append("    not in this project yet")
      continue
    needs = {"data": item.data, "checkpoints": item.weights, "training": item.configs}
    lines.append("    " + "; ".join(f"{k}: {', '.join(v)}" for k, v in needs.items() if v))
    if costs and item.configs:
      hours = [plan.costs(config.load(c, []))["hours"]["v3-32"]["training"] for c in item.configs]
      lines.append(f"    {sum(hours):.0f} h on a TPU v3-32 to train all {len(hours)}")
  return lines


def about(name: str) -> list[str]:
  """What an item needs, its commands, and the published numbers."""
  item = _item(name)
  lines = [
    f"{name}: {item.title}",
    *(f"  {command}" for command in item.how or ("not in this project yet",)),
  ]
  if item.differs:
    lines.append(f"  differs: {item.differs}")
  for value in published.read(item.published) if item.published else []:
    lines.append(f"  {_named(value)}: {_number(value)} [{value.kind}: {value.source}]")
  return lines


def compare(
  name: str, results: Mapping[str, Any], *, model: str | None = None, setting: str | None = None
) -> list[str]:
  """Ours beside the published numbers of the same metric and patch size.

  Args:
    name: of the item.
    results: an eval.json.
    model, setting: of the published numbers; only those that contain these words.

  Raises:
    UserError: an item without published numbers, or none that match.
  """
  item = _item(name)
  if item.published is None:
    raise errors.UserError(f"No numbers of {name} are known; see `flexivit reproduce --list`.")
  values = [
    v for v in published.read(item.published)
    if (model or "") in v.model and (setting or "") in v.setting
  ]  # fmt: skip
  ours = {(row["patch"], metric): value for row in results["rows"] for metric, value in row.items()}
  lines = []
  for value in values:
    metric = {"latency": "ms"}.get(value.metric, value.metric)
    if (value.patch, metric) in ours:
      got = ours[value.patch, metric] * (100 if value.unit == "%" else 1)
      lines.append(
        f"{_named(value)}: published {_number(value)}, ours {got:.4g}, {got - value.value:+.3g} [{value.kind}]"
      )
  if not lines:
    settings = sorted({f"{v.model} ({v.setting})" for v in published.read(item.published)})
    raise errors.UserError(
      f"No published number of {name} is of a patch size and metric in these results; known are {'; '.join(settings)}."
    )
  what = {k: results.get(k) for k in ("name", "dataset", "split", "step", "device")}
  about = "ours: {name} on {dataset} {split}, step {step}, {device}".format_map(what)
  return [about, *lines, *([f"differs: {item.differs}"] if item.differs else [])]


def _item(name: str) -> Item:
  if name not in ITEMS:
    raise errors.unknown("item of the paper", name, ITEMS)
  return ITEMS[name]


def _named(value: published.Value) -> str:
  return f"{value.model} ({value.setting}), {value.dataset}, {value.metric} at patch {value.patch}"


def _number(value: published.Value) -> str:
  error = "" if value.error is None else f" +- {value.error:g}"
  return f"{value.value:g}{error} {value.unit}"


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read ({e.strerror}); give an eval.json.") from e
