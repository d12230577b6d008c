"""The command line's arguments. Imports nothing heavy: `--help` answers at once."""

import argparse
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from flexivit_jax import errors

_WEIGHTS = "an .npz, a .safetensors file, a run folder, a published name or an https:// address"


def parser() -> argparse.ArgumentParser:
  """The parser of the command `flexivit`."""
  top = argparse.ArgumentParser(
    prog="flexivit", description="One Vision Transformer for all patch sizes."
  )
  commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
  _plan(commands.add_parser("plan", help="what a config will cost; needs no data and no device"))
  _bench(commands.add_parser("bench", help="what each patch size costs on this machine"))
  _train(commands.add_parser("train", help="train from a config file; the same command resumes"))
  _eval(commands.add_parser("eval", help="accuracy and cost of a checkpoint at every patch size"))
  _predict(commands.add_parser("predict", help="classify images at a chosen patch size"))
  _embed(commands.add_parser("embed", help="features of images at a chosen patch size"))
  _report(
    commands.add_parser("report", help="accuracy against patch size and cost, as HTML and PNG")
  )
  _inspect(commands.add_parser("inspect", help="what a file with weights holds"))
  _convert(
    commands.add_parser("convert", help="weights of other projects as big_vision's .npz, verified")
  )
  _export(commands.add_parser("export", help="one model at several patch sizes, to run elsewhere"))
  _flexify(
    commands.add_parser("flexify", help="make a fixed model work at every patch size, unlabelled")
  )
  _verify(
    commands.add_parser("verify", help="is everything in a run or an export as it was written?")
  )
  _replay(
    commands.add_parser("replay", help="look into a step whose loss or gradients were not finite")
  )
  _reproduce(
    commands.add_parser(
      "reproduce", help="the paper's figures: how, at what cost, ours beside theirs"
    )
  )
  return top


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Parses a command line; `--config.KEY=VALUE` anywhere in it goes into `overrides`.

  Raises:
    UserError: an argument that no command knows.
  """
  overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
  args, unknown = parser().parse_known_args([a for a in argv if not a.startswith("--config.")])
  if unknown:
    known = ["--config", "--help", *(f"--{name}" for name in vars(args)), "--no-verify"]
    name = unknown[0].removeprefix("--").partition("=")[0]
    if hasattr(args, name):
      raise errors.UserError(f"`flexivit {args.command}` takes {name.upper()} without --{name}.")
    raise errors.UserError(f"Unknown argument {unknown[0]!r}.{errors.nearest(unknown[0], known)}")
  if overrides and not hasattr(args, "overrides"):
    raise errors.UserError(
      f"--config.{overrides[0]} has no effect with `flexivit {args.command}`; remove it."
    )
  args.overrides = overrides
  return args


def _path(text: str) -> pathlib.Path:
  """A path as it is typed; "~/runs", which a shell leaves alone behind "=", is in the home folder.

  A folder that is really called "~" is there already, or is written "./~".
  """
  if not text:
    raise argparse.ArgumentTypeError("the path is empty; give one, . is the current folder")
  path = pathlib.Path(text)
  if text.startswith("~") and not os.path.lexists(path.parts[0]):
    try:
      return path.expanduser()
    except RuntimeError as e:
      raise argparse.ArgumentTypeError(
        f"no home folder is known for {path.parts[0]!r}; ./{text} is a folder of that name"
      ) from e
  return path


def _config(p: argparse.ArgumentParser) -> None:
  p.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="e.g. configs/digits.py or configs/digits.py:fixed=8",
  )
  p.set_defaults(overrides=[])
  p.epilog = "--config.KEY=VALUE overrides a value of the config, e.g. --config.optim.lr=1e-3"


def _checkpoint(p: argparse.ArgumentParser) -> None:
  what = "a run folder, a checkpoint in it, an .npz, or a published name"
  p.add_argument("--checkpoint", required=True, type=_path, help=what)


def _train(p: argparse.ArgumentParser) -> None:
  _config(p)
  p.add_argument(
    "--workdir", required=True, type=_path, help="the run's folder; made, or resumed from"
  )
  p.add_argument(
    "--resume",
    default="latest",
    help="latest (the default): the newest checkpoint, which has to be whole; latest-valid: the newest that is",
  )
  p.add_argument(
    "--allow_config_change",
    action="store_true",
    help="go on with another model, data or optimizer than the run was begun with",
  )
  _several(p)


def _several(p: argparse.ArgumentParser) -> None:
  """Of a run on several hosts."""
  group = p.add_argument_group(
    "several processes",
    "Found by themselves on TPU pods, SLURM and Open MPI (Kubernetes: with its Python package); else give three.",
  )
  group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of the first process")
  group.add_argument("--num_processes", type=int, help="how many there are")
  group.add_argument("--process_id", type=int, help="which one this is, from 0")
  group.add_argument(
    "--join_timeout", type=int, default=300, help="seconds in which all have to come (default 300)"
  )
  group.add_argument(
    "--heartbeat_timeout",
    type=int,
    default=100,
    help="seconds of silence after which a process counts as lost and the others end (default 100)",
  )


def _verify(p: argparse.ArgumentParser) -> None:
  p.add_argument("path", type=_path, help="a run, a checkpoint, an export, or weights")


def _replay(p: argparse.ArgumentParser) -> None:
  p.add_argument("dump", type=_path, help="RUN/bad_step.json")


def _reproduce(p: argparse.ArgumentParser) -> None:
  p.add_argument("item", nargs="?", help="a figure or table, as `--list` names them")
  p.add_argument("--list", action="store_true", help="all items (the default without one)")
  p.add_argument("--costs", action="store_true", help="all items, and what each training takes")
  p.add_argument(
    "--data_dir",
    type=_path,
    help="where TFDS prepared the data, or of folders such as DIR/val/CLASS/*.jpg",
  )
  p.add_argument("--out", type=_path, help="folder for results; what is there already is kept")
  p.add_argument(
    "--checkpoint",
    action="append",
    help="one of the item's, NAME=FILE that stands for one, or a file; again for more (default: all, fetched)",
  )
  p.add_argument("--sets", help="e.g. val,v2 (default: the item's)")
  p.add_argument("--seqhw", help="e.g. 5,15,30 (default: the item's)")
  p.add_argument("--protocol", help="paper, timm, ... (default: the item's)")
  p.add_argument("--batch_size", type=int, help="images at a time (default 256)")
  p.add_argument("--results", type=_path, help="an eval.json, to put beside the published numbers")
  p.add_argument("--model", help="with --results: only published numbers of this model")
  p.add_argument("--setting", help='with --results: only those of this setting, e.g. "90 epochs"')


def _plan(p: argparse.ArgumentParser) -> None:
  p.add_argument("config", metavar="CONFIG[:ARG]", help="e.g. configs/i1k_distill.py:variant=B")
  p.add_argument(
    "--utilisation", type=float, default=0.4, help="share of a machine's peak (default 0.4)"
  )
  p.add_argument("--json", action="store_true", help="everything, to be read by a program")
  p.set_defaults(overrides=[])
  p.epilog = (
    "--config.KEY=VALUE overrides a value of the config, e.g. --config.input.batch_size=512"
  )


def _bench(p: argparse.ArgumentParser) -> None:
  p.add_argument("--forward", action="store_true", help="inference at each size")
  p.add_argument("--train", action="store_true", help="a training step at each size")
  p.add_argument("--compile", action="store_true", help="tracing and compiling each training step")
  p.add_argument("--input", metavar="CONFIG", help="a config's training images: reading to batches")
  p.add_argument("--startup", metavar="CONFIG", help="from the command to the first step")
  p.add_argument("--variant", default="S", help="S (the default), B, L, ...")
  p.add_argument("--batch_size", type=int, default=8, help="default 8")
  p.add_argument("--image_size", type=int, default=240, help="pixels a side (default 240)")
  p.add_argument(
    "--seqhw",
    type=_whole_numbers,
    metavar="N,N",
    help="tokens a side (default: patches of 8 to 48)",
  )
  p.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on CPUs)")
  p.add_argument(
    "--attention", default="auto", help="a form of models/attention.py (default: auto)"
  )
  p.add_argument(
    "--memory_gib",
    type=float,
    help="of --train and --compile: batches in as few parts as fit into so much (default: in one)",
  )
  p.add_argument("--rounds", type=int, default=7, help="of which the median is taken (default 7)")
  p.add_argument("--out", type=_path, help="a CSV file to write")
  p.set_defaults(overrides=[])


def _eval(p: argparse.ArgumentParser) -> None:
  _config(p)
  _checkpoint(p)
  p.add_argument(
    "--seqhw", default="all", help="'all' (those of the config) or e.g. 5,8,15: tokens per side"
  )
  p.add_argument(
    "--out", type=_path, help="file for the results (default: eval.json in the run folder)"
  )
  _reading(p)


def _predict(p: argparse.ArgumentParser) -> None:
  _images(p)
  p.add_argument(
    "--out", type=_path, help="a .csv or .jsonl file to write the answers to, not to stdout"
  )
  p.add_argument("--json", action="store_true", help="print a line of JSON for each answer")
  p.add_argument("--top_k", type=int, default=5, help="most likely classes (default 5)")
  p.add_argument("--time", action="store_true", help="measure milliseconds an image")
  _reading(p)


def _embed(p: argparse.ArgumentParser) -> None:
  _images(p)
  p.add_argument(
    "--out", required=True, type=_path, help="a .npz or .csv file to write the features to"
  )
  p.add_argument("--normalize", action="store_true", help="divide each vector by its length")
  _reading(p)


def _images(p: argparse.ArgumentParser) -> None:
  """Of a model over image files."""
  p.add_argument(
    "image", nargs="+", help="image files, folders, and patterns in quotes, e.g. 'photos/**/*.jpg'"
  )
  _checkpoint(p)
  p.add_argument(
    "--seqhw",
    help="tokens per side, e.g. 8, or 5,8,4x6 for several; 'all': those that a run was trained at",
  )
  p.add_argument(
    "--image_size", type=int, help="pixels a side, for weights of no run (default 240)"
  )
  p.add_argument("--batch_size", type=int, help="images at a time (default: 4 on CPUs, else 32)")
  p.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    default="raise",
    help="files that cannot be read are named and the others answered; then exit code 2, or 0 with skip",
  )
  p.add_argument("--overwrite", action="store_true", help="replace the file of --out")


def _report(p: argparse.ArgumentParser) -> None:
  p.add_argument(
    "runs", nargs="+", type=_path, metavar="RUN", help="run folders, or their eval.json"
  )
  p.add_argument("--out", type=_path, help="folder to write to (default: the first run's)")


def _inspect(p: argparse.ArgumentParser) -> None:
  p.add_argument("file", nargs="?", type=_path, help=_WEIGHTS)
  p.add_argument("--list", action="store_true", help="the published checkpoints by name")
  _loading(p)


def _convert(p: argparse.ArgumentParser) -> None:
  p.add_argument("file", type=_path, help=_WEIGHTS)
  p.add_argument("out", type=_path, help="an .npz to write; a folder with --to")
  p.add_argument(
    "--to", default="big_vision", help="big_vision (the default), timm or transformers"
  )
  p.add_argument(
    "--seqhw", type=int, help="tokens per side, with --to (default: buffers as they are stored)"
  )
  p.add_argument("--image_size", type=int, help="pixels a side (default: the model's, or 240)")
  _no_verify(p)
  _loading(p)


def _export(p: argparse.ArgumentParser) -> None:
  p.add_argument("checkpoint", type=_path, help=_WEIGHTS)
  p.add_argument("out", type=_path, metavar="OUT", help="file to write, a .zip; with --to a folder")
  p.add_argument(
    "--to", default="stablehlo", help="stablehlo (the default; runs in jax), onnx or saved_model"
  )
  p.add_argument("--image_size", type=int, help="pixels a side (default: the model's, or 240)")
  p.add_argument(
    "--seqhw",
    required=True,
    type=_whole_numbers,
    metavar="N,N",
    help="tokens per side, e.g. 8,15,30",
  )
  p.add_argument(
    "--platforms",
    type=lambda text: tuple(text.split(",")),
    help="where it is to run, of cpu,cuda,rocm,tpu (default: cpu,cuda,tpu); not with --to",
  )
  _no_verify(p)
  _loading(p)


def _no_verify(p: argparse.ArgumentParser) -> None:
  p.add_argument(
    "--no-verify",
    dest="verify",
    action="store_false",
    help="do not compare with the source; no certificate then",
  )


def _flexify(p: argparse.ArgumentParser) -> None:
  p.add_argument("--init", required=True, type=_path, help="the model: what --checkpoint is")
  p.add_argument(
    "--data",
    required=True,
    type=_path,
    help="folder of images, or one with train/ and val/, with folders of classes or without",
  )
  p.add_argument("--out", required=True, type=_path, help="folder to write to, or go on in")
  p.add_argument("--epochs", type=float, help="passes over the images (default 10; 0: only resize)")
  p.add_argument("--image_size", type=int, help="pixels a side (default 240)")
  p.add_argument("--seqhw", type=_whole_numbers, metavar="N,N", help="tokens per side, e.g. 5,8,15")
  p.add_argument("--batch_size", type=int, help="default 16")
  p.add_argument("--lr", type=float, help="default 3e-5")
  p.add_argument("--seed", type=int, help="default 0")
  p.add_argument(
    "--buffers",
    type=_whole_numbers,
    metavar="PATCH,GRID",
    help="sides of the stored kernel and grid (default: the model's own)",
  )
  p.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    help="what a damaged image does: raise (default) ends it, skip leaves the image out",
  )
  p.add_argument(
    "--moment", action="store_true", help="resize the kernel for patches like those of the images"
  )
  _reading(p)


def _reading(p: argparse.ArgumentParser) -> None:
  p.add_argument("--num_heads", type=int, help="where the arrays do not say (timm's names)")
  p.add_argument(
    "--gelu",
    choices=("exact", "quick", "tanh"),
    help="where the arrays do not say; OpenAI's CLIP has quick",
  )
  p.add_argument(
    "--mean", type=_numbers, metavar="R,G,B", help="of the input, pixels in [0, 1]; with --std"
  )
  p.add_argument("--std", type=_numbers, metavar="R,G,B", help="see --mean; default 0.5,0.5,0.5")
  p.add_argument(
    "--ema", action="store_true", help="of a file with raw weights and their EMA, take the EMA"
  )
  p.add_argument(
    "--posemb_size",
    type=_whole_numbers,
    metavar="H,W",
    help="cells of the position grid, where it is not square",
  )


def _loading(p: argparse.ArgumentParser) -> None:
  _reading(p)
  p.add_argument(
    "--flexify",
    type=_numbers,
    metavar="PATCH,GRID",
    help="make a fixed model flexible: pixels of the kernel and cells of the grid, e.g. 32,7",
  )


def _numbers(text: str) -> tuple[float, ...]:
  return tuple(float(part) for part in text.split(","))


def _whole_numbers(text: str) -> tuple[int, ...]:
  return tuple(int(part) for part in text.split(","))


def loading(args: argparse.Namespace) -> dict[str, Any]:
  """Keyword arguments of `weights.load` in the arguments of a command.

  Raises:
    UserError: --flexify is not two whole numbers.
  """
  names = ("num_heads", "gelu", "mean", "std")
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  given |= {"ema": True} if args.ema else {}
  if args.posemb_size is not None:
    if len(args.posemb_size) != 2 or min(args.posemb_size) < 1:
      raise errors.UserError("--posemb_size: expected H,W, two whole numbers, e.g. 16,9.")
    given["posemb_size"] = args.posemb_size
  if getattr(args, "flexify", None) is None:
    return given
  if len(args.flexify) != 2 or any(n < 1 or n != int(n) for n in args.flexify):
    raise errors.UserError("--flexify: expected PATCH,GRID, two whole numbers, e.g. 32,7.")
  patch, grid = (int(n) for n in args.flexify)
  return given | {"flexify": ((patch, patch), (grid, grid))}
