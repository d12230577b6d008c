"""`python -m flexivit_jax`: the command `flexivit`."""

from flexivit_jax import cli

cli.entry()
