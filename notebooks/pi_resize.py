# %% [markdown]
# # What PI-resize does
#
# A token is an inner product of a patch and a kernel. Enlarge the patch, and the kernel has to follow. Which
# new kernel gives the same token? Seconds, and NumPy alone.

# %%
import numpy as np

from flexivit_jax import pi_resize
from flexivit_jax.resize import resize_matrix

rng = np.random.default_rng(0)
kernel = rng.standard_normal((8, 8, 1, 1))  # [h, w, channels, features]
patch = rng.standard_normal((8, 8))
token = (patch * kernel[..., 0, 0]).sum()
print(f"the token of the patch of 8 pixels: {token:.4f}")

# %% [markdown]
# Enlarge the patch to 16 pixels. It is linear: a small matrix from the left and from the right.

# %%
enlarge = resize_matrix(8, 16)
large = enlarge @ patch @ enlarge.T

plain = enlarge @ kernel[..., 0, 0] @ enlarge.T
print(f"with a plainly resized kernel:      {(large * plain).sum():.4f}")

# %% [markdown]
# Four times as many pixels vote, so the plain kernel is too strong; and it is not only a factor. PI-resize
# takes the kernel whose token is the same for every patch: the pseudo-inverse of the transpose.

# %%
resized = np.asarray(pi_resize(kernel, (16, 16)))[..., 0, 0]
print(f"with the PI-resized kernel:         {(large * resized).sum():.4f}")

by_hand = np.linalg.pinv(enlarge.T) @ kernel[..., 0, 0] @ np.linalg.pinv(enlarge.T).T

# %% [markdown]
# Turn the size yourself: change `sides`. Growing is exact at every size; shrinking loses detail, and is the
# best fit.

# %%
sides = (6, 8, 12, 16, 24, 48)
patches = rng.standard_normal((200, 8, 8))
tokens = (patches * kernel[..., 0, 0]).sum((1, 2))
errors = {}
for side in sides:
  matrix = resize_matrix(8, side)
  new = np.asarray(pi_resize(kernel, (side, side)))[..., 0, 0]
  seen = ((matrix @ patches @ matrix.T) * new).sum((1, 2))
  errors[side] = float(np.abs(seen - tokens).mean() / np.abs(tokens).mean())
  print(f"{side:3} pixels: the tokens differ by {errors[side]:.1%}")

# %%
assert np.isclose((large * resized).sum(), token, rtol=1e-4)
assert np.allclose(resized, by_hand, atol=1e-4)
assert all(errors[side] < 1e-4 for side in sides if side >= 8) and errors[6] > 0.05
