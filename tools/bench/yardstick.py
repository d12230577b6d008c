"""A plain linen FlexiViT, written as one writes it first: `tools/bench/bench_peers.py` measures the package against it.

A convolution for the patches, PI-resize by one matrix over all pixels of the kernel, Flax's own attention, a loop over
the blocks: what the public reference does, in our words. No part of the package.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def pi_matrix(old: int, new: int) -> np.ndarray:
  """The pseudoinverse of the bilinear resize from old x old to new x new pixels, [new * new, old * old]."""
  basis = np.eye(old * old, dtype=np.float32).reshape(old * old, old, old)
  resize = functools.partial(jax.image.resize, shape=(new, new), method="linear", antialias=False)
  with jax.ensure_compile_time_eval():
    resized = np.asarray(jax.vmap(resize)(basis)).reshape(old * old, new * new).T
  return np.linalg.pinv(resized.T)


class Block(nn.Module):
  """Pre-norm attention and MLP."""

  heads: int
  mlp_dim: int

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(self.heads, deterministic=True)(y, y)
    y = nn.Dense(self.mlp_dim)(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class Yardstick(nn.Module):
  """FlexiViT with a 32x32 kernel and a 7x7 grid."""

  width: int
  depth: int
  heads: int
  mlp_dim: int
  classes: int = 1000

  @nn.compact
  def __call__(self, image: jax.Array, *, seqhw: int) -> jax.Array:
    n, h, _, c = image.shape
    patch = h // seqhw
    stored = self.param("kernel", nn.initializers.lecun_normal(), (32, 32, c, self.width))
    matrix = jnp.asarray(pi_matrix(32, patch))
    kernel = jnp.einsum("pq,qcd->pcd", matrix, stored.reshape(32 * 32, c, self.width))
    kernel = kernel.reshape(patch, patch, c, self.width)
    x = jax.lax.conv_general_dilated(
      image, kernel, (patch, patch), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    grid = self.param("grid", nn.initializers.normal(0.02), (1, 7, 7, self.width))
    grid = jax.image.resize(grid, (1, seqhw, seqhw, self.width), "linear")
    x = (x + grid).reshape(n, seqhw * seqhw, self.width)
    cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
    x = jnp.concatenate([jnp.broadcast_to(cls, (n, 1, self.width)), x], axis=1)
    for _ in range(self.depth):
      x = Block(self.heads, self.mlp_dim)(x)
    return nn.Dense(self.classes)(nn.LayerNorm()(x)[:, 0])
