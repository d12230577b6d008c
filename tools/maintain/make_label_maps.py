"""Makes the lists of flexivit_jax/label_maps from the class lists of timm's wheel and ObjectNet's own mapping files.

    pip download timm --no-deps && unzip timm-*.whl 'timm/data/_info/*'
    python tools/maintain/make_label_maps.py --timm timm/data/_info --objectnet objectnet-1.0/mappings

--objectnet is the folder `mappings` of ObjectNet's archive; without it objectnet.json is left as it is. Any
contradiction between the files is an error. Prints what it wrote, and the classes that ImageNet-21k lacks.
"""

import argparse
import json
import pathlib
from collections.abc import Iterable

from flexivit_jax import cli
from flexivit_jax.errors import UserError

OUT = pathlib.Path(__file__).resolve().parents[2] / "flexivit_jax" / "data" / "label_maps"


def main() -> None:
  """Writes the files."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--timm", type=pathlib.Path, required=True)
  parser.add_argument("--objectnet", type=pathlib.Path)
  parser.add_argument("--out", type=pathlib.Path, default=OUT)
  args = parser.parse_args()
  i1k = read_ids(args.timm / "imagenet_synsets.txt")
  i21k = {wnid: i for i, wnid in enumerate(read_ids(args.timm / "imagenet21k_goog_synsets.txt"))}
  for i, wnid in enumerate(i1k):
    if wnid not in i21k:
      print(f"Class {i} ({wnid}) is not in ImageNet-21k: -1")
  write(args.out / "i21k_i1k.txt", lines(i21k.get(wnid, -1) for wnid in i1k))
  for name in ("a", "r"):
    write(args.out / f"i1k_{name}.txt", lines(subset(args.timm, name, i1k)))
  if args.objectnet:
    names = class_names(args.timm / "imagenet_synset_to_lemma.txt", i1k)
    write(args.out / "objectnet.json", json_lines(objectnet(args.objectnet, names)))


def read_ids(path: pathlib.Path) -> list[str]:
  """The WordNet ids of a file, one a line; they have to differ."""
  ids = path.read_text().split()
  if len(set(ids)) < len(ids):
    raise UserError(f"{path} has an id twice.")
  return ids


def subset(folder: pathlib.Path, name: str, i1k: list[str]) -> list[int]:
  """The ImageNet-1k classes of ImageNet-A or -R; timm's indices and its ids have to agree."""
  ids = read_ids(folder / f"imagenet_{name}_synsets.txt")
  indices = [int(i) for i in read_ids(folder / f"imagenet_{name}_indices.txt")]
  if [i1k.index(wnid) for wnid in ids] != indices or indices != sorted(indices):
    raise UserError(f"imagenet_{name}_indices.txt and imagenet_{name}_synsets.txt disagree.")
  return indices


def class_names(path: pathlib.Path, i1k: list[str]) -> dict[str, int]:
  """Name, as in ObjectNet's files -> ImageNet-1k class; a name of several classes (crane) is left out."""
  lemmas = dict(line.split("\t") for line in path.read_text().splitlines())
  names = [lemmas[wnid] for wnid in i1k]
  return {name: i for i, name in enumerate(names) if names.count(name) == 1}


def objectnet(folder: pathlib.Path, names: dict[str, int]) -> dict[str, list[int]]:
  """ObjectNet's folder -> the ImageNet-1k classes that it is; no class may be of two folders."""
  folder_of = {v: k for k, v in read_json(folder / "folder_to_objectnet_label.json").items()}
  classes = read_json(folder / "objectnet_to_imagenet_1k.json")
  found = {folder_of[k]: sorted(names[n] for n in v.split("; ")) for k, v in classes.items()}
  everything = [c for of_folder in found.values() for c in of_folder]
  if len(set(everything)) < len(everything) or len(found) < len(classes):
    raise UserError(f"{folder}: a class of ImageNet belongs to two of ObjectNet.")
  return dict(sorted(found.items()))


def read_json(path: pathlib.Path) -> dict[str, str]:
  """The content of a JSON file."""
  return json.loads(path.read_text())


def lines(numbers: Iterable[int]) -> str:
  """One number a line."""
  return "".join(f"{n}\n" for n in numbers)


def json_lines(rows: dict[str, list[int]]) -> str:
  """One key a line."""
  return "{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in rows.items()) + "\n}\n"


def write(path: pathlib.Path, text: str) -> None:
  """Writes a file and says so."""
  path.write_text(text)
  print(f"{path}: {len(text.splitlines())} lines")


if __name__ == "__main__":
  cli.tool(main)
