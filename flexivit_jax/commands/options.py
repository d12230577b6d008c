"""Groups of arguments that several commands share. Imports nothing heavy: `--help` answers at once."""

import argparse
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexivit_jax import errors

if TYPE_CHECKING:
  from flexivit_jax.inference import budgets

WEIGHTS = "an .npz, a .safetensors file, a run folder, a published name or an https:// address"
VECTORS = "an .npz with vectors of the names, of a detector without a text tower"
_OVERRIDES = "--config.KEY=VALUE overrides a value of the config, e.g. "


# --- types of values ---


def path(text: str) -> pathlib.Path:
  """A path as it is typed; "~/runs", which a shell leaves alone behind "=", is in the home folder.

  A folder that is really called "~" is there already, or is written "./~".
  """
  if not text:
    raise argparse.ArgumentTypeError("the path is empty; give one, . is the current folder")
  typed = pathlib.Path(text)
  if text.startswith("~") and not os.path.lexists(typed.parts[0]):
    try:
      return typed.expanduser()
    except RuntimeError as e:
      raise argparse.ArgumentTypeError(
        f"no home folder is known for {typed.parts[0]!r}; ./{text} is a folder of that name"
      ) from e
  return typed


def numbers(text: str) -> tuple[float, ...]:
  """Numbers between commas."""
  return tuple(float(number) for number in text.split(","))


def whole_numbers(text: str) -> tuple[int, ...]:
  """Integers between commas."""
  return tuple(int(number) for number in text.split(","))


# --- arguments ---


def add_overrides(p: argparse.ArgumentParser, example: str = "") -> None:
  """`--config.KEY=VALUE`, which `cli.parse` collects; only commands with `overrides` take it."""
  p.set_defaults(overrides=[])
  if example:
    p.epilog = _OVERRIDES + example


def add_config(p: argparse.ArgumentParser) -> None:
  """`--config` and its overrides."""
  p.add_argument(
    "--config",
    required=True,
    metavar="FILE[:ARG]",
    help="e.g. configs/digits.py or configs/digits.py:fixed=8",
  )
  add_overrides(p, "--config.optim.lr=1e-3")


def add_checkpoint(p: argparse.ArgumentParser) -> None:
  """`--checkpoint`."""
  what = "a run folder, a checkpoint in it, an .npz, or a published name"
  p.add_argument("--checkpoint", required=True, type=path, help=what)


def add_batches(p: argparse.ArgumentParser) -> None:
  """How large images are that weights of no run get, and how many go through the model at once."""
  p.add_argument(
    "--image_size", type=int, help="pixels a side, for weights of no run (default 240)"
  )
  p.add_argument("--batch_size", type=int, help="images at a time (default: 4 on CPUs, else 32)")


def add_images(p: argparse.ArgumentParser) -> None:
  """What a command needs that runs a model over image files: the files, the model, the sizes, the output."""
  p.add_argument(
    "image", nargs="+", help="image files, folders, and patterns in quotes, e.g. 'photos/**/*.jpg'"
  )
  add_checkpoint(p)
  p.add_argument(
    "--seqhw",
    help="tokens per side, e.g. 8, or 5,8,4x6 for several; 'all': those that a run was trained at",
  )
  add_budget(p)
  add_batches(p)
  p.add_argument(
    "--on_error",
    choices=("raise", "skip"),
    default="raise",
    help="files that cannot be read are named and the others answered; then exit code 2, or 0 with skip",
  )
  p.add_argument("--overwrite", action="store_true", help="replace the file of --out")


def add_budget(p: argparse.ArgumentParser) -> None:
  """--budget in the place of --seqhw, and where the profile is that it goes by."""
  p.add_argument(
    "--budget",
    metavar="LIMIT=N",
    help="in the place of --seqhw: the best size within e.g. latency_ms=20,accuracy=0.7, by `flexivit profile`",
  )
  p.add_argument("--profile", type=path, help="its file (default: beside the weights)")
  p.add_argument(
    "--estimate", action="store_true", help="scale a profile of another device to this one"
  )


def add_queries(p: argparse.ArgumentParser) -> None:
  """What a detector that compares images with texts takes besides --names and --templates."""
  p.add_argument("--vectors", type=path, help=VECTORS)
  p.add_argument(
    "--as_typed",
    action="store_true",
    help="a detector's names and templates as they are, not in lower case without punctuation",
  )


def add_processes(p: argparse.ArgumentParser) -> None:
  """How the processes of one run find each other."""
  group = p.add_argument_group(
    "several processes",
    "Found automatically on TPU pods, SLURM and Open MPI (Kubernetes: with its Python package); else give three.",
  )
  group.add_argument("--coordinator_address", metavar="HOST:PORT", help="of the first process")
  group.add_argument("--num_processes", type=int, help="how many there are")
  group.add_argument("--process_id", type=int, help="which one this is, from 0")
  group.add_argument(
    "--join_timeout", type=int, default=300, help="seconds within which all must join (default 300)"
  )
  group.add_argument(
    "--heartbeat_timeout",
    type=int,
    default=100,
    help="seconds of silence after which a process counts as lost and the others end (default 100)",
  )


def join(args: argparse.Namespace, *, saves: bool = False) -> None:
  """Joins the processes of a command, by the arguments of `add_processes`; only process 0 prints the answer.

  Args:
    args: the arguments.
    saves: see `distributed.start`.
  """
  from flexivit_jax.running import distributed

  distributed.start(
    args.coordinator_address,
    args.num_processes,
    args.process_id,
    join_timeout=args.join_timeout,
    heartbeat_timeout=args.heartbeat_timeout,
    saves=saves,
  )
  distributed.hush()


def add_no_verify(p: argparse.ArgumentParser) -> None:
  """`--no-verify`."""
  p.add_argument(
    "--no-verify",
    dest="verify",
    action="store_false",
    help="do not compare with the source; no certificate then",
  )


def add_reading(p: argparse.ArgumentParser) -> None:
  """What the arrays of a file with weights may not say; `loading` collects the values."""
  p.add_argument("--num_heads", type=int, help="where the arrays do not say (timm's names)")
  p.add_argument(
    "--gelu",
    choices=("exact", "quick", "tanh"),
    help="where the arrays do not say; OpenAI's CLIP has quick",
  )
  p.add_argument(
    "--mean", type=numbers, metavar="R,G,B", help="of the input, pixels in [0, 1]; with --std"
  )
  p.add_argument("--std", type=numbers, metavar="R,G,B", help="see --mean; default 0.5,0.5,0.5")
  p.add_argument(
    "--ema", action="store_true", help="of a file with raw weights and their EMA, take the EMA"
  )
  p.add_argument(
    "--posemb_size",
    type=whole_numbers,
    metavar="H,W",
    help="cells of the position grid, where it is not square",
  )


def add_image_only(p: argparse.ArgumentParser) -> None:
  """--image_only, where a file may have two towers."""
  p.add_argument(
    "--image_only",
    action="store_true",
    help="of a file with an image and a text tower, the image tower",
  )


def add_loading(p: argparse.ArgumentParser) -> None:
  """As `add_reading`, and `--flexify`."""
  add_reading(p)
  p.add_argument(
    "--flexify",
    type=numbers,
    metavar="PATCH,GRID",
    help="make a fixed model flexible: pixels of the kernel and cells of the grid, e.g. 32,7",
  )


# --- values ---


def chosen(args: argparse.Namespace, *names: str) -> dict[str, Any]:
  """Returns the arguments that have a value, as keyword arguments: the function knows the defaults."""
  return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def size_asked(args: argparse.Namespace) -> "budgets.Asked":
  """Returns what --seqhw and the options of `add_budget` say.

  Raises:
    UserError: two of them, or a profile that nothing needs.
  """
  from flexivit_jax.inference import budgets

  asked = budgets.Asked(args.seqhw, args.budget, args.profile, args.estimate)
  budgets.check(asked)
  return asked


def size_text_asked(args: argparse.Namespace, checkpoint: pathlib.Path) -> str | None:
  """Returns --seqhw, or the size that --budget chooses for a checkpoint, as text.

  Raises:
    UserError: see `size_asked` and `budgets.row_for`.
  """
  from flexivit_jax import sizes
  from flexivit_jax.inference import budgets, outputs, predictor

  asked = size_asked(args)
  if asked.budget is None:
    return asked.seqhw
  loaded = predictor.load(checkpoint, args.image_size, whole=True, **loading(args))
  choice = budgets.chosen(loaded, asked, note=outputs.note)
  return str(sizes.size_text(choice.sizes[0]))


def listed_names(text: str | None) -> list[str] | None:
  """Returns the names of --names: between commas, or the lines of a file.

  Raises:
    UserError: a file that cannot be read, or holds no name.
  """
  from flexivit_jax.data import prompts

  if text is None:
    return None
  if os.path.isfile(text):
    return [*prompts.listed(text, "--names")]
  if text.endswith(".txt"):
    raise errors.UserError(
      f"--names={text}: no such file; expected a file with one name a line, or names between commas."
    )
  return text.split(",")


def data_values(data: Sequence[str]) -> dict[str, Any]:
  """Returns the keys and values of a data section given as KEY=VALUE, as `--config.KEY=VALUE` reads them.

  Raises:
    UserError: no KEY=VALUE, a key that comes twice, no name.
  """
  from flexivit_jax import config

  values: dict[str, Any] = {}
  for text in data:
    key, equals, value = text.partition("=")
    if not equals or not key:
      raise errors.UserError(f"Got {text!r}; expected KEY=VALUE, e.g. data_dir=photos.")
    if key in values:
      raise errors.UserError(f"{key}= is given twice.")
    values[key] = value if key in _TEXTS else config.literal(value)
  if "name" not in values:
    raise errors.UserError("Give name=, e.g. name=folder, name=tar or name=parquet.")
  return values


_TEXTS = (
  "name",
  "split",
  "data_dir",
  "files",
  "classes",
  "annotations",
  "images",
  "masks",
)  # A folder may be called 2024.


def loading(args: argparse.Namespace) -> dict[str, Any]:
  """Keyword arguments of `weights.load` in the arguments of a command.

  Raises:
    UserError: --posemb_size or --flexify is not two whole numbers.
  """
  values: dict[str, Any] = chosen(args, "num_heads", "gelu", "mean", "std", "posemb_size")
  values |= {"ema": True} if args.ema else {}
  _check_posemb_size(values)
  if getattr(args, "flexify", None) is None:
    return values
  if len(args.flexify) != 2 or any(n < 1 or n != int(n) for n in args.flexify):
    raise errors.UserError("--flexify: expected PATCH,GRID, two whole numbers, e.g. 32,7.")
  patch, grid = (int(n) for n in args.flexify)
  return values | {"flexify": ((patch, patch), (grid, grid))}


def _check_posemb_size(values: Mapping[str, Any]) -> None:
  size = values.get("posemb_size", (1, 1))
  if len(size) != 2 or min(size) < 1:
    raise errors.UserError("--posemb_size: expected H,W, two whole numbers, e.g. 16,9.")
