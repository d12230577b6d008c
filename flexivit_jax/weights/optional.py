"""Packages that are no dependency of ours: imported where something needs them, or an error says what to install."""

import importlib
import importlib.metadata
import importlib.util
import types
from typing import Any

from flexivit_jax import errors

Foreign = Any  # an object of a package that may not be installed

# Packages that a package imports late, in the middle of a conversion: an image library of another build than torch.
_COMPANIONS = {"timm": ("torch", "torchvision"), "transformers": ("torch", "torchvision")}
_ADVICE = "pip install -r requirements-convert.txt has the versions that are tested"


def version(package: str) -> str:
  """Returns name and version, e.g. "timm 1.0.31", or "" if the package is not installed."""
  try:
    return f"{package} {importlib.metadata.version(package)}"
  except importlib.metadata.PackageNotFoundError:
    return ""


def require(package: str, why: str) -> types.ModuleType:
  """Imports a package that is not a dependency of ours.

  Args:
    package: its name.
    why: what needs it, e.g. "Reading model.pth".

  Raises:
    UserError: the package, or one that it imports, is not installed or cannot be imported.
  """
  try:
    for companion in _COMPANIONS.get(package, ()):
      if importlib.util.find_spec(companion) is not None:
        importlib.import_module(companion)
    return importlib.import_module(package)
  except Exception as e:  # a library of another build raises RuntimeError, OSError, ...
    if isinstance(e, ModuleNotFoundError) and e.name == package:
      problem = f"is not installed; {_ADVICE}"
    else:
      problem = f"cannot be imported: {_import_cause(e)}. {_installed(package)} A new environment helps; {_ADVICE}"
    raise errors.UserError(f"{why} needs the package {package}, which {problem}.") from e


def _import_cause(error: Exception) -> str:
  text = str(error).strip() or type(error).__name__
  return f"{type(error).__name__}: {text.splitlines()[0].rstrip('.')}"


def _installed(package: str) -> str:
  """The versions that have to fit each other, in one sentence."""
  names = filter(None, map(version, ("torch", *_COMPANIONS.get(package, ()), package)))
  return f"Installed: {', '.join(dict.fromkeys(names)) or 'unknown versions'}."
