"""Models, by the name that a config gives them; `base.Model` says what each has to offer."""

from collections.abc import Callable

from flexivit_jax.models.base import UNNAMED, Model
from flexivit_jax.models.flexivit import FlexiViT

__all__ = ["MODELS", "UNNAMED", "FlexiViT", "Model"]

MODELS: dict[str, Callable[..., Model]] = {"flexivit": FlexiViT}
