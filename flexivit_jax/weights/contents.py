"""What kind of file with weights it is by its first bytes, whatever its suffix says."""

import pathlib
import tarfile
import zipfile

from flexivit_jax import errors

NPZ, SAFETENSORS, TORCH, SCRIPT = ".npz", ".safetensors", ".pth", "TorchScript"
_ADVICE = (
  "with PyTorch, torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(), 'weights.pth')"
  " writes its weights alone"
)


def kind(path: pathlib.Path) -> str | None:
  """Returns the kind of a file, one of the constants above, or None for an unknown kind or a damaged file."""
  with path.open("rb") as file:
    start = file.read(9)
  # A .safetensors file starts with the length of its header, which is JSON.
  if (
    len(start) == 9
    and start[8:] == b"{"
    and int.from_bytes(start[:8], "little") < path.stat().st_size
  ):
    return SAFETENSORS
  if not start.startswith(b"PK\x03\x04"):
    return None
  try:
    with zipfile.ZipFile(path) as archive:
      names = archive.namelist()
  except (zipfile.BadZipFile, OSError, NotImplementedError):
    return None
  if any("/code/" in name for name in names):
    return SCRIPT
  if any(name.endswith("/data.pkl") for name in names):
    return TORCH
  return NPZ if names and all(name.endswith(".npy") for name in names) else None


def check(path: pathlib.Path, expected: str) -> None:
  """Raises a UserError for a file that is of another kind than its suffix says, with what to do."""
  got = kind(path)
  if got == SCRIPT:
    raise errors.UserError(f"{path} is a program in TorchScript, as OpenAI's CLIP is; {_ADVICE}.")
  if got is None and path.suffix.lower() == ".tar" and tarfile.is_tarfile(path):
    raise errors.UserError(
      f"{path} is an archive of files; unpack it and give the file with weights."
    )
  if got not in (None, expected):
    raise errors.UserError(
      f"{path} is a {got} file by its content, and not what its suffix says; name it {path.stem}{got}."
    )
