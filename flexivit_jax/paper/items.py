"""What the paper shows, figure by figure: how to do it here, with what, and which checkpoints show it as they are."""

from typing import Any, NamedTuple

from flexivit_jax import errors, weights
from flexivit_jax.paper import test_sets


class Subject(NamedTuple):
  """Whose published numbers a checkpoint should have: `model` and `setting` of `published.Value`.

  `variant` is what a file must hold, with a head of 1000 classes, where no published checkpoint says that.
  """

  model: str
  setting: str
  variant: str = ""


class PaperEvaluation(NamedTuple):
  """How an item is measured on checkpoints that are there, without training.

  Attributes:
    subjects: by published name (`flexivit inspect --list`), or by a name for what a user has to bring.
    sets: names of `imagenet_sets.SETS`.
    seqhw: grids.
    protocol: a name of `imagenet_sets.PROTOCOLS`.
  """

  subjects: dict[str, Subject]
  sets: tuple[str, ...] = ("val",)
  seqhw: tuple[int, ...] = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
  protocol: str = "paper"


class Work(NamedTuple):
  """What a command computes beside training: images through a variant at each grid, forward so many times."""

  variant: str
  images: int
  seqhw: tuple[int, ...] = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
  passes: int = 1
  size: int = 240
  num_classes: int = 1000


class Item(NamedTuple):
  """A figure or table of the paper.

  Attributes:
    title: what it shows.
    how: the commands, besides that of `evaluation`; both empty where the project cannot do it.
    configs: those whose training it needs, for the cost.
    data: TFDS data sets of `how`.
    weights: published checkpoints that `how` takes in the place of training.
    given: what else `how` takes, that is neither fetched nor prepared by TFDS.
    work: what `how` computes beside the training of `configs`, for the cost.
    published: of which numbers are known, names for `published.read`.
    differs: how the protocol here differs from that of the published numbers.
    evaluation: what `flexivit reproduce ITEM --data_dir DIR --out OUT` measures; None: `how` is all.
  """

  title: str
  how: tuple[str, ...] = ()
  configs: tuple[str, ...] = ()
  data: tuple[str, ...] = ()
  weights: tuple[str, ...] = ()
  given: tuple[str, ...] = ()
  work: tuple[Work, ...] = ()
  published: tuple[str, ...] = ()
  differs: str = ""
  evaluation: PaperEvaluation | None = None


def fields_of(
  name: str, subject: Subject, posemb_size: tuple[int, int] | None = None
) -> dict[str, Any]:
  """The fields of the model that goes by this name.

  Of a published one without the stored kernel's size, which is another in the configs that train it here; and without
  the grid of positions where `posemb_size` is that of timm's files, which hold it resized.
  """
  if name not in weights.PUBLISHED:
    return dict(variant=subject.variant, num_classes=1000)
  other = {"patch_size"} | ({"posemb_size"} if posemb_size == _TIMM_GRID else set())
  return {k: v for k, v in weights.PUBLISHED[name].expected.items() if k not in other}


def find(name: str) -> Item:
  """The item of a name; a UserError that lists all for another."""
  if name not in ITEMS:
    raise errors.unknown("item of the paper", name, ITEMS)
  return ITEMS[name]


def data_of(item: Item) -> list[str]:
  """The TFDS data sets that an item needs in all."""
  sets = item.evaluation.sets if item.evaluation else ()
  return list(dict.fromkeys([*item.data, *(test_sets.SETS[s].data["name"] for s in sets)]))


def weights_of(item: Item) -> list[str]:
  """The checkpoints that an item needs in all."""
  return list(
    dict.fromkeys([*item.weights, *(item.evaluation.subjects if item.evaluation else ())])
  )


def _train(*configs: str, then: tuple[str, ...] = ()) -> dict[str, Any]:
  how = tuple(f"flexivit train --config {c} --workdir RUN" for c in configs)
  return {"how": how + then, "configs": configs}


def _tools(**given: str) -> dict[str, Any]:
  """Analyses of tools/ with what follows in the command line."""
  start = "python tools/paper/{}.py CHECKPOINT --config configs/i1k_sup.py --out RUN{}"
  how = tuple(start.format(name, rest) for name, rest in given.items())
  return {"how": how, "data": ("imagenet2012",), "weights": ("FlexiViT-B i1k",)}


def _released(*epochs: int) -> dict[str, Subject]:
  """S, B and L of ImageNet-1k; those of 1200 epochs have no suffix."""
  return {
    f"FlexiViT-{v} i1k" if e == 1200 else f"flexivit_{v.lower()}_i1k_{e}ep": Subject(
      f"FlexiViT-{v}", f"i1k, {e} epochs"
    )
    for v in "SBL"
    for e in epochs
  }


_TIMM_GRID = (15, 15)  # of 240 pixels at patch 16
_LENGTHS = (1200, 600, 300, 90)
_SETS = ("val", "v2", "a", "r", "sketch", "real")
_B8 = "the AugReg ViT-B/8 of ImageNet-21k, the teacher: teacher=FILE (configs/i21k_distill.py)"
_FOLDERS = "ImageNet in folders: DIR/val/CLASS/*.jpg"
# Data sets that TFDS does not have, and where it is said how to prepare them for it.
OWN_DATA = {"imagenet21k": "configs/i21k_sup.py"}
_PI = "AugReg, PI-resized, 224 px"
_MS = "milliseconds are those of the machine at hand, the paper's of a TPU v3"

ITEMS: dict[str, Item] = {
  "fig1": Item(
    "one FlexiViT-L at two patch sizes",
    published=("fig1",),
    differs=_MS,
    evaluation=PaperEvaluation(
      {"FlexiViT-L i1k": Subject("FlexiViT-L", "i1k")}, seqhw=(10, 24)
    ),
  ),
  "fig2": Item(
    "ImageNet-1k: accuracy against speed of S, B, L at four lengths and ten sizes",
    **_train(
      *(f"configs/i1k_distill.py:variant={v},epochs={e}" for v in "SBL" for e in _LENGTHS),
      then=("flexivit report OUT/*/val.json --out OUT",),  # the Pareto fronts, by compute and by time
    ),
    data=("imagenet2012",),
    given=("DeiT-III S, B, L of 384 pixels, the teachers: teacher=FILE (configs/i1k_distill.py)",),
    published=("fig2",),
    differs=f"{_MS}; published accuracies are read off the figure",
    evaluation=PaperEvaluation(_released(*_LENGTHS)),
  ),
  "table-i1k": Item(
    "the same on v2, A, R and ReaL, as tables 1-4 of the appendix, which are not known to us; and on Sketch",
    published=("fig2", "timm"),
    differs=f"{_MS}; numbers on other sets are timm's, at patch 16 in its protocol: `--protocol timm` is that one",
    evaluation=PaperEvaluation(_released(*_LENGTHS), _SETS),
  ),
  "timm": Item(
    "third party: the released checkpoints at patch 16 in timm's protocol, on six data sets",
    published=("timm",),
    evaluation=PaperEvaluation(_released(1200, 600, 300), _SETS, (15,), "timm"),
  ),
  "fig3": Item(
    "ImageNet-21k: fixed ViT-B/16 and B/30 are not flexible, FlexiViT-B is",
    **_train("configs/i21k_sup.py", "configs/i21k_sup.py:fixed=15", "configs/i21k_sup.py:fixed=8"),
    published=("fig3",),
    differs="sources disagree on whether the paper's baselines were resized plainly or by PI-resize (as here)",
    evaluation=PaperEvaluation(
      {
        "FlexiViT-B i21k 300ep": Subject("FlexiViT-B", "i21k"),
        "ViT-B/16 i21k": Subject("ViT-B/16", "i21k"),
        "ViT-B/30 i21k": Subject("ViT-B/30", "i21k"),
      },
      ("i21k",),
      protocol="paper_i21k",
    ),
  ),
  "fig4": Item(
    "a trained kernel under PI-resize and its competitors",
    how=(
      "python tools/paper/patch_curve.py CHECKPOINT DIR --grid 28 --patches 4,6,8,12,16,24 --out RUN"
      " --ways pi_paper,plain_paper,area_paper,norm_paper",
    ),
    given=("a ViT-B/8 of ImageNet-1k: CHECKPOINT", _FOLDERS),
    work=(Work("B", 50_000, (28,), passes=24, size=224),),  # four ways at six patch sizes, each of 28 x 28 tokens
    differs="which weights, sizes and formulas of the heuristics the paper takes is not known to us",
  ),
  "bwconrad": Item(
    "third party: fixed ViTs at other patch sizes by PI-resize alone; and the introduction's ViT-B/8 and B/32",
    how=(
      "python tools/paper/patch_curve.py CHECKPOINT DIR --out RUN --ways pi_timm --image_size 448 --seqhw 14",
      "flexivit reproduce bwconrad --results RUN/pi_timm/eval.json --model ViT-B/16 --setting '448 px'",
    ),
    given=(_FOLDERS,),
    work=(Work("B", 50_000, (14,), size=448),),
    published=("bwconrad", "intro"),
    differs="of the published patch sizes those that divide 224 pixels: 8, 14, 16, 28 and 32; kernel and image resized"
    " together, to 56, 112, 448 and 896 pixels, as the commands do; the table's ViT-B/32 has 83.30 % at patch 32,"
    " timm's of 224 pixels 80.73 % by timm, so its file or size may be another; what the introduction's are is"
    " not known to us",
    evaluation=PaperEvaluation(
      {f"ViT-{v}/16": Subject(f"ViT-{v}/16", _PI, f"{'Ti' if v == 'T' else v}/16") for v in "TSB"}
      | {"ViT-B/32": Subject("ViT-B/32", _PI, "B/32")}
      | {f"ViT-B/{p} (introduction)": Subject(f"ViT-B/{p}", "224 px", f"B/{p}") for p in (8, 32)},
      seqhw=(7, 8, 14, 16, 28),
      protocol="bwconrad",
    ),
  ),
  "fig5": Item(
    "distillation from ViT-B/8, from the teacher's weights or from random ones",
    **_train("configs/i21k_distill.py", "configs/i21k_distill.py:init=random"),
    data=("imagenet21k",),
    given=(_B8,),
  ),
  "fig6": Item(
    "representations at different patch sizes (CKA)",
    **_tools(representations=""),
    work=(Work("B", 1024),),
    differs="the paper embeds distances by t-SNE, we by classical scaling, which keeps them and has no random start",
  ),
  "fig7": Item(
    "transfer of FlexiViT-B, ViT-B/16 and B/30 at patches 16 and 30: classification, no other task is in this project",
    **_train(
      "configs/transfer.py:data=sun397,res=240,fixed=15",
      "configs/transfer.py:data=sun397,res=240,fixed=15,init=vit_b16_i21k_300ep",
      "configs/transfer.py:data=sun397,res=240,fixed=8",
      "configs/transfer.py:data=sun397,res=240,fixed=8,init=vit_b30_i21k_300ep",
    ),
    data=("sun397",),
    differs="SUN397 is the one data set for classification that a source names; the paper's resolution and"
    " hyper-parameters are not known to us (of 240 pixels both patch sizes are divisors)",
    weights=("FlexiViT-B i21k 300ep", "ViT-B/16 i21k", "ViT-B/30 i21k"),
    published=("fig7",),
  ),
  "fig8": Item(
    "cheap fine-tuning on an 8 x 8 grid, use at a finer one",
    **_train(
      "configs/transfer.py:data=imagenet2012,fixed=8,res=240",
      "configs/transfer.py:data=imagenet2012,fixed=8,res=240,init=vit_b30_i21k_300ep",
      "configs/transfer.py:data=imagenet2012,fixed=15,res=240",
      "configs/transfer.py:data=imagenet2012,fixed=30,res=240",
    ),
    weights=("FlexiViT-B i21k 300ep", "ViT-B/30 i21k"),
    published=("fig8",),
    differs="the paper's resolution and hyper-parameters are not known to us",
    evaluation=PaperEvaluation(
      {
        "fine-tuned": Subject(
          "FlexiViT-B", "i21k, fine-tuned on an 8x8 grid", "B"
        )
      },
      seqhw=(8, 24),
    ),
  ),
  "fig9-12": Item(
    "other training made flexible: fine-tuned classifiers; LiT, CLIP: docs/image_text.md; OWL-ViT not in this project",
    **_train("configs/transfer.py:data=sun397"),
    data=("sun397",),
    weights=("FlexiViT-B i21k 300ep",),
    published=("fig9-12",),
    differs="which classifiers the paper makes flexible so, and how, is not known to us",
  ),
  "curriculum": Item(
    "faster pre-training by a curriculum of patch sizes",
    **_train("configs/i21k_sup.py:sizes=coarse_to_fine,finest=15,epochs=205", "configs/i21k_sup.py:fixed=15"),
    data=("imagenet21k",),
    published=("curriculum",),
    differs="the paper's schedule is not published; ours goes from patch 48 to 16, equally long at each, and has as"
    " many FLOPs as the plain ViT-B/16 beside it",
  ),
  "fig13": Item(
    "attention relevance (top) and token similarity (bottom) over patch sizes",
    **_tools(relevance=" --seqhw 5,10,15,30", token_similarity=" --seqhw 15 --with 5,10,30"),
    work=(Work("B", 512, (5, 10, 15, 30), passes=3), Work("B", 512, (5, 10, 15, 30))),  # 3: with gradients
  ),
  "ensembles": Item(
    "ensembles of one FlexiViT over patch sizes, at equal compute",
    **_tools(sizes_together=""),
    work=(Work("B", 50_000),),
  ),
  "fig17": Item(
    "sizes of the stored kernel and of the grid of positions",
    **_train("configs/i21k_distill.py:kernel=48,grid=15"),
    data=("imagenet21k",),
    given=(_B8,),
    differs="the values that the paper tried are not known",
  ),
  "fig19": Item("LiT of a fixed patch size keeps flexibility"),
  "fig25": Item(
    "shape or texture, by patch size",
    how=("python tools/paper/shape_texture.py 'FlexiViT-B i1k' IMAGES --out RUN",),
    weights=("FlexiViT-B i1k",),
    given=("the cue conflicts of Geirhos et al.: IMAGES (tools/paper/shape_texture.py)",),
    work=(Work("B", 1280, (5, 8, 15, 30)),),
    differs="IMAGES are those of Geirhos et al., see the tool; how the paper prepares them is not known to us",
  ),
  "fig30": Item(
    "patch sizes that were not trained",
    evaluation=PaperEvaluation(
      {"FlexiViT-B i1k": Subject("FlexiViT-B", "i1k, 1200 epochs")}, seqhw=(3, 4, 40, 48)
    ),
  ),
}  # fmt: skip
