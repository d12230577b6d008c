"""Models, by the name that a config gives them."""

from flexivit_jax.models.flexivit import FlexiViT

MODELS = {"flexivit": FlexiViT}
