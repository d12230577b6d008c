"""Writes a vector of each name, made by a text tower: what `query_vectors` in pp and detectors of vectors read.

Usage:
  python tools/maintain/name_vectors.py cutouts/metadata.jsonl --text minilm --out names.npz
  python tools/maintain/name_vectors.py cutouts/metadata.jsonl --text minilm --out shuffled.npz --shuffled
  python tools/maintain/name_vectors.py names.txt --text minilm --out names.npz --template "a photo of a {}."

names: a .jsonl with "name" in each line, or a file of one name a line. text: what `weights.text.load` reads, with its
tokenizer, e.g. the folder of all-MiniLM-L6-v2. --shuffled gives each name the vector of another one: a control. The
file has "names" [k] and "vectors" float32 [k, d], of length 1.
"""

import argparse
import json
import pathlib

import jax
import numpy as np
from jaxtyping import Float32

from flexivit_jax import cli, errors
from flexivit_jax.data import prompts, text
from flexivit_jax.weights import text as text_towers

_ROWS = 64  # names at a time


def names_of(path: pathlib.Path) -> tuple[str, ...]:
  """Returns the names of a file, each once."""
  if path.suffix != ".jsonl":
    names = prompts.listed(str(path), "names")
  else:
    names = tuple(json.loads(line)["name"] for line in path.read_text("utf-8").splitlines())
  return prompts.class_texts(names, plain=False)


def vectors_of(sentences: list[str], tower: str) -> Float32[np.ndarray, "k d"]:
  """Returns a unit vector of each sentence."""
  model, params, record = text_towers.load(tower)
  if "text" not in record:
    raise errors.UserError(f"{tower} has no tokenizer; expected a folder with tokenizer.json.")
  tokens = text.of_record({**record["text"], "length": min(32, record["text"]["length"])})
  program = jax.jit(lambda rows: model.apply({"params": params}, rows)[0])
  rows = tokens.encode(sentences)
  padded = np.concatenate([rows, rows[:1].repeat(-len(rows) % _ROWS, axis=0)])
  parts = [np.asarray(program(block)) for block in padded.reshape(-1, _ROWS, rows.shape[1])]
  made = np.concatenate(parts)[: len(rows)].astype(np.float32)
  return made / np.linalg.norm(made, axis=-1, keepdims=True)


def main() -> None:
  """Writes the file."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("names", type=pathlib.Path)
  parser.add_argument("--text", required=True, help="a text tower")
  parser.add_argument("--out", required=True, type=pathlib.Path, help="a .npz file")
  parser.add_argument("--template", default="{}", help="a sentence with {} (default: the name)")
  parser.add_argument("--shuffled", action="store_true", help="vectors of other names: a control")
  parser.add_argument("--seed", type=int, default=0, help="of --shuffled")
  args = parser.parse_args()
  names = names_of(args.names)
  vectors = vectors_of([prompts.sentence(args.template, name) for name in names], args.text)
  if args.shuffled:
    vectors = vectors[np.random.default_rng(args.seed).permutation(len(names))]
  np.savez(args.out, names=np.array(names), vectors=vectors)
  print(f"{args.out}: {len(names)} names, vectors of {vectors.shape[1]} numbers")


if __name__ == "__main__":
  cli.tool(main)
