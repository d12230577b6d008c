"""Command lines that work, and everything in which they can be made wrong."""

import contextlib
import functools
import io
import json
import pathlib
import random
import re
import shutil
import tarfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from flexivit_jax import cli, errors

CONFIG = """
import ml_collections
from flexivit_jax.config import parse_arg

def get_config(arg=""):
  arg = parse_arg(arg, data_dir={photos!r}, epochs=1)
  pp = "decode|resize(16)|value_range(-1, 1)|onehot(2)|keep('image', 'labels')"
  data = dict(name="folder", data_dir=arg.data_dir)
  return ml_collections.ConfigDict(dict(
    total_epochs=arg.epochs,
    input=dict(data=dict(data, split="train"), pp=pp, batch_size=4, threads=1),
    model=dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(8, 8), posemb_size=(2, 2)),
    flexi=dict(seqhw=dict(v=(2,))),
    optim=dict(lr=1e-3),
    evals=dict(test=dict(data=dict(data, split="val"), pp=pp, batch_size=4, seqhw=(2,))),
    checkpoint=dict(every_epochs=1),
  ))
"""
# Command lines that work. A name in braces stands for one of the things that `originals` makes.
COMMANDS = {
  "inspect": ["inspect {weights}"],
  "predict": ["predict {image} {image} --checkpoint {weights} --seqhw 2",
    "predict {photos} --checkpoint {weights} --seqhw 2"],
  "embed": ["embed {image} {image} --checkpoint {weights} --seqhw 2 --out {new}.npz"],
  "convert": [
    "convert {weights} {new}.npz --no-verify",
    "convert {weights} {new} --to timm --seqhw 2 --image_size 16 --no-verify",
    "convert {weights} {new} --to transformers --seqhw 2 --image_size 16 --no-verify",
  ],
  "export": ["export {weights} {new}.zip --seqhw 2 --image_size 16 --platforms cpu --no-verify"],
  "eval": ["eval --config {config} --checkpoint {weights}"],
  "flexify": ["flexify --init {weights} --data {photos} --out {new} --epochs 0 --image_size 16 --seqhw 2"],
  "train": [
    "train --config {config} --workdir {run}",
    "train --config {config}:data_dir={photos} --workdir {new}",
    "train --config {config} --workdir {new} --config.init.checkpoint={weights} --config.init.new_head=True",
  ],
  "report": ["report {run} --out {new}"],
  "pack": [
    "pack name=folder data_dir={photos} split=train --out {new}",
    "pack name=folder data_dir={photos} split=train --out {new} --on_bad skip --shard_examples 3",
    "pack name=folder data_dir={photos} split=val --out {packed} --split val --shard_examples 3",
    "pack name=tar data_dir={tars} --out {new}",
    "pack name=parquet data_dir={parquet} label_key=label num_classes=2 --out {new}",
    "pack name=packed data_dir={packed} split=train --out {new} --shard_mb 0.001",
  ],
  "verify": ["verify {weights}", "verify {run}", "verify {export}", "verify {packed}"],
  "replay": ["replay {bad_step}"],
  "plan": ["plan {config}"],
  "bench": ["bench --forward --variant mu --image_size 16 --rounds 1 --seqhw 2 --batch_size 1"],
  "reproduce": ["reproduce --results {results}", "reproduce --list", "reproduce fig7"],
}  # fmt: skip
# fmt: off
ODD = (
  "", " ", "0", "-1", "1", "7", "1.5", "1e-3", "1e400", "nan", "inf", "9" * 20, "x", "2,", ",", "2,2", "2x", "0x0",
  "3x2", "2x2x2", "None", "True", "[]", "{}", "{'a': 1}", "()", "é", "e\u0301", "\U0001f600",
  "a b", "a:b", "a=b", "a,b", "[a]", "*", "~", "~nobody/x", "/", "/dev/null",
  "/nowhere/at/all", "..", "a" * 300, "%s", "{step}", "\\", "'", '"', "$HOME",
  "https://", "https://x.invalid/a.npz", "gs://bucket/run", "-", "--", "all", "balanced",
)
FLAGS = (
  "--seqhw", "--image_size", "--mean", "--std", "--num_heads", "--flexify", "--out", "--xyz", "--batch_size", "--to",
  "--resume", "--on_error", "--top_k", "--ema", "--posemb_size",
)
SECTIONS = (
  "input", "input.data", "model", "optim", "flexi", "evals.test", "checkpoint", "objective", "init", "mesh",
  "total_epochs", "log_every",
)
KEYS = (
  "", ".lr", ".pp", ".batch_size", ".name", ".data_dir", ".split", ".seqhw", ".width", ".checkpoint", ".x", ".keep",
)
NAMES = (
  ".hidden", "@eaDir", "__MACOSX", "Thumbs.db", "a b", "é", "e\u0301", "[x]", "x,y", "x\ny", "-x", "0", "10", "2",
  "CON", "x.jpg", "train",
)
MODES = ("L", "RGBA", "P", "CMYK", "I;16", "F", "1")
TEXTS = ("hello", "{}", "[]", "null", "3", '{"a": NaN}', "\ufeff{}", "<html>404</html>")
ODD_JSON: tuple[Any, ...] = (None, -1, 0, 10**12, 1.5, "x", "", [], {}, [[]], True, float("nan"), "../../x")
# fmt: on


def originals(folder: pathlib.Path) -> dict[str, list[pathlib.Path]]:
  """Makes one of everything that a command reads; returns the paths by kind."""
  rng = np.random.default_rng(0)
  photos = folder / "photos"
  for split, number in (("train", 4), ("val", 2)):
    for k, name in enumerate(("cat", "dog")):
      (photos / split / name).mkdir(parents=True)
      for i in range(number):
        pixels = (rng.integers(0, 60, (20, 24, 3)) + 90 * k).astype(np.uint8)
        Image.fromarray(pixels).save(photos / split / name / f"{i}.jpg")
  config = folder / "tiny.py"
  config.write_text(CONFIG.format(photos=str(photos)))
  run = folder / "run"
  _works("train", "--config", config, "--workdir", run)
  _works("convert", run, folder / "ours.npz", "--no-verify")
  small = ("--seqhw", 2, "--image_size", 16)
  _works("convert", run, folder / "timm", "--to", "timm", *small, "--no-verify")
  _works("convert", run, folder / "transformers", "--to", "transformers", *small, "--no-verify")
  _works("export", run, folder / "export.zip", *small, "--platforms", "cpu", "--no-verify")
  shutil.copy(folder / "timm" / "model.safetensors", folder / "bare.safetensors")
  _works(
    "pack",
    "name=folder",
    f"data_dir={photos}",
    "split=train",
    "--out",
    folder / "packed",
    "--shard_examples",
    3,
  )
  _archives(photos / "train", folder)
  weights = [run, folder / "ours.npz", folder / "timm", folder / "transformers"]
  weights += _others(folder, folder / "bare.safetensors")
  (run / "bad_step.json").write_text(
    json.dumps({"step": 1, "size": {"seqhw": 2}, "measured": {"loss": "nan"}, "ids": None})
  )
  return {
    "weights": weights,
    "image": sorted(photos.rglob("*.jpg"))[:2],
    "photos": [photos],
    "config": [config],
    "run": [run],
    "export": [folder / "export.zip"],
    "bad_step": [run / "bad_step.json"],
    "results": [run / "eval.json"],
    "packed": [folder / "packed"],
    "tars": [folder / "tars"],
    "parquet": [folder / "parquet"],
  }


def _archives(images: pathlib.Path, folder: pathlib.Path) -> None:
  """The images as tar shards and as parquet."""
  import pyarrow as pa
  import pyarrow.parquet as pq

  paths = sorted(images.rglob("*.jpg"))
  (folder / "tars").mkdir()
  for k in range(2):
    with tarfile.open(folder / "tars" / f"{k}.tar", "w") as archive:
      for i, path in enumerate(paths[k::2]):
        for suffix, data in (("jpg", path.read_bytes()), ("txt", b"a"), ("json", b'{"a": 1}')):
          info = tarfile.TarInfo(f"{i}.{suffix}")
          info.size = len(data)
          archive.addfile(info, io.BytesIO(data))
  (folder / "parquet").mkdir()
  cells = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
  rows = pa.table({"image": cells, "label": [k % 2 for k in range(len(paths))]})
  pq.write_table(rows, folder / "parquet" / "a.parquet", row_group_size=3)


def _works(*argv: Any) -> None:
  with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
    code = cli.main([str(a) for a in argv])
  if code:
    raise errors.UserError(f"`flexivit {argv[0]}` does not work to begin with: {said.getvalue()}")


def _others(folder: pathlib.Path, bare: pathlib.Path) -> list[pathlib.Path]:
  """The same weights in timm's names as .safetensors, .npz and, where PyTorch is installed, .pth."""
  from safetensors import numpy

  arrays: dict[str, Any] = numpy.load_file(bare)
  np.savez(folder / "names.npz", **arrays)
  made = [bare, folder / "names.npz"]
  with contextlib.suppress(ImportError):
    import torch  # an input of this tool, where it is installed; nothing here needs it

    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "torch.pth")
    made.append(folder / "torch.pth")
  return made


# --- what is made wrong ---


def damage(rng: random.Random, path: pathlib.Path) -> str:
  """Damages a file, or one in a folder; says how."""
  if path.is_dir():
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return damage(rng, rng.choice(files)) if files else "empty folder"
  ways = [_flip, _cut, _overwrite, _empty, _delete, _to_folder, _to_text]
  if path.suffix == ".json":
    ways += [_odd_json] * 6
  if path.suffix in (".npz", ".safetensors", ".pth"):
    ways += [_header] * 2
  way = rng.choice(ways)
  way(rng, path)
  return f"{way.__name__.strip('_')} {path.name}"


def _flip(rng: random.Random, path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes() or b"\0")
  for _ in range(rng.choice((1, 1, 8))):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
  path.write_bytes(data)


def _cut(rng: random.Random, path: pathlib.Path) -> None:
  path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size + 1)])


def _overwrite(rng: random.Random, path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  at = rng.randrange(len(data) + 1)
  data[at : at + 64] = rng.randbytes(64)
  path.write_bytes(data)


def _header(rng: random.Random, path: pathlib.Path) -> None:
  data = bytearray(path.read_bytes())
  for _ in range(rng.choice((1, 4))):
    data[rng.randrange(min(400, len(data)))] = rng.randrange(256)
  path.write_bytes(data)


def _empty(rng: random.Random, path: pathlib.Path) -> None:
  path.write_bytes(b"")


def _delete(rng: random.Random, path: pathlib.Path) -> None:
  path.unlink()


def _to_folder(rng: random.Random, path: pathlib.Path) -> None:
  path.unlink()
  path.mkdir()


def _to_text(rng: random.Random, path: pathlib.Path) -> None:
  path.write_text(rng.choice(TEXTS))


def _odd_json(rng: random.Random, path: pathlib.Path) -> None:
  """Replaces or removes a value somewhere in a JSON file."""
  try:
    content = json.loads(path.read_text())
  except ValueError:
    return _to_text(rng, path)
  at = content
  while isinstance(at, (dict, list)) and at:
    key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
    if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.7:
      at = at[key]
      continue
    if rng.random() < 0.3 and isinstance(at, dict):
      del at[key]
    else:
      at[key] = rng.choice(ODD_JSON)
    break
  path.write_text(json.dumps(content))


def odd_tree(rng: random.Random, root: pathlib.Path) -> str:
  """Puts something into a folder of images that such folders have; says what."""
  folders = [root, *sorted(p for p in root.rglob("*") if p.is_dir())]
  where = rng.choice(folders)
  name = rng.choice(NAMES)
  ways: dict[str, Callable[[], Any]] = {
    "folder": (where / name).mkdir,
    "text": lambda: (where / name).write_text("no image"),
    "image": lambda: Image.new(rng.choice(MODES), (9, 9)).save(where / f"{name}.tif"),
    "loop": lambda: (where / name).symlink_to(root, target_is_directory=True),
    "broken link": lambda: (where / f"{name}.jpg").symlink_to("nowhere"),
    "no images": functools.partial(_remove_images, where),
    "removed": functools.partial(shutil.rmtree, where),
    "damaged": lambda: damage(rng, rng.choice(sorted(root.rglob("*.jpg")))),
    "huge": lambda: (where / "huge.png").write_bytes(_huge_png()),
    "renamed": lambda: where.rename(where.with_name(f"{where.name}_")),
  }  # fmt: skip
  way = rng.choice(list(ways))
  with contextlib.suppress(OSError, ValueError, IndexError):  # it may be there already
    ways[way]()
  return f"{way} in {where.name}"


def _remove_images(folder: pathlib.Path) -> None:
  for path in folder.rglob("*.jpg"):
    path.unlink()


def _huge_png() -> bytes:
  """A small file whose header promises 60000 x 60000 pixels."""
  buffer = io.BytesIO()
  Image.new("L", (8, 8)).save(buffer, "PNG")
  data = bytearray(buffer.getvalue())
  data[16:24] = (60000).to_bytes(4, "big") * 2
  return bytes(data)


@functools.cache
def _flags(command: str) -> list[str]:
  """The options of a command that take a value, by its own help."""
  said = io.StringIO()
  with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
    cli.main([command, "--help"])
  options = re.findall(r"^  (--\w+) [A-Z{]", said.getvalue(), re.MULTILINE)
  return [option for option in options if option not in ("--config", "--checkpoint")]


def odd_argument(rng: random.Random, argv: list[str], command: str) -> str:
  """Changes a command line; says how."""
  way = rng.choice(("value", "value", "value", "drop", "add", "twice", "override", "override"))
  at = rng.randrange(1, len(argv)) if len(argv) > 1 else 0
  if way == "value" and at:
    argv[at] = rng.choice(ODD) if not argv[at].startswith("--") else f"{argv[at]}={rng.choice(ODD)}"
  elif way == "drop" and at:
    del argv[at]
  elif way == "twice":
    argv.append(argv[at])
  elif way == "override" and command in ("train", "eval", "plan"):
    argv.append(f"--config.{rng.choice(SECTIONS)}{rng.choice(KEYS)}={rng.choice(ODD)}")
  else:
    known = _flags(command)
    argv += [rng.choice(known if known and rng.random() < 0.8 else FLAGS), rng.choice(ODD)]
  return f"{way} {argv[at] if at < len(argv) else ''}"


def bad_input(
  number: int, seed: int, made: dict[str, list[pathlib.Path]], work: pathlib.Path
) -> tuple[str, list[str], str]:
  """Returns (command, its command line, what is wrong in it) of an input; makes its files in `work`."""
  rng = random.Random(f"{seed}/{number}")
  command = list(COMMANDS)[number % len(COMMANDS)]
  argv, wrong, copies = [], [], {}
  for word in rng.choice(COMMANDS[command]).split():
    for kind in (kind for kind in made if f"{{{kind}}}" in word):
      copies[kind] = copy(rng.choice(made[kind]), work)
    argv.append(word.format(new=work / "new", **copies))
  readable = list(copies)
  for _ in range(rng.choice((1, 1, 2))):
    way = rng.choice(("damage", "damage", "tree", "argument", "swap"))
    if way == "damage" and readable:
      path = copies[rng.choice(readable)]
      wrong.append(damage(rng, path) if path.exists() else f"gone {path.name}")
    elif way == "tree" and "photos" in copies and copies["photos"].is_dir():
      wrong.append(odd_tree(rng, copies["photos"]))
    elif way == "swap" and readable:
      old = copies[rng.choice(readable)]
      new = copy(rng.choice(made[rng.choice(list(made))]), work)
      argv = [word.replace(str(old), str(new)) for word in argv]
      wrong.append(f"{new.name} in the place of {old.name}")
    else:
      wrong.append(odd_argument(rng, argv, command))
  return command, argv, "; ".join(wrong)


def copy(source: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
  """A copy of an original, to be made wrong."""
  target = work / f"{len(list(work.iterdir()))}" / source.name
  target.parent.mkdir(parents=True)
  (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
  return target
