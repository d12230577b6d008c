"""Where pictures of answers go: one file, or a folder with a picture for each image, and one for each size."""

import io
import os
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from flexivit_jax import errors, files
from flexivit_jax.inference import outputs
from flexivit_jax.sizes import Patch, SeqHw, size_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
Sizes = Sequence[SeqHw | Patch]
Paths = dict[tuple[str, str], pathlib.Path]  # of each (file, size) as `size_text` has it


def targets(
  option: str,
  out: pathlib.Path | None,
  suffixes: Sequence[str],
  files_: Sequence[str],
  sizes: Sizes,
) -> Paths:
  """Returns the file of each image at each size; {} where no pictures are asked for.

  A name with a suffix is the one file of one image at one size. A name without is a folder: each image's picture has
  its path there, as .png; several sizes have a folder each.

  Args:
    option: the option that names the file or folder.
    out: its value.
    suffixes: that the file may have.
    files_: the images.
    sizes: at which each has a picture.

  Raises:
    UserError: another suffix; one file for several pictures.
  """
  if out is None:
    return {}
  texts = [str(size_text(size)) for size in sizes]
  is_folder = out.is_dir() or not out.suffix
  if not is_folder:
    outputs.check_new(out, suffixes, True, option)
    if len(files_) > 1 or len(sizes) > 1:
      raise errors.UserError(
        f"{option}={out} is one file, and there are {len(files_)} images at {len(sizes)} sizes; give a folder, a name"
        f" without a suffix: {option}={out.with_suffix('')}."
      )
    return {(file, text): out for file in files_ for text in texts}
  names = _names_in_folder(files_)
  folders = {text: out / text if len(texts) > 1 else out for text in texts}
  return {(file, text): folders[text] / names[file] for file in files_ for text in texts}


def _names_in_folder(files_: Sequence[str]) -> dict[str, str]:
  """A name for each file, its path below the folder that all are in, as .png."""
  full = {file: os.path.abspath(file) for file in files_}
  root = os.path.commonpath([os.path.dirname(path) for path in full.values()] or ["/"])
  relative = {file: os.path.relpath(path, root) for file, path in full.items()}
  plain = {file: f"{os.path.splitext(name)[0]}.png" for file, name in relative.items()}
  twice = len({*plain.values()}) < len({*full.values()})
  return {file: f"{name}.png" for file, name in relative.items()} if twice else plain


def check_new(paths: Iterable[pathlib.Path], overwrite: bool) -> None:
  """Raises a UserError for a file that is there."""
  for path in paths:
    if os.path.lexists(path) and not overwrite:
      raise errors.UserError(f"{path} exists; give another name, or --overwrite to replace it.")


def save(image: Image.Image, path: pathlib.Path) -> None:
  """Writes a picture under a temporary name first; makes its folder."""
  with files.write_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  kind = {".png": "PNG", ".webp": "WEBP"}.get(path.suffix.lower(), "JPEG")
  with (
    files.replacing(path, unique=True) as part,
    files.write_errors(path),
    part.open("xb") as file,
  ):
    image.save(file, kind, **({} if kind == "PNG" else {"quality": 92}))


def encoded(image: Image.Image) -> bytes:
  """Returns a picture as a PNG."""
  file = io.BytesIO()
  image.save(file, "PNG")
  return file.getvalue()


def png(image: Float[np.ndarray, "h w c"]) -> bytes:
  """Returns an image as a model takes it, in [-1, 1], as a PNG."""
  pixels = np.clip(np.round((image + 1) * 127.5), 0, 255).astype(np.uint8)
  return encoded(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels))
