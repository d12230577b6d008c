"""The published checkpoints by name: where each is, and what model it must be.

Sources: files and epochs: google-research/big_vision, configs/proj/flexivit/README.md; its own names: VANITY_NAMES in
models/proj/flexi/vit.py; what timm's names are made of: the addresses in timm/models/vision_transformer.py. Pool and
position grid: big_vision's FlexiViT configs and the paper's default; classes: those and timm. How large the stored
kernel is, is written only where the authors say so; no hash is known.
"""

import os
import pathlib
import re
import urllib.parse
from typing import Any, NamedTuple

from flexivit_jax import errors, storage
from flexivit_jax.models import FlexiViT, vit
from flexivit_jax.running import bucket_run
from flexivit_jax.weights import download
from flexivit_jax.weights.big_vision import Fields


class Published(NamedTuple):
  """A published file.

  Attributes:
    name: big_vision's own name for it, or that of the file without suffix.
    url: its address.
    expected: fields of the FlexiViT that it must hold, as far as they are known.
    note: what a user should know.
    timm: the name that the same weights have in timm, or "".
    sha256: of the file; None: not known.
  """

  name: str
  url: str
  expected: Fields
  note: str = ""
  timm: str = ""
  sha256: str | None = None


_CLASSES = {"i1k": 1000, "i21k": 21843}


def _file(file: str, note: str, name: str = "", timm: str = "", **expected: Any) -> Published:
  _, variant, data, *_ = file.split("_")
  expected |= dict(variant=variant[0].upper(), num_classes=_CLASSES[data])
  expected |= dict(pool_type="tok", posemb="learn", posemb_size=(7, 7))
  url = f"https://storage.googleapis.com/big_vision/flexivit/{file}.npz"
  if timm:
    note += (
      " timm's file of these weights has the kernel resized for one patch size; here it is whole."
    )
  return Published(name or file, url, expected, note, timm)


def _baseline(file: str, seqhw: int, name: str, timm: str) -> Published:
  note = (
    f"A baseline, not flexible: trained at one patch size, seqhw={seqhw} in 240x240 pixels, though its kernel is"
    " stored with 32x32 pixels (google-research/big_vision issue 31)."
  )
  return _file(file, note, name, timm, patch_size=(32, 32))


_FILES = (
  _file("flexivit_s_i1k", "1200 epochs.", "FlexiViT-S i1k", "flexivit_small.1200ep_in1k"),
  _file("flexivit_s_i1k_600ep", "600 epochs.", timm="flexivit_small.600ep_in1k"),
  _file("flexivit_s_i1k_300ep", "300 epochs.", timm="flexivit_small.300ep_in1k"),
  _file("flexivit_s_i1k_90ep", "90 epochs."),
  _file("flexivit_b_i1k", "1200 epochs.", "FlexiViT-B i1k", "flexivit_base.1200ep_in1k"),
  _file("flexivit_b_i1k_600ep", "600 epochs.", timm="flexivit_base.600ep_in1k"),
  _file("flexivit_b_i1k_300ep", "300 epochs.", timm="flexivit_base.300ep_in1k"),
  _file("flexivit_b_i1k_90ep", "90 epochs."),
  _file("flexivit_l_i1k", "1200 epochs.", "FlexiViT-L i1k", "flexivit_large.1200ep_in1k"),
  _file("flexivit_l_i1k_600ep", "600 epochs.", timm="flexivit_large.600ep_in1k"),
  _file("flexivit_l_i1k_300ep", "300 epochs.", timm="flexivit_large.300ep_in1k"),
  _file("flexivit_l_i1k_90ep", "90 epochs."),
  _file(
    "flexivit_b_i21k_1000ep",
    "1000 epochs: better than the paper's.",
    "FlexiViT-B i21k 1000ep",
    "flexivit_base.1000ep_in21k",
  ),
  _file(
    "flexivit_b_i21k_300ep",
    "300 epochs: the paper's.",
    "FlexiViT-B i21k 300ep",
    "flexivit_base.300ep_in21k",
  ),
  _file("flexivit_b_i21k_90ep", "90 epochs.", "FlexiViT-B i21k 90ep"),
  _baseline("vit_b16_i21k_300ep", 15, "ViT-B/16 i21k", "flexivit_base.patch16_in21k"),
  _baseline("vit_b30_i21k_300ep", 8, "ViT-B/30 i21k", "flexivit_base.patch30_in21k"),
)

PUBLISHED: dict[str, Published] = {
  name: file
  for file in _FILES
  for name in (file.name, pathlib.PurePosixPath(file.url).stem, file.timm)
  if name
}


def find(path: str | os.PathLike[str]) -> tuple[pathlib.Path, Published | None]:
  """Returns what is to be read, and what it must be: of a published name or an address, the file that was fetched.

  Of a run in a bucket, s3://BUCKET/RUN or gs://BUCKET/RUN, its newest checkpoint is.

  A file or folder that is there is taken before a published one of that name.

  Raises:
    UserError: it cannot be fetched, or the address is not one of weights.
  """
  # pathlib makes "https:/host" of an address.
  text = re.sub(r"^(https?):/(?=[^/])", r"\1://", os.fspath(path))
  if storage.address(path) is not None:
    return bucket_run.fetched(path, bucket_run.newest_checkpoint), None
  if text.startswith(("http://", "https://")):
    published = _at(text)
  elif text in PUBLISHED and not pathlib.Path(text).exists():
    published = PUBLISHED[text]
  else:
    return pathlib.Path(text), None
  return download.fetch(published.url, sha256=published.sha256), published


def is_here(name: str) -> bool:
  """Tells whether a published checkpoint is in the cache; other names are here if they are files or folders."""
  if name not in PUBLISHED or pathlib.Path(name).exists():
    return pathlib.Path(name).exists()
  return download.is_kept(PUBLISHED[name].url)


def _at(url: str) -> Published:
  """Returns the published file at an address, or one of which nothing is expected."""
  file = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path)
  if file.suffix not in (".npz", ".safetensors"):
    raise errors.UserError(f"{url}: expected the address of an .npz or .safetensors file.")
  return {p.url: p for p in PUBLISHED.values()}.get(url, Published(file.stem, url, {}))


def differences(model: FlexiViT, expected: Fields) -> list[str]:
  """Returns a line for each field in which a model differs from what is expected; "variant" stands for its fields."""
  wanted = dict(expected)
  if "variant" in wanted:
    wanted |= vit.decode_variant(wanted.pop("variant"))
  return [
    f"{name}: expected {value}, got {getattr(model, name)}"
    for name, value in wanted.items()
    if getattr(model, name) != value
  ]


def check(published: Published, model: FlexiViT, file: pathlib.Path) -> None:
  """Raises a UserError that lists every field in which a file's model is not the one that was published."""
  if lines := differences(model, published.expected):
    raise errors.UserError(
      f"The file at {published.url} is not the {published.name} that was published. Where that is known and meant,"
      f" load {file} by its path:\n  " + "\n  ".join(lines)
    )
