"""Operators against jax.image and SciPy, PI-resize against its definition and the reference's outputs."""

import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
from hypothesis import given, strategies as st

from flexivit_jax import resize
from flexivit_jax.errors import UserError

GOLDEN = pathlib.Path(__file__).parent / "golden" / "pi_resize.npz"
operators = st.sampled_from(sorted(resize.OPERATORS))
sizes = st.integers(1, 24)


def _normal(*shape, seed=0, dtype=np.float64):
  return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def _resized(x, size, operator):
  """Resizes the leading axes of `x`, one after the other, in float64."""
  for axis, (old, new) in enumerate(zip(x.shape, size, strict=False)):
    matrix = resize.resize_matrix(old, new, operator)
    x = np.moveaxis(np.tensordot(matrix, x, (1, axis)), 0, axis)
  return x


# --- the one-dimensional operators ---

PAIRS = [(1, 4), (2, 7), (7, 2), (7, 15), (16, 7), (30, 33), (32, 15), (3, 1)]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("method", ["linear", "cubic"])
def test_operator_is_that_of_jax_image(method, antialias):
  def resized(old, new):
    eye = np.eye(old, dtype=np.float32)
    return jax.image.resize(eye, (new, old), method, antialias=antialias, precision="highest")

  want = jax.jit(lambda: [resized(*pair) for pair in PAIRS])()
  for pair, matrix in zip(PAIRS, want, strict=True):
    got = resize.resize_matrix(*pair, method + "_antialias" * antialias)
    # jax.image computes its weights in float32.
    np.testing.assert_allclose(got, matrix, atol=4e-6, err_msg=str(pair))


def test_area_is_the_mean_over_each_output_pixel():
  for old, new in PAIRS:
    x = _normal(old)
    integral = np.interp(np.arange(new + 1) * old / new, np.arange(old + 1), np.r_[0, x.cumsum()])
    got = resize.resize_matrix(old, new, "area") @ x
    np.testing.assert_allclose(got, np.diff(integral) * new / old, atol=1e-13)


@given(operators, sizes, sizes)
def test_operators_keep_constants_and_mirror_images(operator, old, new):
  matrix = resize.resize_matrix(old, new, operator)
  assert matrix.shape == (new, old) and matrix.dtype == np.float64
  np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-13)
  np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-13)


@pytest.mark.parametrize("make", [resize.resize_matrix, resize.pi_matrix, resize.zoom_matrix])
def test_matrices_are_made_once_and_cannot_be_written(make):
  assert make(5, 8) is make(5, 8)
  with pytest.raises(ValueError, match="read-only"):
    make(5, 8)[0, 0] = 1.0
  np.testing.assert_array_equal(make(6, 6), np.eye(6))


def test_unknown_operator_and_impossible_sizes_are_errors():
  with pytest.raises(UserError, match=r"Unknown resize operator 'liner'.*Did you mean 'linear'"):
    resize.resize_matrix(4, 8, "liner")
  with pytest.raises(UserError, match=r"Unknown resize operator 'liner'"):
    resize.pi_resize(_normal(4, 4, 1, 1), (4, 4), "liner")
  with pytest.raises(UserError, match=r"Cannot resize 4 samples to 0.*at least 1"):
    resize.pi_resize(_normal(4, 4, 1, 1), (8, 0))
  with pytest.raises(UserError, match=r"Cannot resize 4 samples to 0"):
    resize.zoom_grid(_normal(4, 4, 1), (4, 0))
  for resize_kernel in resize.KERNEL_RESIZES.values():
    with pytest.raises(UserError, match=r"has 2 spatial axes.*\(8, 8, 8\) has 3"):
      resize_kernel(_normal(4, 4, 1, 1), (8, 8, 8))


# --- PI-resize ---


@given(operators, st.lists(st.tuples(sizes, st.integers(0, 24)), min_size=1, max_size=2))
def test_tokens_of_resized_patches_stay_what_they_were(operator, axes):
  _check_definition(operator, [old for old, _ in axes], [old + more for old, more in axes])


video_axis = st.tuples(st.integers(1, 6), st.integers(0, 6))


@given(operators, st.tuples(video_axis, video_axis, video_axis))
def test_tokens_of_resized_video_patches_stay_what_they_were(operator, axes):
  _check_definition(operator, [old for old, _ in axes], [old + more for old, more in axes])


def _check_definition(operator, old, new):
  patch, kernel = _normal(*old, 2, seed=1), _normal(*old, 2, 3, seed=2)
  spatial = range(len(old) + 1)
  want = np.tensordot(patch, kernel, (spatial, spatial))
  resized = resize.pi_resize(kernel, new, operator)
  assert resized.shape == (*new, 2, 3) and resized.dtype == np.float64
  got = np.tensordot(_resized(patch, new, operator), resized, (spatial, spatial))
  scale = np.linalg.norm(patch) * np.linalg.norm(kernel)
  np.testing.assert_allclose(got, want, atol=1e-12 * max(1.0, scale))


def _bilinear(image, hw):
  """Two-dimensional, half-pixel centres, no antialias; the border's pixels reach beyond it."""
  at = [(np.arange(n) + 0.5) * o / n - 0.5 for o, n in zip(image.shape, hw, strict=True)]
  coordinates = np.meshgrid(*at, indexing="ij")
  return scipy.ndimage.map_coordinates(image, coordinates, order=1, mode="nearest")


@pytest.mark.parametrize(
  ("old", "new"),
  [((6, 6), (9, 9)), ((7, 5), (5, 8)), ((9, 8), (4, 4)), ((5, 6), (5, 11)), ((8, 6), (9, 5))],
)
def test_separable_form_is_the_pseudo_inverse_of_the_full_operator(old, new):
  basis = np.eye(old[0] * old[1]).reshape(-1, *old)
  B = np.stack([_bilinear(image, new).ravel() for image in basis], axis=1)
  kernel = _normal(*old, 2, 3)
  # Where one axis grows and the other shrinks B has singular values of exactly zero, which the default
  # cut-off may take for real ones.
  want = np.linalg.pinv(B.T, rcond=1e-10) @ kernel.reshape(B.shape[1], -1)
  got = resize.pi_resize(kernel, new)
  np.testing.assert_allclose(got, want.reshape(*new, 2, 3), atol=1e-12)


def test_shrinking_is_the_least_squares_solution():
  kernel, size = _normal(8, 7, 2, 3), (5, 3)
  got = resize.pi_resize(kernel, size)

  def error(resized):  # of the tokens of white-noise patches: mean square over all basis patches
    back = resized
    for axis, (old, new) in enumerate(zip((8, 7), size, strict=True)):
      back = np.moveaxis(np.tensordot(resize.resize_matrix(old, new).T, back, (1, axis)), 0, axis)
    return ((back - kernel) ** 2).sum()

  for seed in range(5):
    assert error(got + 1e-3 * _normal(*got.shape, seed=seed)) > error(got)


def _check_golden(arrays):
  names = [name for name in arrays.files if name.startswith("resized_")]
  for name in names:
    old, new = name.removeprefix("resized_").split("_to_")
    got = resize.pi_resize(arrays[f"kernel_{old}"], tuple(map(int, new.split("x"))))
    # The reference rounds its interpolation weights in float32, which matters most here.
    atol = 2e-4 if new == "30x30" else 1e-4
    np.testing.assert_allclose(got, arrays[name], rtol=0, atol=atol, err_msg=name)
  return len(names)


def test_golden_outputs_of_the_reference():
  with np.load(GOLDEN) as arrays:
    assert _check_golden(arrays) == 8


@pytest.mark.shared
def test_all_golden_outputs_of_the_reference(shared):
  with np.load(shared / "golden" / "pi_resize.golden.npz") as arrays:
    assert _check_golden(arrays) == 17


@pytest.mark.parametrize("resize_kernel", resize.KERNEL_RESIZES.values(), ids=resize.KERNEL_RESIZES)
@pytest.mark.parametrize("operator", resize.OPERATORS)
def test_unchanged_size_is_bitwise_the_identity(resize_kernel, operator):
  kernel = _normal(7, 5, 2, 3, dtype=np.float32)
  for k in (kernel, jnp.asarray(kernel)):
    np.testing.assert_array_equal(resize_kernel(k, (7, 5), operator), kernel)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", resize.KERNEL_RESIZES)
def test_kind_of_array_and_dtype_are_kept(name, dtype):
  kernel = jnp.asarray(_normal(6, 6, 2, 3), dtype)
  got = resize.KERNEL_RESIZES[name](kernel, (8, 5))
  assert isinstance(got, jax.Array) and got.dtype == dtype
  got = resize.KERNEL_RESIZES[name](np.asarray(kernel), (8, 5))
  assert isinstance(got, np.ndarray) and got.dtype == kernel.dtype
  exact = resize.KERNEL_RESIZES[name](np.asarray(kernel, np.float64), (8, 5))
  np.testing.assert_allclose(
    got.astype(np.float64), exact, atol=4 * float(jnp.finfo(dtype).eps) * np.abs(exact).max()
  )


def test_gradient_reaches_the_stored_kernel_through_the_transpose():
  kernel, g = _normal(6, 5, 2, 3, dtype=np.float32), _normal(9, 4, 2, 3, dtype=np.float32)
  loss = lambda k: jnp.vdot(resize.pi_resize(k, (9, 4)), g)  # noqa: E731
  got = jax.jit(jax.grad(loss))(jnp.asarray(kernel))
  want = np.einsum("io,jp,ijcd->opcd", resize.pi_matrix(6, 9), resize.pi_matrix(5, 4), g)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_jit_and_default_matmul_precision_change_nothing():
  kernel = _normal(6, 5, 2, 3, dtype=np.float32)
  want = resize.pi_resize(kernel.astype(np.float64), (9, 11))
  with jax.default_matmul_precision("bfloat16"):
    got = jax.jit(functools.partial(resize.pi_resize, size=(9, 11)))(kernel)
  np.testing.assert_allclose(got, want, atol=5e-6)


# --- its competitors ---


@pytest.mark.parametrize("size", [(12, 10), (3, 8), (9, 4), (4, 9)])
def test_area_heuristic_is_plain_times_the_ratio_of_areas(size):
  kernel = _normal(6, 6, 2, 3)  # (9, 4) has as many pixels: the ratio is 1, the kernel another.
  plain = resize.plain_resize(kernel, size)
  np.testing.assert_allclose(plain, _resized(kernel, size, "linear"), atol=1e-13)
  want = plain * 36 / (size[0] * size[1])
  np.testing.assert_allclose(resize.area_resize(kernel, size), want, atol=1e-13)


def test_area_heuristic_keeps_the_token_of_a_flat_patch():
  flat = resize.area_resize(_normal(6, 6, 2, 3), (12, 18))
  np.testing.assert_allclose(flat.sum((0, 1)), _normal(6, 6, 2, 3).sum((0, 1)), atol=1e-12)


def test_norm_heuristic_keeps_each_filters_norm_and_direction():
  kernel = _normal(6, 6, 2, 3)
  kernel[..., 1] = 0.0
  got, plain = resize.norm_resize(kernel, (9, 4)), resize.plain_resize(kernel, (9, 4))
  norm = lambda k: np.sqrt((k**2).sum((0, 1, 2)))  # noqa: E731
  np.testing.assert_allclose(norm(got), norm(kernel), atol=1e-13)
  np.testing.assert_allclose(got * norm(plain), plain * norm(kernel), atol=1e-12)
  assert not got[..., 1].any()


@pytest.mark.parametrize("resize_kernel", resize.KERNEL_RESIZES.values(), ids=resize.KERNEL_RESIZES)
def test_gradients_are_finite_also_where_a_filter_is_zero(resize_kernel):
  kernel = jnp.asarray(_normal(6, 6, 2, 3, dtype=np.float32)).at[..., 1].set(0.0)
  grad = jax.grad(lambda k: resize_kernel(k, (9, 4)).sum())(kernel)
  assert np.isfinite(grad).all()


# --- position grids ---

GRIDS = [
  ((7, 7), (15, 15)),
  ((7, 7), (5, 5)),
  ((24, 24), (7, 7)),
  ((7, 5), (3, 9)),
  ((4, 6), (1, 1)),
]


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_grid_resize_is_that_of_the_reference_at_run_time(old, new):
  grid = _normal(*old, 4, dtype=np.float32)
  want = jax.image.resize(grid, (*new, 4), "linear", precision="highest")  # antialias by default
  for g in (grid, jnp.asarray(grid)):
    np.testing.assert_allclose(resize.resize_grid(g, new), want, atol=4e-6)


@pytest.mark.parametrize(("old", "new"), GRIDS)
def test_grid_zoom_is_that_of_the_reference_at_load(old, new):
  grid = _normal(*old, 4)
  want = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
  np.testing.assert_allclose(resize.zoom_grid(grid, new), want, atol=1e-12)


def test_unchanged_grids_are_bitwise_the_same():
  grid = _normal(7, 5, 4, dtype=np.float32)
  for resize_grid in (resize.resize_grid, resize.zoom_grid):
    np.testing.assert_array_equal(resize_grid(jnp.asarray(grid), (7, 5)), grid)


# --- the second moment of patches ---


def _toeplitz(moment, size):
  return np.array([[moment[abs(i - j)] for j in range(size)] for i in range(size)])


@given(st.integers(2, 16), st.integers(1, 16), st.floats(0.05, 0.98), operators)
def test_moment_gives_the_least_expected_error_over_such_signals(old, new, rho, operator):
  moment = tuple(rho**k for k in range(old))
  m, p = resize.resize_matrix(old, new, operator), resize.pi_matrix(old, new, operator, moment)
  w, s = _normal(old), _toeplitz(moment, old)

  def expected_error(v):  # E[(<x, w> - <M x, v>)^2] for x of second moment S
    return (w - m.T @ v) @ s @ (w - m.T @ v)

  # At the minimum the gradient is zero.
  gradient = m @ s @ (w - m.T @ (p @ w))
  np.testing.assert_allclose(gradient, 0, atol=1e-8 * np.abs(s).sum())
  assert expected_error(p @ w) <= expected_error(resize.pi_matrix(old, new, operator) @ w) + 1e-9


def test_moment_changes_nothing_where_the_paper_is_exact_and_white_noise_is_the_paper():
  moment = tuple(0.9**k for k in range(16))
  np.testing.assert_array_equal(
    resize.pi_matrix(16, 20, "linear", moment), resize.pi_matrix(16, 20)
  )
  white = (1.0, *[0.0] * 15)
  np.testing.assert_allclose(
    resize.pi_matrix(16, 10, "linear", white), resize.pi_matrix(16, 10), atol=1e-13
  )
  assert np.abs(resize.pi_matrix(16, 10, "linear", moment) - resize.pi_matrix(16, 10)).max() > 0.01


def test_pi_resize_with_a_moment_is_that_of_the_whole_two_dimensional_problem():
  moment, kernel = tuple(0.8**k for k in range(6)), _normal(6, 5, 2, 3)
  b = np.kron(resize.resize_matrix(6, 4), resize.resize_matrix(5, 2))
  s = np.kron(_toeplitz(moment, 6), _toeplitz(moment, 5))
  root = scipy.linalg.sqrtm(s)
  want = np.linalg.pinv(root @ b.T, rcond=1e-10) @ root @ kernel.reshape(30, 6)
  got = resize.pi_resize(kernel, (4, 2), "linear", moment)
  np.testing.assert_allclose(got.reshape(8, 6), want, atol=1e-10)


def test_second_moment_is_measured_along_rows_and_columns():
  rng = np.random.default_rng(0)
  image = rng.normal(size=(4, 300, 300, 1))
  image = image + np.roll(image, 1, axis=1) + np.roll(image, 1, axis=2)  # neighbours share a sample
  got = resize.second_moment(image, 4)
  np.testing.assert_allclose(got, [1, 1 / 3, 0, 0], atol=0.01)
  np.testing.assert_allclose(resize.second_moment(np.ones((1, 9, 9, 3)), 3), [1, 1, 1])
  with pytest.raises(UserError, match="smaller than 10"):
    resize.second_moment(np.ones((1, 9, 9, 3)), 10)
  with pytest.raises(UserError, match="smallest eigenvalue"):
    resize.pi_matrix(8, 4, "linear", (1.0, *[2.0] * 7))


def test_the_matrices_of_ten_sizes_are_made_in_ten_milliseconds():
  def make():
    resize.resize_matrix.cache_clear()
    resize.pi_matrix.cache_clear()
    begin = time.process_time()
    for patch in (48, 40, 30, 24, 20, 16, 15, 12, 10, 8):
      resize.pi_matrix(32, patch)
      resize.resize_matrix(7, 240 // patch, "linear_antialias")
    return time.process_time() - begin

  assert min(make() for _ in range(5)) < 0.01
