"""`flexivit predict`: classes of images, the class of each pixel, or boxes of objects, at chosen patch sizes."""

import argparse
import contextlib
import functools
import sys
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.budget.cascade import Cascade
  from flexivit_jax.inference import picture_files, predictor

HELP = "classify images or their pixels, or find objects, at a chosen patch size, also by names of your own"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The images, the model, the form of the answers."""
  options.add_images(p)
  p.add_argument(
    "--out",
    type=options.path,
    help="a .csv or .jsonl file to write the answers to, not to stdout; of a segmentation model a .png, or a folder",
  )
  p.add_argument(
    "--overlay",
    type=options.path,
    help="of a segmentation model or a detector, the image with its classes or boxes: an image file or a folder",
  )
  p.add_argument(
    "--patch",
    help="pixels a side of a patch in the place of --seqhw, e.g. 16 or 8,16x12; of a segmentation model or a detector",
  )
  p.add_argument(
    "--cascade",
    type=options.path,
    metavar="FILE",
    help="in the place of --seqhw: coarse sizes first, finer ones where they are unsure, by `flexivit cascade`",
  )
  p.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
  p.add_argument(
    "--top_k",
    type=int,
    help="most likely classes (default 5); of a detector, most boxes (default 100)",
  )
  p.add_argument("--threshold", type=float, help="of a detector, the least score (default 0.1)")
  p.add_argument(
    "--names",
    help="texts to choose from or to find, with a text tower: 'cat,dog,a red car', or a file with one a line",
  )
  p.add_argument(
    "--templates",
    help="sentences for the names: name (default: as they are), one, clip_best, clip_paper, or a file",
  )
  options.add_queries(p)
  p.add_argument("--time", action="store_true", help="measure milliseconds an image")
  options.add_reading(p)
  options.add_processes(p)


def run(args: argparse.Namespace) -> None:
  """Prints or writes the predictions for args.image."""
  from flexivit_jax.devices import compilation
  from flexivit_jax.running import processes

  if args.top_k is not None and args.top_k < 1:
    raise errors.UserError(f"--top_k={args.top_k}; expected 1 or more.")
  if args.threshold is not None and not 0 <= args.threshold <= 1:
    raise errors.UserError(f"--threshold={args.threshold}; expected a score, 0 to 1.")
  if args.templates and not args.names:
    raise errors.UserError("--templates are sentences for --names; give these, or leave it out.")
  options.join(args)
  compilation.keep_programs()
  with processes.ending():
    _predict(args)


def _predict(args: argparse.Namespace) -> None:
  from flexivit_jax.inference import outputs, predictor
  from flexivit_jax.inference.predictions import WRITERS
  from flexivit_jax.running import distributed

  if args.out and args.out.suffix.lower() in WRITERS:
    distributed.on_first(lambda: outputs.check_new(args.out, WRITERS, args.overwrite), "--out")
  cascade = _cascade(args)
  names, templates = options.listed_names(args.names), args.templates or "name"
  if cascade and not names:
    names, templates = [*cascade.names], cascade.templates
  given = options.loading(args)
  loaded = distributed.each(
    lambda: predictor.load(
      args.checkpoint, args.image_size, texts=bool(names), whole=True, **given
    ),
    "its checkpoint",
  )
  if cascade and (predictor.gives_masks(loaded.model) or predictor.gives_boxes(loaded.model)):
    raise errors.UserError(f"--cascade is of classes; {args.checkpoint} gives none of an image.")
  if predictor.gives_masks(loaded.model):
    _predict_masks(args, loaded)
    return
  if predictor.gives_boxes(loaded.model):
    _predict_boxes(args, loaded)
    return
  _check_of_classes(args, WRITERS)
  _predict_classes(args, loaded, cascade, names, templates)


def _predict_classes(
  args: argparse.Namespace,
  loaded: "predictor.Loaded",
  cascade: "Cascade | None",
  names: "Sequence[str] | None",
  templates: str,
) -> None:
  from flexivit_jax import weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.inference import budgets, cascades, outputs, predictor, programs, texts
  from flexivit_jax.inference.predictions import check_classes, predictions, sinks_of
  from flexivit_jax.running import distributed

  top_k = 5 if args.top_k is None else args.top_k
  among = None
  if names:
    among = texts.of_names(loaded, names, templates)
  else:
    check_classes(loaded)
  first = distributed.is_first()
  say = outputs.note if first else lambda text: None
  if cascade:
    cascades.check(cascade, loaded, among, templates)
    sizes, batch_size, way = cascade.sizes, args.batch_size, programs.PLAIN
  else:
    sizes, batch_size, way = budgets.chosen(
      loaded, options.size_asked(args), args.batch_size, any_way=True, note=say
    )
  if first:
    weights.print_notes(loaded.record)
    if among is not None and among.bias is not None:
      outputs.note("each name has a probability of its own, they do not add up to 100 %")
  inputs = find_images(args.image, say)
  predictor.agree(
    loaded,
    inputs,
    sizes=sizes,
    batch_size=batch_size,
    way=[*way],
    top_k=top_k,
    names=args.names,
    templates=args.templates,
  )
  classes = len(among.names) if among else loaded.model.num_classes
  printed = args.json or not args.out
  tally = outputs.Tally(len(inputs), first, progress=not (printed and sys.stdout.isatty()))
  with (
    sinks_of(
      args.out if first else None,
      json_lines=args.json,
      k=min(top_k, classes),
      timed=args.time,
    ) as sinks,
    contextlib.closing(
      cascades.answers(loaded, cascade, inputs, top_k, batch_size, among)
      if cascade
      else predictions(loaded, inputs, sizes, top_k, batch_size, args.time, among, way)
    ) as stream,
  ):
    for file, rows in stream:
      tally.add(file, rows[0].error)
      for row in rows:
        for sink in sinks:
          sink(row)
    tally.check_any()
  if args.out and not args.json:
    print(f"{args.out}: {tally.done - tally.bad} images")
  tally.check_all(args.on_error)


def _cascade(args: argparse.Namespace) -> "Cascade | None":
  """Reads --cascade, which says the sizes."""
  from flexivit_jax.budget import cascade as rules

  if args.cascade is None:
    return None
  for option in ("seqhw", "patch", "budget", "time"):
    if getattr(args, option):
      raise errors.UserError(f"Give --cascade or --{option}, not both.")
  return rules.read(args.cascade)


def _check_of_classes(args: argparse.Namespace, suffixes: Collection[str]) -> None:
  """Raises a UserError for what only a segmentation model or a detector can give."""
  from flexivit_jax.inference import masks, outputs
  from flexivit_jax.running import distributed

  for option, value in (("--overlay", args.overlay), ("--patch", args.patch)):
    if value is not None:
      raise errors.UserError(
        f"{option}={value}: {args.checkpoint} classifies whole images; only a segmentation model gives masks, and a"
        " detector boxes."
      )
  _refuse_of_boxes(args)
  if args.out and args.out.suffix.lower() in masks.MASKS:
    raise errors.UserError(
      f"--out={args.out}: {args.checkpoint} classifies whole images, which makes no mask; expected a file that ends in"
      f" {' or '.join(suffixes)}, or the checkpoint of a segmentation model."
    )
  if args.out:
    distributed.on_first(lambda: outputs.check_new(args.out, suffixes, args.overwrite), "--out")


def _refuse_of_boxes(args: argparse.Namespace) -> None:
  """Raises a UserError for what only a detector takes."""
  own = {"--threshold": args.threshold, "--vectors": args.vectors, "--as_typed": args.as_typed}
  for option, value in own.items():
    if value is not None and value is not False:
      shown = option if value is True else f"{option}={value}"
      raise errors.UserError(f"{shown} is for detectors; {args.checkpoint} gives no boxes.")


def _predict_masks(args: argparse.Namespace, loaded: "predictor.Loaded") -> None:
  from flexivit_jax import weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.inference import masks, outputs, predictor
  from flexivit_jax.running import distributed

  if args.out and args.out.suffix.lower() in (".csv", ".jsonl"):
    raise errors.UserError(
      f"--out={args.out}: a segmentation model gives masks; expected a .png or a folder. --json prints the shares of"
      " the classes."
    )
  _refuse_of_boxes(args)
  if args.names:
    raise errors.UserError(
      f"{args.checkpoint} is a segmentation model, which knows its own classes; leave --names out."
    )
  sizes, batch_size = _sizes(args, loaded)
  first = distributed.is_first()
  if first:
    weights.print_notes(loaded.record)
  inputs = find_images(args.image, outputs.note if first else lambda text: None)
  to = distributed.each(
    lambda: masks.targets(inputs, sizes, args.out, args.overlay, args.overwrite), "--out"
  )
  predictor.agree(loaded, inputs, sizes=sizes, batch_size=batch_size)
  tally = outputs.Tally(len(inputs), first, progress=not sys.stdout.isatty())
  stream = masks.answers(loaded, inputs, sizes, batch_size, args.time)
  with contextlib.closing(stream):
    for file, answers in stream:
      tally.add(file, answers[0].error)
      for answer in answers:
        if first and answer.error is None:
          masks.write(answer, to, loaded.model.num_classes)
        if args.json:
          print(masks.as_json(answer, to), flush=True)
        elif answer.error is None:
          print(masks.as_text(answer), flush=True)
    tally.check_any()
  for out, what in ((args.out, "masks"), (args.overlay, "overlays")):
    if out and not args.json:
      print(f"{out}: {what} of {tally.done - tally.bad} images")
  tally.check_all(args.on_error)


def _predict_boxes(args: argparse.Namespace, loaded: "predictor.Loaded") -> None:
  from flexivit_jax import weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.inference import boxes, outputs, predictor, queries
  from flexivit_jax.running import distributed

  if args.out:
    check = functools.partial(outputs.check_new, args.out, boxes.WRITERS, args.overwrite)
    distributed.on_first(check, "--out")
  names = options.listed_names(args.names)
  asked = queries.Asked(names, args.templates, args.vectors, args.as_typed)
  loaded = distributed.each(lambda: queries.closed(loaded, asked), "--names")
  sizes, batch_size = _sizes(args, loaded)
  first = distributed.is_first()
  if first:
    weights.print_notes(loaded.record)
  inputs = find_images(args.image, outputs.note if first else lambda text: None)
  to = distributed.each(
    lambda: boxes.overlays_of(inputs, sizes, args.overlay, args.overwrite), "--overlay"
  )
  limits = options.chosen(args, "threshold", "top_k")
  predictor.agree(loaded, inputs, sizes=sizes, batch_size=batch_size, names=names, **limits)
  printed = args.json or not args.out
  tally = outputs.Tally(len(inputs), first, progress=not (printed and sys.stdout.isatty()))
  stream = boxes.answers(
    loaded,
    inputs,
    sizes,
    batch_size=batch_size,
    timed=args.time,
    pictures=first and bool(to),
    **limits,
  )
  with (
    boxes.sinks_of(args.out if first else None, to, json_lines=args.json, timed=args.time) as sinks,
    contextlib.closing(stream),
  ):
    for file, answers in stream:
      tally.add(file, answers[0].error)
      for answer in answers:
        if answer.error is None and first:
          boxes.draw(answer, to)
        for sink in sinks:
          sink(answer)
    tally.check_any()
  for out, what in ((args.out, "detections"), (args.overlay, "overlays")):
    if out and not args.json:
      print(f"{out}: {what} of {tally.done - tally.bad} images")
  tally.check_all(args.on_error)


def _sizes(
  args: argparse.Namespace, loaded: "predictor.Loaded"
) -> "tuple[picture_files.Sizes, int | None]":
  """The sizes of --seqhw, --patch or --budget, and the images at a time."""
  from flexivit_jax import sizes
  from flexivit_jax.inference import budgets, outputs

  if args.patch and (args.seqhw or args.budget):
    raise errors.UserError(
      f"--patch={args.patch} are pixels of a patch; give these, or --seqhw, tokens per side, or --budget, not both."
    )
  if args.patch:
    return sizes.parse_patches(args.patch), args.batch_size
  choice = budgets.chosen(loaded, options.size_asked(args), args.batch_size, note=outputs.note)
  return choice.sizes, choice.batch_size
