"""Models, by the name that a config gives them; `base.Model` says what each has to offer."""

from collections.abc import Callable

from flexivit_jax.models.base import UNNAMED, Model, vit_part
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.models.owl_vit import OwlViT
from flexivit_jax.models.segmenter import Segmenter
from flexivit_jax.models.text import TextTower
from flexivit_jax.models.two_towers import TwoTowers

__all__ = [
  "MODELS",
  "UNNAMED",
  "FlexiViT",
  "Model",
  "OwlViT",
  "Segmenter",
  "TextTower",
  "TwoTowers",
  "vit_part",
]

MODELS: dict[str, Callable[..., Model]] = {
  "flexivit": FlexiViT,
  "two_towers": TwoTowers,
  "segmenter": Segmenter,
  "owl_vit": OwlViT,
}
