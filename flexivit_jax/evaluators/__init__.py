"""Evaluators, by the name that a config gives them."""

from flexivit_jax.evaluators.classification import Classification

EVALUATORS = {"classification": Classification}
