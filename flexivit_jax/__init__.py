"""FlexiViT: one Vision Transformer for all patch sizes (arXiv 2212.08013), in JAX."""

import importlib
from typing import Any

__version__ = "0.1.0"
__all__ = ["FlexiViT", "choose", "load", "pi_resize"]

_HOME = {
  "FlexiViT": "models.flexivit",
  "choose": "inference.budgets",
  "load": "weights",
  "pi_resize": "resize",
}


def __getattr__(name: str) -> Any:
  """Imports the public names when they are first asked for, so that `flexivit --help` does not wait for JAX."""
  if name not in _HOME:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
