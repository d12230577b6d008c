"""One conversion for all that comes from PyTorch: stacked projections are the same as separate ones, and go back."""

import numpy as np
import pytest

from flexivit_jax.weights import torch_layout

HEADS, WIDTH, MLP = 2, 6, 10
COMMON = {"norm1": "n1", "norm2": "n2", "out": "o", "fc1": "a", "fc2": "b"}
NAMES = {
  "separate": COMMON | {"query": "q", "key": "k", "value": "v"},
  "two": COMMON | {"query": "q", "kv": "kv"},
  "stacked": COMMON | {"qkv": "qkv"},
}
HELD = {"separate": ("q", "k", "v"), "two": ("q", "kv"), "stacked": ("qkv",)}

ENDS = {
  "separate": (WIDTH, 2 * WIDTH, 3 * WIDTH),
  "two": (WIDTH, 3 * WIDTH),
  "stacked": (3 * WIDTH,),
}


def block(kind: str) -> dict[str, np.ndarray]:
  """The same numbers under each kind of names."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  arrays = {f"{n}.{leaf}": draw(WIDTH) for n in ("n1", "n2") for leaf in ("weight", "bias")}
  for name, out, in_ in (("o", WIDTH, WIDTH), ("a", MLP, WIDTH), ("b", WIDTH, MLP)):
    arrays |= {f"{name}.weight": draw(out, in_), f"{name}.bias": draw(out)}
  weight, bias, begin = draw(3 * WIDTH, WIDTH), draw(3 * WIDTH), 0
  for name, rows in zip(HELD[kind], np.diff([0, *ENDS[kind]]), strict=True):
    part = slice(begin, begin := begin + rows)
    arrays |= {f"{name}.weight": weight[part], f"{name}.bias": bias[part]}
  return arrays


@pytest.mark.parametrize("kind", NAMES)
def test_a_block_goes_back_as_it_came_and_does_not_depend_on_what_is_stacked(kind):
  arrays = block(kind)
  flat = torch_layout.block_from_torch(arrays, NAMES[kind], HEADS)
  same = torch_layout.block_from_torch(block("stacked"), NAMES["stacked"], HEADS)
  assert flat.keys() == same.keys()
  for name, array in flat.items():
    np.testing.assert_array_equal(array, same[name])
  assert flat["MultiHeadDotProductAttention_0/query/kernel"].shape == (WIDTH, HEADS, WIDTH // HEADS)
  back = torch_layout.block_to_torch(flat, NAMES[kind])
  assert back.keys() == arrays.keys()
  for name, array in arrays.items():
    np.testing.assert_array_equal(back[name], array)


def test_layer_scale_multiplies_what_each_half_of_the_block_adds():
  arrays, scale = block("stacked"), np.arange(1, WIDTH + 1, dtype=np.float32)
  names = NAMES["stacked"] | {"scale1": "s1", "scale2": "s2"}
  plain = torch_layout.block_from_torch(arrays, names, HEADS)
  scaled = torch_layout.block_from_torch(arrays | {"s1": scale, "s2": 2 * scale}, names, HEADS)
  ratios = {
    "MultiHeadDotProductAttention_0/out/kernel": scale,
    "MultiHeadDotProductAttention_0/out/bias": scale,
    "MlpBlock_0/Dense_1/kernel": 2 * scale,
    "MlpBlock_0/Dense_1/bias": 2 * scale,
  }
  for name, array in plain.items():
    np.testing.assert_array_equal(scaled[name], array * ratios.get(name, np.float32(1)))


def test_projections_without_biases_get_zeros():
  arrays = block("separate")
  del arrays["q.bias"]
  flat = torch_layout.block_from_torch(arrays, NAMES["separate"], HEADS)
  assert not flat["MultiHeadDotProductAttention_0/query/bias"].any()
