"""Draws docs/images/pi_resize.png and prints the numbers that docs/pi_resize.md quotes.

Usage:
  python tools/maintain/draw_pi_resize.py [--out docs/images/pi_resize.png]

The patches are white noise, and crops of the two photographs that ship with scikit-learn.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from sklearn.datasets import load_sample_images

from flexivit_jax import cli
from flexivit_jax.resize import KERNEL_RESIZES, pi_resize, plain_resize, resize_matrix

BASE = 16  # the patch size that the kernels are stored at
SIZES = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30, 40, 48)
PRINTED = (8, 10, 12, 15, 20, 24, 30, 48)
LABELS = {
  "pi": "PI-resize",
  "area": "resize × area ratio",
  "norm": "resize, keep norm",
  "plain": "plain resize",
}
COLORS = {"pi": "#0b6e4f", "area": "#e08e0b", "norm": "#7a5195", "plain": "#c0392b"}
INK, MUTED = "#222222", "#666666"


def photographs() -> list[np.ndarray]:
  """Luminance in [-1, 1], each `[h, w]`."""
  weights = np.array([0.299, 0.587, 0.114])
  return [image @ weights / 127.5 - 1 for image in load_sample_images().images]


def crops(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
  """Random crops of the photographs, `[count, size, size]`."""
  out, images = [], photographs()
  for i in range(count):
    image = images[i % len(images)]
    y, x = (rng.integers(0, side - size + 1) for side in image.shape)
    out.append(image[y : y + size, x : x + size])
  return np.stack(out)


def smooth_filters(count: int, rng: np.random.Generator) -> np.ndarray:
  """Filters without detail, `[BASE, BASE, 1, count]`: 4 x 4 random numbers, enlarged."""
  coarse = rng.standard_normal((4, 4, 1, count))
  return np.asarray(plain_resize(coarse, (BASE, BASE), "cubic"))


def tokens(patches: np.ndarray, kernel: np.ndarray) -> np.ndarray:
  """Inner products of `[n, h, w]` with `[h, w, 1, d]`: `[n, d]`."""
  return patches.reshape(len(patches), -1) @ kernel.reshape(-1, kernel.shape[-1])


def resize_patches(patches: np.ndarray, size: int) -> np.ndarray:
  """`[n, h, h]` to `[n, size, size]`, linear, no antialias."""
  matrix = resize_matrix(patches.shape[-1], size)
  return matrix @ patches @ matrix.T


def token_error(patches: np.ndarray, kernel: np.ndarray, size: int, method: str) -> float:
  """Root mean square of (new - old token), relative to that of the old token."""
  old = tokens(patches, kernel)
  resized = np.asarray(KERNEL_RESIZES[method](kernel, (size, size)))
  new = tokens(resize_patches(patches, size), resized)
  return float(np.sqrt(((new - old) ** 2).sum() / (old**2).sum()))


def settings() -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Patches and kernels to measure on, by name."""
  rng = np.random.default_rng(0)
  noise, photos = rng.standard_normal((4000, BASE, BASE)), crops(BASE, 4000, rng)
  random, smooth = rng.standard_normal((BASE, BASE, 1, 64)), smooth_filters(64, rng)
  return {
    "noise, random filters": (noise, random),
    "photographs, random filters": (photos, random),
    "photographs, smooth filters": (photos, smooth),
  }


def print_tables() -> None:
  """Relative token error of every method at the printed sizes."""
  for name, (patches, kernel) in settings().items():
    print(f"{name:28}" + "".join(f"{size:>7}" for size in PRINTED))
    for method, label in LABELS.items():
      errors = (token_error(patches, kernel, size, method) for size in PRINTED)
      print(f"  {label:26}" + "".join(f"{error:7.2f}" for error in errors))


def example() -> tuple[np.ndarray, np.ndarray]:
  """An 8 x 8 patch of the flower and an oriented filter whose token is exactly 1."""
  patch = photographs()[1][150:214:8, 270:334:8]
  at = np.linspace(-1, 1, 8)
  y, x = at[:, None], at[None]
  kernel = np.exp(-1.5 * (x**2 + y**2)) * np.cos(3.2 * (0.8 * x + 0.6 * y))
  return patch, (kernel / (patch * kernel).sum())[:, :, None, None]


def draw_example(axes: np.ndarray) -> None:
  """Three rows: as trained, plain resize, PI-resize; each patch x kernel = token."""
  patch, kernel = example()
  large = resize_patches(patch[None], 16)[0]
  limit = np.abs(kernel).max()
  rows = [
    ("As trained", "8 px", patch, kernel, INK),
    ("Plain resize", "16 px", large, plain_resize(kernel, (16, 16)), COLORS["plain"]),
    ("PI-resize", "16 px", large, pi_resize(kernel, (16, 16)), COLORS["pi"]),
  ]
  for row, (name, size, image, weights, color) in zip(axes, rows, strict=True):
    draw_tiles(row, image, np.asarray(weights)[:, :, 0, 0], limit)
    row[0].text(0, 0.56, name, color=color, fontsize=16, weight="bold")
    row[0].text(0, 0.34, size, color=MUTED, fontsize=15)
    token = f"{(image * weights[:, :, 0, 0]).sum():.2f}"
    row[3].text(0.6, 0.5, token, color=color, fontsize=27, weight="bold", ha="center", va="center")
  for axis, title in zip(axes[0, 1:3], ("patch", "kernel"), strict=True):
    axis.set_title(title, fontsize=15, color=MUTED)
  axes[0, 3].text(0.6, 1.035, "token", fontsize=15, color=MUTED, ha="center")


def draw_tiles(row: np.ndarray, patch: np.ndarray, kernel: np.ndarray, limit: float) -> None:
  """The patch in grey and the kernel in red and blue, its scale shared by all rows."""
  row[1].imshow(patch, cmap="gray", vmin=patch.min(), vmax=patch.max())
  row[2].imshow(kernel, cmap="RdBu_r", vmin=-limit, vmax=limit)
  for axis in (row[0], row[3]):
    axis.set_axis_off()
  for axis, sign in ((row[1], "×"), (row[2], "=")):
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_color("#bbbbbb")
    axis.text(1.1, 0.5, sign, transform=axis.transAxes, fontsize=22, ha="center", va="center")


def draw_errors(axis: Axes) -> None:
  """Token error against the new patch size, on photographs."""
  patches, kernel = settings()["photographs, random filters"]
  for method in reversed(LABELS):
    errors = [token_error(patches, kernel, size, method) for size in SIZES]
    axis.plot(SIZES, errors, "o-", color=COLORS[method], lw=2.5, ms=6)
  axis.axvline(BASE, color="#bbbbbb", lw=1, zorder=0)
  axis.set(xlim=(4, 49), ylim=(-0.2, 1.9), xticks=(5, 8, 12, 16, 20, 24, 30, 40, 48))
  axis.set_yticks((0, 0.5, 1, 1.5), ("0 %", "50 %", "100 %", "150 %"))
  axis.set_xlabel("new patch size in pixels; the kernel is stored at 16", fontsize=15)
  axis.set_ylabel("error of the token, photographs", fontsize=15)
  axis.tick_params(labelsize=14)
  axis.spines[["top", "right"]].set_visible(False)
  for method, x, y in (
    ("pi", 31, -0.14),
    ("area", 31, 0.16),
    ("norm", 30.5, 1.5),
    ("plain", 18.5, 1.42),
  ):
    label = LABELS[method] if method != "plain" else "plain\nresize"
    axis.text(x, y, label, color=COLORS[method], fontsize=15, weight="bold")


def draw(out: Path) -> None:
  """Writes the figure."""
  figure = plt.figure(figsize=(7.2, 10.4), dpi=150)
  top = figure.add_gridspec(
    3, 4, left=0.04, right=0.97, top=0.9, bottom=0.46, hspace=0.08, wspace=0.24,
    width_ratios=(1.15, 1, 1, 0.9),
  )  # fmt: skip
  draw_example(top.subplots())
  draw_errors(figure.add_axes((0.16, 0.065, 0.81, 0.31)))
  titles = {
    0.955: "Twice the pixels, the same token",
    0.4: "Growing is exact, shrinking a best fit",
  }
  for y, title in titles.items():
    figure.text(0.04, y, title, fontsize=20, weight="bold", color=INK)
  out.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(out)


def main() -> None:
  """Command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=Path, default=Path("docs/images/pi_resize.png"))
  args = parser.parse_args()
  draw(args.out)
  print_tables()


if __name__ == "__main__":
  cli.tool(main)
