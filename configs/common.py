"""What several configs share: names, preprocessing strings, evaluation sets, the debug form. No config by itself.

Functions of plain values, each a few lines, so that a config stays one page and says all else itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from flexivit_jax import config

# Every how often a debug form evaluates and saves: twice in four steps of two epochs.
_EVERY = dict(every_steps=2, every_epochs=1, every_percent=0.5)


def name(image_size: int, fixed: int, variant: str = "") -> str:
  """Returns the name of a run: "FlexiViT-B", or "ViT-B, patch 16 only" of `fixed` tokens a side."""
  suffix = f"-{variant}" if variant else ""
  return f"ViT{suffix}, patch {image_size // fixed} only" if fixed else f"FlexiViT{suffix}"


def data_dir() -> ml_collections.FieldReference:
  """Returns a `data_dir` for all data sets of a config: None, TFDS's own folder, until an override sets it."""
  return ml_collections.config_dict.placeholder(str)


def labelled(num_classes: int | str) -> str:
  """Returns the end of a classifier's preprocessing: pixels in [-1, 1], labels as one-hot; "" counts the classes."""
  return f"value_range(-1, 1)|onehot({num_classes})|keep('image', 'labels')"


def two_images(resize: str, num_classes: int = 0) -> str:
  """Returns the end of preprocessing for a teacher with an image of its own, `teacher_image`, and without labels.

  Args:
    resize: the operations on the teacher's image, each with `key='teacher_image'`.
    num_classes: adds labels of so many classes as one-hot; 0 adds none.
  """
  values = f"value_range(-1, 1)|{resize}|value_range(-1, 1, key='teacher_image')"
  if num_classes:
    return f"{values}|onehot({num_classes})|keep('image', 'teacher_image', 'labels')"
  return f"{values}|keep('image', 'teacher_image')"


FLEXIVIT_B = "flexivit_b_i21k_300ep"  # of ImageNet-21k, as published: fetched once

# Needs no file; its tokens PAD and END have the numbers 0 and 1, as those of `flexivit tokenizer` have.
BYTES = dict(path="bytes", pad="[PAD]", end="[END]")


def captioned(name: str, data_dir: str) -> dict[str, Any]:
  """Returns the section of a data set of images with captions, but for its split.

  Args:
    name: "coco_captions", by TFDS, whose splits are Karpathy's; or "captions", a folder with metadata for each split.
    data_dir: where it is; "" is TFDS's own folder.
  """
  where = ml_collections.config_dict.placeholder(str)
  where.set(data_dir or None)
  known = {"coco_captions": dict(captions_key="captions"), "captions": {}}
  return dict(name=name, data_dir=where, **config.choose("data", name, known))


def pairs(tokenizer: Mapping[str, Any], length: int, captions: int = 7) -> tuple[str, str]:
  """Returns the ends of preprocessing: for training with one caption of an image, for retrieval with all of them.

  Args:
    tokenizer: `path`, `pad` and `end` of the operation `tokenize`.
    length: tokens of a text.
    captions: at most, of an image; COCO has up to seven.
  """
  options = ", ".join(f"{key}={value!r}" for key, value in {**tokenizer, "length": length}.items())
  one = f"random_caption|tokenize({options})|keep('image', 'tokens')"
  every = f"tokenize_all({options}, captions={captions})|keep('image', 'texts', 'texts_mask')"
  return f"value_range(-1, 1)|{one}", f"value_range(-1, 1)|{every}"


def retrieval(
  data: Mapping[str, Any], pixels: int, texts: str, seqhw: Sequence[int], **every: float
) -> dict[str, dict[str, Any]]:
  """Returns the evaluation of two towers: recall both ways on the split "test", images squashed to a square.

  Args:
    data: see `captioned`.
    pixels: of an image, a side.
    texts: the end of preprocessing, the second of `pairs`.
    seqhw: sizes.
    **every: how often, e.g. `every_steps=1000`.
  """
  pp = f"decode|resize({pixels})|{texts}"
  section = dict(type="retrieval", pp=pp, batch_size=256, seqhw=tuple(seqhw), **every)
  return {"test": dict(section, data={**data, "split": "test"})}


def tokens(pixels: int, patches: Sequence[int]) -> dict[int, int]:
  """Returns patch size in pixels -> tokens a side of a square; where they do not divide it, the Segmenter pads."""
  return {patch: -(-pixels // patch) for patch in patches}


def drawn(fixed: int, sizes: Mapping[int, int]) -> tuple[int, ...]:
  """Returns the tokens a side of all sizes, or of the patch size `fixed` alone; 0 is none."""
  one = {str(patch): (n,) for patch, n in sizes.items()}
  return config.choose("fixed", str(fixed), one) if fixed else tuple(sizes.values())


def segmenter(init: str, decoder: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the sections `model` and `init` of a Segmenter whose backbone starts from a file, or from nothing ("").

  Args:
    init: what `flexivit inspect` reads; the published FlexiViT-B is planned without its file.
    decoder: "linear" or "mask".
  """
  backbone: dict[str, Any] = dict(like=init)
  if init == FLEXIVIT_B:
    backbone = dict(variant="B", pool_type="tok", patch_size=(32, 32), posemb_size=(7, 7))
  elif not init:
    backbone = dict(variant="S", pool_type="gap")
  config.choose("decoder", decoder, ("linear", "mask"))
  model = dict(name="segmenter", backbone=dict(backbone, stochastic_depth=0.1), decoder=decoder)
  start = dict(backbone=dict(checkpoint=init, new_head=True)) if init else None
  return model, start


def detector(init: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
  """Returns the sections `model` and `init` of an OWL-ViT with learned queries; see `segmenter`.

  Args:
    init: what `flexivit inspect` reads, of a model with a class token; "": the backbone begins from nothing.
  """
  backbone: dict[str, Any] = dict(like=init) if init else dict(variant="S", pool_type="tok")
  model = dict(name="owl_vit", backbone=dict(backbone, stochastic_depth=0.1), embed_dim=256)
  return model, dict(backbone=dict(checkpoint=init, new_head=True)) if init else None


def polynomial(lr: float) -> dict[str, Any]:
  """Returns Segmenter's section `optim`: SGD without weight decay, (1 - progress) ** 0.9 down to 1e-5."""
  schedule = dict(decay_type="polynomial", power=0.9, polynomial_end=1e-5 / lr)
  return dict(name="momentum", lr=lr, b1=0.9, mu_dtype="float32", schedule=schedule)


def evals(
  data: Mapping[str, Any], splits: Mapping[str, str], **common: Any
) -> dict[str, dict[str, Any]]:
  """Returns evaluations of the splits of one data set, {name: section}, which are equal but for that."""
  return {name: dict(common, data={**data, "split": split}) for name, split in splits.items()}


def imagenet_evals(data: Mapping[str, Any], pp: str, **common: Any) -> dict[str, dict[str, Any]]:
  """Returns evaluations on ImageNet's test sets, {name: section}: each with its labels and the classes that compete.

  Args:
    data: the arguments of ImageNet's data source but `split`; TFDS has the other sets in the same folder.
    pp: preprocessing of the image; what makes labels of each set is added.
    **common: keys of all sections.
  """
  sets = dict(  # [BV], sketch [ours]
    test="imagenet2012:validation", train="imagenet2012:train[:2%]", val="imagenet2012:train[99%:]",
    v2="imagenet_v2/matched-frequency:test", a="imagenet_a:test", r="imagenet_r:test",
    real="imagenet2012_real:validation", sketch="imagenet_sketch:test",
  )  # fmt: skip
  sections = {}
  for key, text in sets.items():
    name, split = text.split(":", 1)
    labels = "multihot" if key == "real" else "onehot"
    full = f"{pp}|{labels}(1000)|keep('image', 'labels')"
    sections[key] = dict(data={**data, "name": name, "split": split}, pp=full, **common)
  sections["a"]["label_map"], sections["r"]["label_map"] = "i1k_a", "i1k_r"
  sections["real"]["skip_unlabelled"] = True
  sections["real"]["data"]["label_key"] = "real_label"
  return sections


def debug(
  c: ml_collections.ConfigDict, *, image_size: int | tuple[int, int], num_classes: int
) -> None:
  """Changes a config to its debug form: four steps on synthetic images of the same shapes. Do all parts work together?

  Batches of 8 of 16 images, two evaluations, two checkpoints, the smallest variant or one block, no files of weights.

  Args:
    c: the complete config; what it names of teachers' and initial weights is the caller's to take out.
    image_size: pixels of a synthetic image, a side or (h, w).
    num_classes: of the labels.

  A model of parts gets synthetic captions and masks; the caller gives two towers `BYTES`.
  """
  data = dict(name="synthetic", image_size=image_size, num_classes=num_classes, num_examples=20)
  c.input.data, c.input.batch_size = data | dict(split="train[:16]"), 8
  for section in c.evals.values():
    section.data, section.batch_size = data | dict(split="test"), 8
  for section in (*c.evals.values(), c.checkpoint):
    section.update({key: every for key, every in _EVERY.items() if key in section})
  parts = [c.model[name] for name in ("image", "text", "backbone") if name in c.model]
  for model in parts or [c.model]:
    if "like" in model:  # without the file
      del model.like
      model.variant = "mu"
    model.update(dict(variant="mu") if "variant" in model else dict(depth=1))
  if parts:
    c.input.data.annotated = True
    for section in c.evals.values():
      section.data.annotated = True
  if "accumulate" in c:
    del c.accumulate  # with one number of microbatches, a size is compiled while the next is traced
  if "warmup_steps" in c.optim.schedule:
    c.optim.schedule.warmup_steps = 1
  if c.get("total_steps"):
    c.total_steps = 4
  else:
    c.total_epochs = 2
  if c.get("total_flops"):
    c.total_flops = None
