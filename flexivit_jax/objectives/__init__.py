"""Objectives: what a training step minimises, by the name that a config gives them."""

from flexivit_jax.objectives.supervised import supervised

OBJECTIVES = {"supervised": supervised}
