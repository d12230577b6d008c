"""Weights in and out: one function for the files that hold them, one that writes them."""

from flexivit_jax.weights.reading import load, load_with_record
from flexivit_jax.weights.writing import save_npz

__all__ = ["load", "load_with_record", "save_npz"]
