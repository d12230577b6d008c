"""The whole model against a NumPy re-implementation and the reference's outputs, at many sizes."""

import functools
import re

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import flexivit, vit
from flexivit_jax.models.flexivit import FlexiViT

pytestmark = pytest.mark.faults

POOLS = ("tok", "gap", "map")  # the reference's
FIELDS = dict(
  num_classes=5, patch_size=(6, 6), posemb_size=(3, 3), width=16, depth=2, mlp_dim=24, num_heads=4
)


def make(seed=0, **fields):
  """Returns (model, params): small, every array random, so that each one matters."""
  model = FlexiViT(**{**FIELDS, **fields})
  image = jax.ShapeDtypeStruct((1, 24, 24, 3), jnp.float32)
  shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, seqhw=1), image)["params"]
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)


def images(n=2, hw=(24, 24), seed=1):
  image = np.random.default_rng(seed).uniform(-1, 1, size=(n, *hw, 3))
  return jnp.asarray(image, jnp.float32)


@functools.cache
def program(model, **size):
  """The compiled model; two tests that ask for the same one share it."""
  return jax.jit(lambda p, x: model.apply({"params": p}, x, **size))


def run(model, params, image, **size):
  return program(model, **size)(params, image)


# --- a second implementation, in float64 NumPy, from the papers ---


def _interpolation(old, new, antialias=False):
  at, width = (np.arange(new) + 0.5) * old / new - 0.5, max(1.0, old / new) if antialias else 1.0
  weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)) / width)
  return weights / weights.sum(1, keepdims=True)


def _norm(x, p, eps=1e-6):
  mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
  return (x - mean) / np.sqrt(var + eps) * p["scale"] + p["bias"]


def _gelu(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _mlp(x, p):
  x = _gelu(x @ p["Dense_0"]["kernel"] + p["Dense_0"]["bias"])
  return x @ p["Dense_1"]["kernel"] + p["Dense_1"]["bias"]


def _attend(q, kv, p):
  def project(x, name):
    return np.einsum("ld,dhe->hle", x, p[name]["kernel"]) + p[name]["bias"][:, None]

  query, key, value = project(q, "query"), project(kv, "key"), project(kv, "value")
  weight = scipy.special.softmax(query @ key.swapaxes(1, 2) / np.sqrt(query.shape[-1]), axis=-1)
  return np.einsum("hle,hed->ld", weight @ value, p["out"]["kernel"]) + p["out"]["bias"]


def _forward(params, image, patch_hw, posemb_hw, pool, eps=1e-6):
  """Returns (tokens after the patch embedding, pre-logits, logits) of one image [h, w, c]."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  kernel = p["embedding"]["kernel"]
  B = np.kron(*(_interpolation(o, n) for o, n in zip(kernel.shape, patch_hw, strict=False)))
  # The cut-off: see test_resize.
  w = np.linalg.pinv(B.T, rcond=1e-10) @ kernel.reshape(B.shape[1], -1)
  w = w.reshape(*patch_hw, *kernel.shape[2:])
  (ph, pw), (gh, gw) = patch_hw, np.array(image.shape[:2]) // patch_hw
  patch = lambda i, j: image[i * ph : (i + 1) * ph, j * pw : (j + 1) * pw]  # noqa: E731
  stem = np.stack([np.tensordot(patch(i, j), w, 3) for i in range(gh) for j in range(gw)])
  stem = stem + p["embedding"]["bias"]
  grid = np.kron(*(_interpolation(o, n, True) for o, n in zip(posemb_hw, (gh, gw), strict=True)))
  x = stem + grid @ p["pos_embedding"][0]
  x = np.concatenate([p[name][0] for name in ("cls", "registers") if name in p] + [x])
  x = _norm(x, p["pre_norm"], eps) if "pre_norm" in p else x
  for name in sorted(k for k in p["Transformer"] if k.startswith("encoderblock_")):
    b = p["Transformer"][name]
    y = _norm(x, b["LayerNorm_0"], eps)
    x = x + _attend(y, y, b["MultiHeadDotProductAttention_0"])
    x = x + _mlp(_norm(x, b["LayerNorm_1"], eps), b["MlpBlock_0"])
  x = _norm(x, p["Transformer"]["encoder_norm"], eps)
  if pool == "map":
    head = p["MAPHead_0"]
    x = _attend(head["probe"][0], x, head["MultiHeadDotProductAttention_0"])
    x = x + _mlp(_norm(x, head["LayerNorm_0"], eps), head["MlpBlock_0"])
  mean = x[-len(stem) :].mean(0)
  x = {"gap": [mean], "tok+gap": [x[0], mean], "tok+reg": [*x[:2]]}.get(pool, [x[0]])
  x = np.concatenate(x)
  return stem, x, x @ p["head"]["kernel"] + p["head"]["bias"]


@pytest.mark.parametrize(
  ("pool", "hw", "size", "patch_hw"),
  [
    ("tok", (24, 24), dict(), (6, 6)),
    ("tok", (24, 24), dict(seqhw=3), (8, 8)),
    ("tok", (24, 24), dict(seqhw=8), (3, 3)),
    ("tok", (24, 24), dict(grid_hw=(6, 2)), (4, 12)),
    ("gap", (24, 36), dict(patch_hw=(12, 4)), (12, 4)),
    ("gap", (24, 24), dict(), (6, 6)),
    ("map", (16, 24), dict(seqhw=2), (8, 12)),
    ("map", (24, 24), dict(seqhw=8), (3, 3)),
  ],
)
def test_forward_is_that_of_a_second_implementation(pool, hw, size, patch_hw):
  model, params = make(pool_type=pool, posemb_size=(3, 4), num_heads=2)
  image = images(hw=hw)
  logits, out = run(model, params, image, **size)
  for i in range(2):
    pixels = np.asarray(image[i], np.float64)
    stem, pre_logits, want = _forward(params, pixels, patch_hw, (3, 4), pool)
    np.testing.assert_allclose(out["stem"][i].reshape(stem.shape), stem, atol=2e-5)
    np.testing.assert_allclose(out["pre_logits"][i], pre_logits, atol=2e-5)
    np.testing.assert_allclose(logits[i], want, atol=2e-5)


@pytest.mark.parametrize(
  "fields",
  [
    dict(pool_type="tok", registers=3),
    dict(pool_type="gap", registers=1, pre_norm=True),
    dict(pool_type="map", registers=2, layer_norm_eps=0.1),
    dict(pool_type="tok+gap", registers=2),
    dict(pool_type="tok+reg", registers=2, pre_norm=True, layer_norm_eps=0.1),
  ],
)
@pytest.mark.parametrize("scan", [False, True])
def test_fields_for_models_of_other_projects(fields, scan):
  _, params = make(**fields)
  image = images()
  logits, out = run(
    make(scan=scan, **fields)[0], vit.stack_blocks(params) if scan else params, image, seqhw=3
  )
  for i in range(2):
    pixels, eps = np.asarray(image[i], np.float64), fields.get("layer_norm_eps", 1e-6)
    _, pre_logits, want = _forward(params, pixels, (8, 8), (3, 3), fields["pool_type"], eps)
    np.testing.assert_allclose(out["pre_logits"][i], pre_logits, atol=2e-5)
    np.testing.assert_allclose(logits[i], want, atol=2e-5)
  assert out["pre_logits_2d"].shape == (2, 3, 3, 16)
  assert ("logits_2d" in out) == ("+" not in fields["pool_type"])


def _check_golden(folder, pool, sizes):
  model, params = weights.load(folder / f"flexivit_{pool}.ckpt.npz")
  with np.load(folder / f"flexivit_{pool}.golden.npz") as golden:
    image = jnp.asarray(golden["image"])
    for seqhw in sizes:
      _, out = run(model, params, image, seqhw=seqhw)
      got = dict(out, stem_norm=np.linalg.norm(out["stem"], axis=-1))
      for name in ("logits", "pre_logits", "stem_norm"):
        want = golden[f"{name}_{seqhw:02}"]
        np.testing.assert_allclose(got[name], want, rtol=0, atol=1e-4, err_msg=f"{name} {seqhw}")


@pytest.mark.shared
@pytest.mark.parametrize("pool", POOLS)
def test_golden_outputs_of_the_reference(shared, pool):
  _check_golden(shared / "golden", pool, (6, 15))


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize("pool", POOLS)
def test_golden_outputs_of_the_reference_at_all_ten_sizes(shared, pool):
  _check_golden(shared / "golden", pool, (5, 6, 8, 10, 12, 15, 16, 20, 24, 30))


# --- sizes ---


def test_seqhw_grid_and_patch_are_ways_to_say_the_same():
  model, params = make()
  sizes = dict(seqhw=8), dict(grid_hw=(8, 8)), dict(patch_hw=(3, 3))
  first, *others = (run(model, params, images(), **size)[0] for size in sizes)
  for other in others:
    np.testing.assert_array_equal(first, other)
  np.testing.assert_array_equal(
    run(model, params, images())[0], run(model, params, images(), seqhw=4)[0]
  )


@pytest.mark.parametrize(
  ("size", "message"),
  [
    (
      dict(seqhw=7),
      "seqhw=7 does not divide the image (24, 36); sizes that do: 1, 2, 3, 4, 6, 12.",
    ),
    (dict(seqhw=0), "seqhw=0 does not divide"),
    (
      dict(grid_hw=(4, 5)),
      "grid_hw=(4, 5) does not divide the image (24, 36); sizes that do: "
      "1, 2, 3, 4, 6, 8, 12, 24 and 1, 2, 3, 4, 6, 9, 12, 18, 36.",
    ),
    (dict(patch_hw=(5, 6)), "patch_hw=(5, 6) does not divide the image (24, 36)"),
    (dict(patch_hw=(48, 36)), "patch_hw=(48, 36) does not divide"),
    (dict(seqhw=4, patch_hw=(6, 6)), "Give one of seqhw, grid_hw and patch_hw, got"),
  ],
)
def test_sizes_that_do_not_fit_are_errors_before_anything_is_computed(size, message):
  model, params = make()
  with pytest.raises(UserError, match=re.escape(message)):
    model.apply({"params": params}, images(hw=(24, 36)), **size)
  # The kernel's own size is the default, and is checked too.
  with pytest.raises(UserError, match=r"patch_size=\(6, 6\) does not divide the image \(20, 24\)"):
    model.apply({"params": params}, images(hw=(20, 24)))


# --- stride and depth ---


def test_a_stride_of_the_patch_is_the_grid_of_patches():
  model, params = make()
  want = run(model, params, images(), seqhw=4)
  got = run(model, params, images(), stride=6)
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6 * max(1.0, np.abs(b).max()))
  # As the patch itself: the same program.
  resized = run(model, params, images(), stride=8, patch_hw=(8, 8))[0]
  np.testing.assert_array_equal(resized, run(model, params, images(), seqhw=3)[0])


@pytest.mark.parametrize(
  ("hw", "size", "patch_hw", "grid_hw"),
  [
    ((24, 24), dict(stride=3), (6, 6), (7, 7)),  # overlapping
    ((24, 24), dict(stride=9), (6, 6), (3, 3)),  # with gaps
    ((22, 30), dict(stride=4), (6, 6), (5, 7)),
    ((24, 24), dict(stride=5, patch_hw=(4, 9)), (4, 9), (5, 4)),
    ((24, 24), dict(stride=7, patch_hw=(3, 10)), (3, 10), (4, 3)),
    ((6, 16), dict(stride=5), (6, 6), (1, 3)),
  ],
)
def test_stride_cuts_windows_that_overlap_or_leave_gaps(hw, size, patch_hw, grid_hw):
  model, params = make()
  image, stride = images(hw=hw), size["stride"]
  windows = np.lib.stride_tricks.sliding_window_view(
    np.asarray(image, np.float64), patch_hw, (1, 2)
  )
  windows = windows[:, ::stride, ::stride]  # n gh gw c ph pw
  kernel = flexivit.resize.pi_resize(params["embedding"]["kernel"], patch_hw, "linear")
  want = np.einsum("nhwcyx,yxcd->nhwd", windows, np.asarray(kernel, np.float64))
  logits, out = run(model, params, image, **size)
  assert out["stem"].shape == (2, *grid_hw, 16) and logits.shape == (2, 5)
  np.testing.assert_allclose(out["stem"], want + params["embedding"]["bias"], atol=2e-5)
  grid = model.grid(hw, **size)
  assert grid == (patch_hw, (stride, stride), grid_hw)
  positions = flexivit.resize.resize_grid(
    params["pos_embedding"].reshape(3, 3, 16), grid_hw, "linear_antialias"
  )
  added = out["with_posemb"] - out["stem"].reshape(2, -1, 16)
  np.testing.assert_allclose(added[0], np.reshape(positions, (-1, 16)), atol=1e-5)


@pytest.mark.parametrize(
  "options", [{}, dict(remat=True), dict(scan=True), dict(scan=True, remat=True)]
)
@pytest.mark.parametrize("k", [1, 2])
def test_depth_is_the_model_of_the_first_blocks(options, k):
  _, params = make(depth=3)
  model, _ = make(depth=3, **options)
  encoder = params["Transformer"]
  kept = {f"encoderblock_{i}": encoder[f"encoderblock_{i}"] for i in range(k)}
  first = params | {"Transformer": kept | {"encoder_norm": encoder["encoder_norm"]}}
  stacked = vit.stack_blocks if model.scan else lambda p: p
  logits, out = run(model, stacked(params), images(), seqhw=3, depth=k)
  want, other = run(make(depth=k, **options)[0], stacked(first), images(), seqhw=3)
  assert jax.tree.structure(out) == jax.tree.structure(other)
  np.testing.assert_allclose(logits, want, atol=2e-6 * max(1.0, np.abs(want).max()))
  np.testing.assert_allclose(out["encoded"], other["encoded"], atol=1e-5)


@pytest.mark.parametrize("scan", [False, True])
def test_blocks_beyond_the_depth_get_no_gradient(scan):
  _, params = make()
  model, _ = make(scan=scan)
  params = vit.stack_blocks(params) if scan else params
  loss = lambda p: (model.apply({"params": p}, images(), depth=1)[0] ** 2).sum()  # noqa: E731
  blocks = vit.unstack_blocks(jax.jit(jax.grad(loss))(params))["Transformer"]
  assert all(np.abs(g).max() == 0 for g in jax.tree.leaves(blocks["encoderblock_1"]))
  kernels = blocks["encoderblock_0"]["MlpBlock_0"]
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(kernels))


@pytest.mark.parametrize("scan", [False, True])
def test_no_depth_is_all_blocks(scan):
  _, params = make()
  model, _ = make(scan=scan)
  params = vit.stack_blocks(params) if scan else params
  whole, same = (run(model, params, images(), depth=depth) for depth in (None, 2))
  jax.tree.map(np.testing.assert_array_equal, whole, same)
  assert whole[1]["encoder"].keys() == {"block00", "block01", "pre_ln"}


@pytest.mark.parametrize("depth", [0, -1, 3])
def test_a_depth_that_the_model_lacks_is_an_error(depth):
  model, params = make()
  with pytest.raises(UserError, match=f"depth={depth}: the model has 2 blocks; expected 1 to 2"):
    model.apply({"params": params}, images(), depth=depth)


def test_gradients_reach_kernel_and_positions_at_another_size_than_stored():
  model, params = make()
  image = images()
  loss = lambda p: (model.apply({"params": p}, image, seqhw=8)[0] ** 2).sum()  # noqa: E731
  value, grads = jax.jit(jax.value_and_grad(loss))(params)
  for name in ("embedding/kernel", "pos_embedding"):
    grad = np.asarray(trees.flatten(grads)[name])
    assert np.abs(grad).reshape(-1, grad.shape[-1]).min(axis=0).max() > 0
    # The slope along the gradient, by finite differences of the NumPy implementation.
    direction = grad / np.linalg.norm(grad)
    values = []
    for eps in (-1e-4, 1e-4):
      moved = trees.flatten(jax.tree.map(lambda a: np.asarray(a, np.float64), params))
      moved[name] = moved[name] + eps * direction
      moved = trees.unflatten(moved)
      pixels = np.asarray(image, np.float64)
      logits = [_forward(moved, x, (3, 3), (3, 3), "tok")[2] for x in pixels]
      values.append(np.sum(np.square(logits)))
    np.testing.assert_allclose(
      (values[1] - values[0]) / 2e-4, np.linalg.norm(grad), rtol=1e-4, err_msg=name
    )
  assert np.isfinite(value)


# --- options ---


def _gradients(model, params):
  """Returns ((loss, named intermediates), gradients), computed at another size than stored."""

  def loss(p):
    logits, out = model.apply({"params": p}, images(), seqhw=3)
    return (logits**2).sum(), out

  return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.fixture(scope="module")
def unrolled():
  return _gradients(*make())


@pytest.mark.parametrize(
  "options",
  [
    dict(remat=True),
    dict(scan=True),
    dict(scan=True, remat="blocks"),
    dict(scan="by_block", remat="dots"),
  ],
)
def test_scan_and_remat_give_the_same_numbers_and_gradients(unrolled, options):
  _, params = make()
  model, _ = make(**options)
  values, grads = _gradients(model, vit.stack_blocks(params) if model.scan is True else params)
  got = values, vit.unstack_blocks(grads)
  assert jax.tree.structure(got) == jax.tree.structure(unrolled)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(unrolled), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-6 * max(1.0, np.abs(b).max()))


def test_scan_initialises_each_block_differently_with_the_same_shapes():
  image = jnp.zeros((1, 24, 24, 3))
  model, _ = make(scan=True)
  scanned = jax.jit(model.init)(jax.random.key(0), image)["params"]
  assert not trees.diff(make()[1], vit.unstack_blocks(scanned))
  first, second = scanned["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
  assert not np.allclose(first, second)


def test_a_loop_over_blocks_that_are_stored_one_by_one_has_the_parameters_of_no_loop():
  image = jnp.zeros((1, 24, 24, 3))
  one, loop = (
    jax.jit(make(scan=scan)[0].init)(jax.random.key(0), image)["params"]
    for scan in (False, "by_block")
  )
  assert not trees.diff(one, loop)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(loop), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("scan", [False, True])
def test_dropout_takes_a_key_and_is_off_in_evaluation(scan):
  model, params = make(dropout=0.5, scan=scan)
  with pytest.raises(flax.errors.InvalidRngError, match="dropout"):
    model.apply({"params": params}, images(), train=True)

  def drop(key):
    return model.apply({"params": params}, images(), train=True, rngs={"dropout": key})[0]

  a, b, again = (jax.jit(drop)(jax.random.key(i)) for i in (0, 1, 0))
  off = run(make(scan=scan)[0], params, images())[0]
  np.testing.assert_array_equal(run(model, params, images())[0], off)
  assert not np.allclose(a, b) and not np.allclose(a, off)
  np.testing.assert_array_equal(a, again)


@pytest.mark.parametrize("pool", POOLS)
def test_bfloat16_computes_in_it_and_keeps_float32_at_both_ends(pool):
  image = images()
  model, params = make(pool_type=pool, dtype="bfloat16")
  exact, _ = make(pool_type=pool)
  init = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
  assert {leaf.dtype for leaf in jax.tree.leaves(init)} == {jnp.dtype("float32")}
  logits, out = run(model, params, image)
  want, _ = run(exact, params, image)
  assert logits.dtype == out["pre_logits"].dtype == out["encoded"].dtype == jnp.float32
  assert (
    out["encoder"]["block00"]["sa"].dtype == out["encoder"]["block01"]["mlp"].dtype == jnp.bfloat16
  )
  assert out["encoder"]["block01"]["+mlp"].dtype == out["stem"].dtype == jnp.float32
  error = np.abs(logits - want).max() / np.abs(want).max()
  assert 1e-6 < error < 0.03  # 8 bits of mantissa, a few products in a row


def test_gelu_is_tanh_by_default_and_exact_on_demand():
  model, params = make()
  exact, _ = make(gelu="exact")
  a, b = (run(m, params, images())[0] for m in (model, exact))
  assert 1e-6 < np.abs(a - b).max() < 1e-2
  x = np.linspace(-5, 5, 101, dtype=np.float32)
  np.testing.assert_allclose(vit.GELU["exact"](x), x * scipy.special.ndtr(x), atol=2e-6)
  np.testing.assert_allclose(vit.GELU["tanh"](x), _gelu(x), atol=2e-6)
  np.testing.assert_allclose(vit.GELU["quick"](x), x / (1 + np.exp(-1.702 * x)), atol=2e-6)


@pytest.mark.parametrize("kernel_resize", flexivit.CHOICES["kernel_resize"])
def test_kernel_resize_and_operator_are_used(kernel_resize):
  model, params = make(kernel_resize=kernel_resize, kernel_operator="cubic")
  kernel = flexivit.resize.KERNEL_RESIZES[kernel_resize](
    params["embedding"]["kernel"], (8, 8), "cubic"
  )
  image = images()
  want = np.einsum("nhywxc,yxcd->nhwd", image.reshape(2, 3, 8, 3, 8, 3), kernel)
  stem = run(model, params, image, seqhw=3)[1]["stem"]
  np.testing.assert_allclose(stem, want + params["embedding"]["bias"][None, None, None], atol=2e-5)


def test_kernel_moment_is_used_where_the_kernel_shrinks_and_only_there():
  moment = tuple(0.9**k for k in range(6))
  (model, params), (other, _) = make(), make(kernel_moment=moment)
  kernel = flexivit.resize.pi_resize(params["embedding"]["kernel"], (3, 3), "linear", moment)
  fixed, _ = make(patch_size=(3, 3))
  embedding = params["embedding"] | {"kernel": kernel}
  got = run(other, params, images(), seqhw=8)[0]
  want = run(fixed, params | {"embedding": embedding}, images(), seqhw=8)[0]
  np.testing.assert_allclose(got, want, atol=2e-5)
  assert np.abs(got - run(model, params, images(), seqhw=8)[0]).max() > 1e-3
  larger = [run(m, params, images(), seqhw=3)[0] for m in (model, other)]
  np.testing.assert_array_equal(*larger)


def test_sincos2d_positions_have_no_parameter_and_fit_every_grid():
  model, params = make(posemb="sincos2d")
  assert "pos_embedding" not in params
  _, out = run(model, params, images(), grid_hw=(6, 2))
  added = (out["with_posemb"] - out["stem"].reshape(2, 12, 16)).reshape(2, 6, 2, 16)
  np.testing.assert_allclose(added[0], vit.sincos2d((6, 2), 16), atol=1e-5)


def test_without_classes_the_output_is_the_pre_logits():
  model, params = make(num_classes=0)
  assert "head" not in params
  x, out = run(model, params, images())
  assert x.shape == (2, 16) and "logits" not in out and "logits_2d" not in out
  np.testing.assert_array_equal(x, out["pre_logits"])


@pytest.mark.parametrize("pool", POOLS)
def test_intermediates_have_the_references_names_and_shapes(pool):
  model, params = make(pool_type=pool)
  logits, out = run(model, params, images(), grid_hw=(6, 4))
  length = 24 + (pool == "tok")
  assert {name: x.shape for name, x in out.items() if name != "encoder"} == {
    "stem": (2, 6, 4, 16),
    "with_posemb": (2, 24, 16),
    "encoded": (2, length, 16),
    "head_input": (2, 16),
    "pre_logits": (2, 16),
    "pre_logits_2d": (2, 6, 4, 16),
    "logits_2d": (2, 6, 4, 5),
    "logits": (2, 5),
  }
  assert out["encoder"].keys() == {"block00", "block01", "pre_ln"}
  assert out["encoder"]["block00"].keys() == {"sa", "+sa", "mlp", "+mlp"}
  assert {x.shape for x in jax.tree.leaves(out["encoder"])} == {(2, length, 16)}
  np.testing.assert_array_equal(logits, out["logits"])
  np.testing.assert_array_equal(out["encoder"]["block01"]["+mlp"], out["encoder"]["pre_ln"])
  if pool == "gap":
    np.testing.assert_allclose(out["logits_2d"].mean((1, 2)), logits, atol=1e-5)


def test_map_pooling_does_not_depend_on_the_order_of_tokens():
  head = vit.MAPHead(vit.BlockConfig(mlp_dim=24, num_heads=4))
  x = images(hw=(4, 4)).reshape(2, 3, 16)
  params = jax.jit(head.init)(jax.random.key(0), x)
  apply = jax.jit(head.apply)
  np.testing.assert_allclose(apply(params, x), apply(params, x[:, ::-1]), atol=1e-6)


# --- fields ---


def test_a_field_beside_a_variant_wins():
  model = FlexiViT(variant="S", depth=3, num_heads=2)
  got = (model.width, model.depth, model.mlp_dim, model.num_heads, model.patch_size)
  assert got == (384, 3, 1536, 2, (32, 32))
  assert FlexiViT(variant="B/16").patch_size == (16, 16)
  assert FlexiViT(variant="B/16", patch_size=(8, 10)).patch_size == (8, 10)
  assert FlexiViT(**FIELDS).clone() == FlexiViT(**FIELDS)  # resolved fields stay as they are


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    (
      dict(pool_type="tk"),
      "Unknown pool_type 'tk'; known: gap, map, tok, tok+gap, tok+reg. Did you mean 'tok'?",
    ),
    (
      dict(posemb="learned"),
      "Unknown posemb 'learned'; known: learn, sincos2d. Did you mean 'learn'?",
    ),
    (dict(gelu="tan"), "Did you mean 'tanh'?"),
    (dict(kernel_resize="are"), "Did you mean 'area'?"),
    (dict(kernel_operator="cubik"), "Did you mean 'cubic'?"),
    (dict(dtype="bfloat"), "Did you mean 'bfloat16'?"),
    (dict(variant="So400"), "Did you mean 'So400m'?"),
    (dict(variant="B/"), "after the slash comes the patch size"),
    (dict(variant="B/0"), "after the slash comes the patch size"),
    (dict(width=16, num_heads=3), "width=16 must be a multiple of num_heads=3"),
    (dict(width=16, num_heads=0), "width=16 must be a multiple of num_heads=0"),
    (dict(registers=-1), "registers=-1: expected 0 or more"),
    (dict(pool_type="tok+reg"), "1 or more with pool_type='tok+reg'"),
    (dict(layer_norm_eps=0.0), "layer_norm_eps=0.0: expected a number > 0"),
    (dict(kernel_moment=(1.0, 0.5)), "kernel_moment has 2 values; expected one for each of the 32"),
    (dict(kernel_moment=(1.0,) * 32, kernel_resize="area"), "and kernel_resize='pi' (here 'area')"),
    (dict(patch_size=(0, 8)), "patch_size=(0, 8) must be two positive integers"),
    (dict(posemb_size=(7, -7)), "posemb_size=(7, -7) must be two positive integers"),
  ],
)
def test_impossible_fields_are_errors(fields, message):
  with pytest.raises(UserError, match=re.escape(message)):
    FlexiViT(**fields)
