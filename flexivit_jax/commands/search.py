"""`flexivit search`: the images that a text, or another image, is most like."""

import argparse
import json

from flexivit_jax import errors
from flexivit_jax.commands import options

HELP = "find images by a text or an image, with an index that is kept"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The query, the images, the model, the sizes, the index."""
  p.add_argument("query", nargs="?", help="what to look for, e.g. 'red car'; or give --like")
  p.add_argument("--like", metavar="IMAGE", help="an image file to look for")
  p.add_argument(
    "--data", required=True, nargs="+", help="image files, folders, and patterns in quotes"
  )
  options.add_checkpoint(p)
  p.add_argument("--seqhw", help="tokens per side by which images are ranked, e.g. 8 or 4x6")
  options.add_budget(p)
  p.add_argument(
    "--coarse",
    metavar="SEQHW",
    help="a smaller size for all images; only the best of it are embedded at --seqhw",
  )
  p.add_argument("--shortlist", type=int, help="how many these are (default 100); with --coarse")
  p.add_argument("--top_k", type=int, default=10, help="images to show (default 10)")
  p.add_argument("--json", action="store_true", help="print a line of JSON for each image")
  p.add_argument(
    "--index", type=options.path, help="folder of the index (default: in the cache folder)"
  )
  p.add_argument(
    "--by_content",
    action="store_true",
    help="compare the contents of all files, also where size and time are the same",
  )
  options.add_batches(p)
  p.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    default="skip",
    help="files that cannot be read are named and left out; with raise the exit code is 2 then (default skip)",
  )
  options.add_reading(p)


def run(args: argparse.Namespace) -> None:
  """Prints the images that args.query or args.like is most like."""
  from flexivit_jax import files, sizes, weights
  from flexivit_jax.data.inputs import find_images
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import budgets, outputs, predictor, search, texts

  _check(args)
  compilation.keep_programs()
  loaded = predictor.load(args.checkpoint, args.image_size, texts=True, **options.loading(args))
  choice = budgets.chosen(loaded, options.size_asked(args), args.batch_size, note=outputs.note)
  (fine,) = _one(choice.sizes, "--seqhw")
  coarse = (
    sizes.parse_one(args.coarse, "images are shortlisted at one size") if args.coarse else None
  )
  if coarse == fine:
    raise errors.UserError(
      f"--coarse={args.coarse} is --seqhw; give a smaller size, or leave it out."
    )
  weights.print_notes(loaded.record)
  inputs = find_images(args.data, outputs.note)
  bad = [(file.path, file.error) for file in inputs if file.error is not None]
  listed = list(dict.fromkeys(file.path for file in inputs if file.error is None))
  # Of two or more, so that a bad file is named also where it is the only one.
  tally = outputs.Tally(max(2, len(listed) + len(bad)), progress=True)
  for name, error in bad:
    tally.add(name, error)
  query = texts.embed(loaded, [args.query])[0] if args.query else None
  kept = search.kept(
    loaded,
    args.data,
    args.index or files.cache_folder() / "search",
    image_size=args.image_size,
    by_content=args.by_content,
    batch_size=choice.batch_size,
    tell=tally.add,
    note=outputs.note,
  )
  wanted = listed
  for size in (coarse, fine) if coarse else (fine,):
    vectors, changes = kept.vectors(size, listed, wanted)
    tally.clear()
    outputs.note(
      f"seqhw={sizes.size_text(size)}: {changes.embedded} images embedded, {changes.known} known,"
      f" {changes.dropped} gone"
    )
    if not vectors:
      raise errors.UserError("there is no image to search in; each file is named above.")
    asked = query if query is not None else search.of_image(loaded, args.like, size)
    found = search.best(asked, vectors, args.top_k if size == fine else args.shortlist or 100)
    wanted = [row.file for row in found]
  for row in found:
    if args.json:
      print(json.dumps({**row._asdict(), "seqhw": fine}))
    else:
      print(f"{row.similarity:7.4f}  {outputs.shown(row.file)}")
  if tally.bad and args.on_error == "raise":
    raise errors.UserError(
      f"{tally.bad} images cannot be read; each is named above. With --on_error=skip this is no error."
    )


def _check(args: argparse.Namespace) -> None:
  if (args.query is None) == (args.like is None):
    raise errors.UserError("Give a text to look for, or an image with --like; one of the two.")
  if args.query is not None and not args.query.strip():
    raise errors.UserError("The text to look for is empty; expected words.")
  if args.shortlist is not None and args.coarse is None:
    raise errors.UserError("--shortlist without --coarse has no effect; give that size, too.")
  for name, value in {"top_k": args.top_k, "shortlist": args.shortlist}.items():
    if value is not None and value < 1:
      raise errors.UserError(f"--{name}={value}; expected 1 or more.")


def _one(sizes: tuple, name: str) -> tuple:
  if len(sizes) != 1:
    raise errors.UserError(f"{name}: images are ranked at one size; give one, e.g. {name}=8.")
  return sizes
