"""`flexivit bench`: what each patch size costs on this machine; see `experiment.benchmarks`."""

import argparse
from collections.abc import Callable

from flexivit_jax import errors, sizes
from flexivit_jax.commands import options

HELP = "what each patch size costs on this machine"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """What to measure, and with which model."""
  p.add_argument("--forward", action="store_true", help="inference at each size")
  p.add_argument("--train", action="store_true", help="a training step at each size")
  p.add_argument("--compile", action="store_true", help="tracing and compiling each training step")
  p.add_argument("--step", metavar="CONFIG", help="a config's own training step at each size")
  p.add_argument("--input", metavar="CONFIG", help="a config's training images: reading to batches")
  p.add_argument("--startup", metavar="CONFIG", help="from the command to the first step")
  p.add_argument("--variant", default="S", help="S (the default), B, L, ...")
  p.add_argument("--batch_size", type=int, default=8, help="default 8")
  p.add_argument("--image_size", type=int, default=240, help="pixels a side (default 240)")
  p.add_argument(
    "--seqhw", help="tokens per side, e.g. 5,8,4x6 (default: 'all', patches of 8 to 48 pixels)"
  )
  p.add_argument("--dtype", help="float32 or bfloat16 (default: float32 on CPUs)")
  p.add_argument(
    "--attention",
    default="auto",
    help="a form of models/attention.py (default: auto); 'all': each that can run here, forward and in training",
  )
  p.add_argument(
    "--memory_gib",
    type=float,
    help="for --train and --compile: as few microbatches as fit into this memory (default: one)",
  )
  p.add_argument("--rounds", type=int, default=7, help="the median of these is shown (default 7)")
  p.add_argument("--out", type=options.path, help="a CSV file to write")
  options.add_overrides(p)


def run(args: argparse.Namespace) -> None:
  """Prints a table for each thing asked for, and writes them all to args.out."""
  import jax

  from flexivit_jax import config
  from flexivit_jax.devices import timing
  from flexivit_jax.experiment import benchmarks
  from flexivit_jax.experiment.loaders import default_dtype
  from flexivit_jax.models import FlexiViT, grid

  for name in ("batch_size", "image_size", "rounds"):
    if getattr(args, name) < 1:
      raise errors.UserError(f"--{name}={getattr(args, name)}; expected at least 1.")
  tables: dict[str, list[benchmarks.BenchRow]] = {}
  every_form = args.attention == "all"
  if every_form and not (args.forward or args.train or args.compile):
    args.forward = args.train = True
  if args.forward or args.train or args.compile:
    model = FlexiViT(
      num_classes=1000,
      variant=args.variant,
      dtype=args.dtype or default_dtype(),
      attention="auto" if every_form else args.attention,
    )
    every = grid.paper_sizes(args.image_size)
    lacking = f"no patch of 8 to 48 pixels divides {args.image_size} pixels"
    seqhw = sizes.parse(args.seqhw or "all", every, lacking)
    peak = timing.matmul_peak(model.dtype)
    setting = benchmarks.Setting(args.batch_size, args.image_size, args.rounds, peak)
    print(
      f"{jax.devices()[0].device_kind}: {peak / 1e9:.4g} GFLOP/s in a {model.dtype} matrix product"
    )
    forms = benchmarks.forms(model) if every_form else []
    parts: dict[str, Callable[[FlexiViT], list[benchmarks.BenchRow]]] = {}
    if args.forward:
      parts["forward"] = lambda model: benchmarks.forward(model, seqhw, setting)
    if args.train:
      parts["train"] = lambda model: benchmarks.train(model, seqhw, setting, args.memory_gib)
    if args.compile:
      parts["compile"] = lambda model: benchmarks.compiling(
        model, seqhw, args.batch_size, args.image_size, args.memory_gib
      )
    for name, measure in parts.items():
      tables[name] = benchmarks.each_form(measure, model, forms) if every_form else measure(model)
  if args.step:
    settings = config.load(args.step, args.overrides)
    tables["step"] = benchmarks.stepping(settings, args.rounds)
  if args.input:
    tables["input"] = [benchmarks.reading(config.load(args.input, args.overrides))]
  if args.startup:
    tables["startup"] = benchmarks.starting(args.startup)
  if not tables:
    raise errors.UserError(
      "Nothing to measure; give --forward, --train, --compile, --step CONFIG, --input CONFIG or --startup CONFIG."
    )
  for name, rows in tables.items():
    print(f"\n{name}\n{benchmarks.table(rows)}")
  if args.out:
    benchmarks.write(args.out, tables)
    print(f"\nwrote {args.out}")
