import pytest

from flexivit_jax.errors import UserError
from flexivit_jax.weights import optional


def test_a_package_that_is_not_there_is_an_error_that_says_what_for():
  assert optional.require("torch", "Reading a .pth").__name__ == "torch"
  with pytest.raises(UserError, match="needs the package xyz_is_not_there"):
    optional.require("xyz_is_not_there", "Reading a .xyz")
