"""Other frameworks, where they are installed: the only file of the package that imports them.

Reading and writing weights needs none of them, but for PyTorch's own `.pth` and `.bin` files. What was written is run
here in the framework that it was written for, for the certificate.
"""

import importlib
import types

from flexivit_jax import errors

_ADVICE = "pip install -r requirements-convert.txt has the versions that are tested"


def require(package: str, why: str) -> types.ModuleType:
  """Imports a package that is no dependency of ours; a UserError that says why it is needed if it is not there."""
  try:
    return importlib.import_module(package)
  except ModuleNotFoundError as e:
    if e.name != package:
      raise
    raise errors.UserError(
      f"{why} needs the package {package}, which is not installed; {_ADVICE}."
    ) from e
