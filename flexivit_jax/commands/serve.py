"""`flexivit serve`: classes and features of images over HTTP, at a patch size that the request or the load chooses."""

import argparse
import os
import pathlib
from typing import TYPE_CHECKING

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.budget.cascade import Cascade
  from flexivit_jax.budget.profile import Profile
  from flexivit_jax.inference import programs
  from flexivit_jax.serving import served

HELP = (
  "answer requests over HTTP, at a patch size that the request, its deadline or the load chooses"
)


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The model, where it is served, how its batches and limits are."""
  p.add_argument(
    "checkpoint", help="a run folder, a checkpoint in it, an .npz, a published name, or an artifact"
  )
  p.add_argument(
    "--seqhw", help="sizes to serve, e.g. 5,8 (default: of the profile, or of the training)"
  )
  p.add_argument(
    "--image_size", type=int, help="pixels a side, for weights of no run (default 240)"
  )
  p.add_argument(
    "--profile", type=options.path, help="what sizes give and cost (default: beside the weights)"
  )
  p.add_argument(
    "--cascade", type=options.path, help="a file of `flexivit cascade`, for requests with cascade=1"
  )
  p.add_argument(
    "--demo",
    action="store_true",
    help="a page at / that shows each size on photos that are dropped on it",
  )
  p.add_argument(
    "--names", help="classes of a detector that takes names: 'cat,dog', or a file with one a line"
  )
  p.add_argument("--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)")
  p.add_argument("--port", type=int, default=8000, help="0: a free one (default 8000)")
  p.add_argument(
    "--batches", type=options.whole_numbers, default=(1, 4), metavar="N,N",
    help="images of the compiled batches (default 1,4); with one number, answers have the bits of predict --batch_size",
  )  # fmt: skip
  p.add_argument(
    "--way", default="jax", help="what runs it: jax, jax:bfloat16, onnx or onnx:int8 (default jax)",
  )  # fmt: skip
  p.add_argument("--only", choices=("predict", "embed"), help="one route, and half the programs")
  _add_limits(p)
  options.add_reading(p)


def _add_limits(p: argparse.ArgumentParser) -> None:
  """What a request may take, and who may ask."""
  p.add_argument(
    "--max_wait_ms", type=float, default=5.0, help="an image waits for others (default 5)"
  )
  p.add_argument(
    "--queue", type=int, default=32, help="images that may wait for a size (default 32)"
  )
  p.add_argument(
    "--accuracy_floor", type=float,
    help="sizes that are this accurate (a fraction, by the lower bound) may replace finer ones under load",
  )  # fmt: skip
  p.add_argument(
    "--target_ms", type=float, default=1000.0,
    help="with --accuracy_floor: predicted milliseconds above which a coarser size is taken (default 1000)",
  )  # fmt: skip
  p.add_argument(
    "--body_mb", type=float, default=10.0, help="most megabytes of a body (default 10)"
  )
  p.add_argument("--max_pixels", type=int, default=2**26, help="of an image (default 67,108,864)")
  p.add_argument(
    "--read_s", type=float, default=10.0, help="seconds in which a body must come (default 10)"
  )
  p.add_argument(
    "--drain_s",
    type=float,
    default=30.0,
    help="seconds to answer what waits at SIGTERM (default 30)",
  )
  p.add_argument(
    "--token_file", type=options.path,
    help="requests need the token in this file, Authorization: Bearer ...; or in the environment as FLEXIVIT_TOKEN",
  )  # fmt: skip


def run(args: argparse.Namespace) -> None:
  """Serves until SIGTERM."""
  try:
    from flexivit_jax.serving import run as serving
    from flexivit_jax.serving.app import Server, Settings
    from flexivit_jax.serving.limits import Limits
  except ImportError as e:
    raise errors.UserError(
      f"`flexivit serve` needs a package that is not installed ({e.name}); install the extra: pip install"
      " 'flexivit_jax[serve]'."
    ) from e
  from flexivit_jax.devices import compilation
  from flexivit_jax.inference import outputs
  from flexivit_jax.serving import choice, served

  _check(args)
  token = _token(args.token_file)
  compilation.keep_programs()
  way = _way(args.way)
  model = served.load(
    args.checkpoint,
    args.image_size,
    way=way,
    names=options.listed_names(args.names),
    **options.loading(args),
  )
  if args.only and args.only not in model.what:
    raise errors.UserError(
      f"--only={args.only}: {model.name} answers {' and '.join(model.what)} alone."
    )
  profile = _profile(args, model)
  sizes = served.sizes(model, args.seqhw, [row.size for row in profile.rows] if profile else ())
  cascade = _cascade(args.cascade, model)
  sizes = tuple(dict.fromkeys([*sizes, *(cascade.sizes if cascade else ())]))
  batches = tuple(sorted(set(args.batches)))
  if profile is not None:
    profile = choice.restricted(profile, sizes, batches, (way.runtime, way.dtype))
  policy = choice.check(choice.Policy(sizes, profile, args.accuracy_floor, args.target_ms / 1e3))
  limits = Limits(body_bytes=int(args.body_mb * 2**20), pixels=args.max_pixels, read_s=args.read_s)
  settings = Settings(
    batches, (args.only,) if args.only else Settings().what, args.max_wait_ms / 1e3, args.queue,
    token=token, limits=limits,
  )  # fmt: skip
  if args.demo:
    from flexivit_jax.demo import live

    if token:
      raise errors.UserError("--demo asks without a token; leave one of them out.")
    model, settings = live.with_page(model, policy, settings, cascade.sizes if cascade else ())
  if not token and args.host not in ("127.0.0.1", "::1", "localhost"):
    outputs.note(f"everybody who reaches {args.host} may ask; --token_file asks for a token")
  tell = lambda url: print(f"listening at {url}", flush=True)  # noqa: E731
  serving.serve(
    Server(model, policy, settings, cascade), host=args.host, port=args.port, drain_s=args.drain_s, started=tell
  )  # fmt: skip


def _check(args: argparse.Namespace) -> None:
  if min(args.batches) < 1 or len(args.batches) > 8:
    raise errors.UserError(f"--batches={args.batches}; expected 1 to 8 numbers of 1 or more.")
  for name in ("queue", "target_ms", "body_mb", "max_pixels", "read_s"):
    if not getattr(args, name) > 0:
      raise errors.UserError(f"--{name}={getattr(args, name)}; expected more than 0.")
  if not 0 <= args.port < 2**16:
    raise errors.UserError(f"--port={args.port}; expected 0 to {2**16 - 1}, where 0 is a free one.")
  if not (args.max_wait_ms >= 0 and args.drain_s >= 0):
    raise errors.UserError("--max_wait_ms and --drain_s: expected 0 or more.")


def _way(text: str) -> "programs.Way":
  from flexivit_jax.analyses import profiling

  ways = profiling.ways(text)
  if len(ways) > 1:
    raise errors.UserError(f"--way={text}; expected one, e.g. onnx.")
  return ways[0]


def _token(file: pathlib.Path | None) -> str:
  """The token of requests; "": none is needed."""
  if file is None:
    return os.environ.get("FLEXIVIT_TOKEN", "")
  try:
    token = file.read_text().strip()
  except (OSError, UnicodeDecodeError) as e:
    raise errors.UserError(f"--token_file={file} cannot be read: {e}") from e
  if not token:
    raise errors.UserError(
      f"--token_file={file} is empty; expected a token, e.g. of `openssl rand -hex 32`."
    )
  return token


def _cascade(file: pathlib.Path | None, model: "served.Served") -> "Cascade | None":
  from flexivit_jax.budget import cascade
  from flexivit_jax.serving import cascading

  if file is None:
    return None
  if "predict" not in model.what:
    raise errors.UserError("--cascade is of classes, which this model does not have.")
  if model.pictures is not None:
    raise errors.UserError("--cascade is of classes; this model gives masks or boxes.")
  return cascading.check(cascade.read(file), model.weights, model.shape)


def _profile(args: argparse.Namespace, model: "served.Served") -> "Profile | None":
  """The profile of the model on this device; None where there is none beside the weights."""
  from flexivit_jax.budget import profile
  from flexivit_jax.inference import outputs, programs

  path = args.profile or profile.path_of(args.checkpoint, model.digest)
  if model.digest == "" and args.profile is None:
    path = pathlib.Path(args.checkpoint)  # an artifact carries its own
  if args.profile is None and not profile.read(path):
    return None
  found = profile.of(path, model.digest) if model.digest else profile.read(path)
  try:
    return profile.on_device(found, programs.device_name())
  except errors.UserError as e:
    if args.profile is not None:
      raise
    outputs.note(f"served without a profile: {e}")
    return None
