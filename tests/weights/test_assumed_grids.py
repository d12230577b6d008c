"""A grid that is only assumed is said to be, with an option that reads the other one."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import trees, weights


@pytest.fixture
def read(tmp_path, timm_state_dict):
  """Reads a ViT with so many positions, which is in timm's names or in big_vision's."""

  def load(positions, names="timm", **fields):
    arrays = timm_state_dict()
    width = arrays["pos_embed"].shape[-1]
    arrays["pos_embed"] = np.ones((1, positions, width), np.float32)
    path = tmp_path / "w.safetensors"
    save_file(arrays, path)
    if names == "big_vision":
      _, params = weights.load(path, num_heads=4, posemb_size=(12, 12))
      path = tmp_path / "w.npz"
      np.savez(path, **{n: np.asarray(a) for n, a in trees.flatten(params).items()})
    return weights.load_with_record(path, num_heads=4, **fields)

  return load


def advice(record):
  """The grids that notes give."""
  return re.findall(r"--posemb_size=(\d+),(\d+)", " ".join(record["notes"]))


@pytest.mark.parametrize("positions", [145, 36, 144])
def test_a_grid_that_may_be_another_is_noted_and_the_advice_reads_it(read, positions):
  model, _, record = read(positions)
  assert model.posemb_size[0] == model.posemb_size[1]
  grid = tuple(map(int, advice(record)[-1]))
  other, params, record = read(positions, posemb_size=grid)
  assert other.posemb_size == grid != model.posemb_size
  assert params["pos_embedding"].shape[1] == grid[0] * grid[1]
  assert not advice(record)


@pytest.mark.parametrize("positions", [17, 50, 65, 197])
def test_a_grid_of_usual_images_that_can_only_be_square_has_no_note(read, positions):
  assert not advice(read(positions)[2])


def test_arrays_in_big_visions_names_get_the_note_too(read):
  assert advice(read(145, names="big_vision")[2]) == [("9", "16")]


def test_the_original_vits_class_token_may_have_one_of_the_positions(tmp_path, read):
  _, params, _ = read(145, posemb_size=(9, 16))
  flat = {name: np.asarray(array) for name, array in trees.flatten(params).items()}
  flat["Transformer/posembed_input/pos_embedding"] = flat.pop("pos_embedding")[:, :36]
  np.savez(tmp_path / "original.npz", **flat)
  model, _, record = weights.load_with_record(tmp_path / "original.npz")
  assert model.posemb_size == (6, 6)
  assert advice(record) == [("5", "7")]
  other, _, record = weights.load_with_record(tmp_path / "original.npz", posemb_size=(5, 7))
  assert other.posemb_size == (5, 7) and not advice(record)
