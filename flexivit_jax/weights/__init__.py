"""Weights in and out: one function for the files that hold them, one that writes them, one that fixes the size."""

from flexivit_jax.weights import tasks, towers
from flexivit_jax.weights.baking import bake
from flexivit_jax.weights.npz import save_npz
from flexivit_jax.weights.reading import (
  OtherModel,
  load,
  load_into,
  load_with_record,
  native_side,
  not_finite,
)
from flexivit_jax.weights.registry import PUBLISHED, differences, is_here
from flexivit_jax.weights.segmenter import save_segmenter
from flexivit_jax.weights.stated import preparation, print_notes, written_for
from flexivit_jax.weights.timm.writer import save_timm
from flexivit_jax.weights.transformers.towers_writer import save_towers
from flexivit_jax.weights.transformers.writer import save_transformers

__all__ = [
  "PUBLISHED",
  "OtherModel",
  "bake",
  "differences",
  "is_here",
  "load",
  "load_into",
  "load_with_record",
  "native_side",
  "not_finite",
  "preparation",
  "print_notes",
  "save_npz",
  "save_segmenter",
  "save_timm",
  "save_towers",
  "save_transformers",
  "tasks",
  "towers",
  "written_for",
]
