"""Experiments, one a file: `get_config(arg="") -> ConfigDict`; installed with the package."""
