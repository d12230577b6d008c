"""Turns emoji_captions_96.npz into images with captions: OUT/train, OUT/val, OUT/test, each with metadata.jsonl.

With --cutouts, into cut-outs with names for the data set `scenes`: OUT/metadata.jsonl and a PNG with alpha for each.

Usage:
  python tools/maintain/unpack_emoji.py emoji_captions_96.npz emoji
  python tools/maintain/unpack_emoji.py emoji_captions_96.npz emoji_de --language de
  python tools/maintain/unpack_emoji.py emoji_captions_96.npz control --shuffled
  python tools/maintain/unpack_emoji.py emoji_captions_96.npz cutouts --cutouts --without flags

A caption is the label; in English three tags follow. All skin tones of a symbol are in one split, chosen by a hash of
its code and --seed: a fifth for test, a tenth for val. val and test hold symbols without skin tone alone. Of cut-outs
the fifth for test is called novel; there are no keycaps among them, and no skin tones.
"""

import argparse
import hashlib
import io
import itertools
import json
import pathlib
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from flexivit_jax import cli
from flexivit_jax.trees import Json

_TONE = re.compile(r"-1f3f[b-f]")
LANGUAGES = ("en", "de", "fr", "es", "it", "ja", "zh", "ru", "pt")


def split_of(hexcode: str, seed: int) -> str:
  """Returns the split of a symbol, whatever its skin tone."""
  symbol = f"{seed} {_TONE.sub('', hexcode)}"
  place = int(hashlib.sha256(symbol.encode()).hexdigest()[:8], 16) / 2**32
  return "test" if place < 0.2 else "val" if place < 0.3 else "train"


def caption_of(row: Json, language: str) -> str:
  """Returns the label, in English with the first three tags that it does not hold."""
  label = " ".join(row[f"label_{language}"].split())
  tags = [tag for tag in row["tags"] if tag not in label.lower()][:3]
  return ", ".join([label, *tags]) if language == "en" else label


def write(
  out: pathlib.Path, images: Sequence[bytes], rows: Sequence[Json], captions: Sequence[str]
) -> None:
  """Writes one split: images on white, and what they show."""
  out.mkdir(parents=True)
  lines = []
  for encoded, row, caption in zip(images, rows, captions, strict=True):
    picture = Image.open(io.BytesIO(encoded)).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(white, picture).convert("RGB").save(out / f"{row['hexcode']}.png")
    names = {"file_name": f"{row['hexcode']}.png", "text": caption, "group": row["group"]}
    lines.append(json.dumps(names, ensure_ascii=False))
  (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_cut_outs(
  out: pathlib.Path, images: Sequence[bytes], meta: Sequence[Json], seed: int
) -> None:
  """Writes the symbols without skin tone or keycap, and which of them are novel."""
  out.mkdir(parents=True)
  lines = []
  for encoded, row in zip(images, meta, strict=True):
    if row["tone"] or row["subgroup"] == "keycap":
      continue
    file = f"{row['hexcode']}.png"
    Image.open(io.BytesIO(encoded)).convert("RGBA").save(out / file)
    novel = split_of(row["hexcode"], seed) == "test"
    name = " ".join(row["label_en"].split())
    lines.append(json.dumps({"file_name": file, "name": name, "novel": novel}, ensure_ascii=False))
  (out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
  print(f"{out}: {len(lines)} cut-outs")


def main() -> None:
  """Writes the folders."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument("npz", type=pathlib.Path)
  parser.add_argument("out", type=pathlib.Path)
  parser.add_argument("--language", choices=LANGUAGES, default="en")
  parser.add_argument("--seed", type=int, default=0, help="of the splits")
  parser.add_argument("--tones", action="store_true", help="train on symbols with skin tones, too")
  parser.add_argument("--without", nargs="*", default=[], help="groups to leave out, e.g. flags")
  parser.add_argument("--shuffled", action="store_true", help="captions of other images: a control")
  parser.add_argument("--cutouts", action="store_true", help="cut-outs with names, for scenes")
  args = parser.parse_args()
  with np.load(args.npz) as archive:
    data, offsets = archive["webp"].tobytes(), archive["offsets"]
    meta = json.loads(archive["meta"].tobytes())
  images = [data[a:b] for a, b in itertools.pairwise(offsets)]
  if args.cutouts:
    chosen = [i for i, row in enumerate(meta) if row["group"] not in args.without]
    write_cut_outs(args.out, [images[i] for i in chosen], [meta[i] for i in chosen], args.seed)
    return
  for split in ("train", "val", "test"):
    chosen = [
      i
      for i, row in enumerate(meta)
      if split_of(row["hexcode"], args.seed) == split
      and row["group"] not in args.without
      and (not row["tone"] or (args.tones and split == "train"))
    ]
    rows = [meta[i] for i in chosen]
    captions = [caption_of(row, args.language) for row in rows]
    if args.shuffled:
      order = np.random.default_rng(args.seed).permutation(len(captions))
      captions = [captions[k] for k in order]
    write(args.out / split, [images[i] for i in chosen], rows, captions)
    print(f"{args.out / split}: {len(rows)} images")


if __name__ == "__main__":
  cli.tool(main)
