"""`flexivit demo`: a page on which one moves the patch size and sees what the model says of a photo."""

import argparse
import functools
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.demo.kinds import Photo
  from flexivit_jax.inference import texts
  from flexivit_jax.inference.predictor import Loaded

HELP = "a page with a slider for the patch size, as a file; `flexivit serve --demo` for photos of your own"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The model, the photos, the folder of the page."""
  p.add_argument("checkpoint", type=options.path, help=options.WEIGHTS)
  p.add_argument(
    "--static", required=True, type=options.path, metavar="OUT", help="the folder of the page"
  )
  p.add_argument(
    "--images", nargs="+", help="photos, folders (default: images of the run's own evaluation)"
  )
  p.add_argument("--number", type=int, default=8, help="at most so many photos (default 8)")
  p.add_argument("--seqhw", default="all", help="e.g. 5,8,15 ('all': those of the training)")
  p.add_argument("--image_size", type=int, help="pixels a side, for weights that do not say")
  p.add_argument(
    "--names", help="what two towers, or a detector, look for: 'cat,dog', or a file with one a line"
  )
  p.add_argument("--templates", help="sentences for the names, see `flexivit predict`")
  p.add_argument(
    "--vectors", type=options.path, help="vectors of the names, of a detector without a text tower"
  )
  p.add_argument(
    "--onnxruntime_web",
    type=options.path,
    metavar="FOLDER",
    help="the unpacked npm package: the page then answers to photos of one's own, in the browser alone",
  )
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Writes OUT/index.html, which needs no server and loads nothing."""
  from flexivit_jax import weights
  from flexivit_jax.budget import profile as profiles
  from flexivit_jax.demo import content, in_browser
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import budgets, predictor

  if args.number < 1:
    raise errors.UserError(f"--number={args.number}; expected 1 or more.")
  compilation.keep_programs()
  loaded = predictor.load(
    args.checkpoint, args.image_size, texts=bool(args.names), whole=True, **options.loading(args)
  )
  loaded, among = _asked(args, loaded)
  weights.print_notes(loaded.record)
  sizes = predictor.sizes_of(args.seqhw, loaded)
  photos = _files(args, loaded) if args.images else _of_run(args, loaded)
  height, width, channels = photos[0].image.shape
  digest = weights.towers.digest(loaded.model, loaded.params)
  measured = profiles.path_of(args.checkpoint, digest)
  profile = None
  if profiles.read(measured):
    profile = budgets.of(args.checkpoint, digest)
  name = pathlib.Path(args.checkpoint).name
  said = content.about(loaded.model, name, (height, width, channels), sizes, profile)
  if args.onnxruntime_web is not None:
    in_browser.check(
      args.onnxruntime_web, args.static, "texts" if among else said["kind"], channels
    )
    said["own"] = in_browser.add(args.static, loaded, sizes, args.onnxruntime_web)
  said["photos"] = content.answers(loaded, photos, sizes, among)
  print(f"wrote {content.write(args.static, said)}: {len(photos)} photos at {len(sizes)} sizes")


def _asked(args: argparse.Namespace, loaded: "Loaded") -> "tuple[Loaded, texts.Names | None]":
  """The model with what it is to look for, and the classes of two towers."""
  from flexivit_jax.inference import predictions, predictor, queries, texts

  names = options.listed_names(args.names)
  if predictor.gives_boxes(loaded.model):
    return queries.closed(loaded, queries.Asked(names, args.templates, args.vectors)), None
  if args.vectors:
    raise errors.UserError(
      f"--vectors={args.vectors} is for detectors; {args.checkpoint} gives no boxes."
    )
  if predictor.gives_masks(loaded.model):
    if names:
      raise errors.UserError(
        f"{args.checkpoint} is a segmentation model, which knows its own classes; leave --names out."
      )
    return loaded, None
  if names:
    return loaded, texts.of_names(loaded, names, args.templates or "name")
  predictions.check_classes(loaded)
  return loaded, None


def _files(args: argparse.Namespace, loaded: "Loaded") -> "list[Photo]":
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.demo.kinds import Photo
  from flexivit_jax.inference import outputs, predictor, whole_images

  inputs = find_images(args.images, outputs.note)[: args.number]
  photos = []
  for path, image in predictor.prepared(inputs, loaded.prepare, args.number):
    if isinstance(image, str):
      raise errors.UserError(f"{path}: {image}.")
    whole = predictor.gives_masks(loaded.model) or predictor.gives_boxes(loaded.model)
    origin = whole_images.origin(loaded.pp, path) if whole else None
    photos.append(Photo(pathlib.Path(path).name, image, origin=origin))
  if len({photo.image.shape for photo in photos}) > 1:
    raise errors.UserError(
      "The photos are prepared to several shapes, and the page shows one; give photos of one shape, or a model that"
      " resizes to one."
    )
  return photos


def _of_run(args: argparse.Namespace, loaded: "Loaded") -> "list[Photo]":
  """The first image of each class in the run's evaluation; of masks and boxes the first ones."""
  from flexivit_jax import experiment
  from flexivit_jax.data import class_names
  from flexivit_jax.demo import kinds
  from flexivit_jax.demo.kinds import Photo
  from flexivit_jax.devices import sharding
  from flexivit_jax.evaluators import results

  own = pathlib.Path(args.checkpoint, "config.json")
  evals = json.loads(own.read_text()).get("evals", {}) if own.is_file() else {}
  name = results.main_of(evals)
  if name is None:
    raise errors.UserError(f"{args.checkpoint} has no evaluation to take images of; give --images.")
  build = functools.partial(experiment.build_evaluation, f"evals.{name}", evals[name], every=1)
  if kinds.name_of(loaded.model) != "classes":
    return _first_of(build().batches(), args.number)
  classes = class_names.known_of(loaded.record, loaded.model.num_classes, "the checkpoint")
  evaluation = build(classes=classes)
  evaluator = evaluation.make(loaded.model, sharding.make_mesh())
  photos: list[Photo] = []
  names = evaluation.source.class_names
  seen: set[int] = set()
  for batch in evaluator.batches:  # type: ignore[attr-defined]  # of every PerSize
    for image, labels, counts in zip(batch["image"], batch["labels"], batch["_mask"], strict=True):
      label = int(labels.argmax())
      if counts and label not in seen:
        seen.add(label)
        truth = names[label] if names else str(label)
        photos.append(Photo(f"image {len(photos) + 1} of the evaluation", image, truth))
      if len(photos) == args.number:
        return photos
  return photos


def _first_of(batches: Iterable[Mapping[str, Any]], number: int) -> "list[Photo]":
  """The first images of an evaluation that have the shape of its first one."""
  from flexivit_jax.demo.kinds import Photo

  photos: list[Photo] = []
  for batch in batches:
    for image, counts in zip(batch["image"], batch["_mask"], strict=True):
      if counts and (not photos or image.shape == photos[0].image.shape):
        photos.append(Photo(f"image {len(photos) + 1} of the evaluation", image))
      if len(photos) == number:
        return photos
  return photos
