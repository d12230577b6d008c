"""`flexivit tokenizer KEY=VALUE ... --out tokenizer.json`: a tokenizer of your own captions; see `data.text.train`."""

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from flexivit_jax import errors
from flexivit_jax.commands import options

if TYPE_CHECKING:
  from flexivit_jax.data import Source

HELP = "make a tokenizer.json of the captions of a data set"


def add_arguments(p: argparse.ArgumentParser) -> None:
  """The data, the file, the size."""
  p.add_argument(
    "data",
    nargs="+",
    metavar="KEY=VALUE",
    help="the keys of a config's data section, e.g. name=captions data_dir=photos split=train",
  )
  p.add_argument("--out", required=True, type=options.path, help="the file to write")
  p.add_argument("--size", type=int, default=4096, help="tokens at most (default 4096)")


def run(args: argparse.Namespace) -> None:
  """Writes the tokenizer, and prints how long the captions are in its tokens."""
  import numpy as np

  from flexivit_jax import config, data, files
  from flexivit_jax.data import text

  values = options.data_values(args.data)
  config.check("data", values, data.make_source)
  if args.out.exists():
    raise errors.UserError(f"{args.out} is there already; remove it or give another name.")
  captions = list(_captions(data.make_source(**values)))
  tokenizer = text.train(captions, args.size)
  files.write_atomically(args.out, tokenizer)
  tokens = text.load(args.out, length=2, pad=text.PAD, end=text.END)
  lengths = [tokens.full_length(caption) for caption in captions if caption.strip()]
  most, longest = int(np.percentile(lengths, 99, method="higher")), max(lengths)
  print(
    f"{args.out}: {tokens.vocab_size:,} tokens, made of {len(captions):,} captions; 99 % have at most {most}, the"
    f" longest {longest}. In a config: tokenize({str(args.out)!r}, length={most}, pad={text.PAD!r}, end={text.END!r}),"
    f" model.text.vocab_size={tokens.vocab_size}, model.text.max_length={most}"
  )


def _captions(source: "Source") -> Iterator[str]:
  """All captions, without reading images where that is possible."""
  records = source.listing() if source.listing else (source[i] for i in range(len(source)))
  for record in records:
    if "captions" not in record:
      raise errors.UserError(
        f"{source.name} {source.split!r} has no captions; expected data with captions, see docs/annotated_data.md."
      )
    yield from record["captions"]
