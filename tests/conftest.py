"""Makes JAX strict and tests repeatable: wrong shapes, silent broadcasts, warnings are errors."""

import functools
import gc
import getpass
import itertools
import os
import re
import subprocess
import sys
import tempfile
import threading
import types
import typing
from pathlib import Path

# Set before JAX is imported, and in the environment, for the commands that tests start.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile many small programs and run each a few times: unoptimized code halves the time, without
# XLA's fusion emitters (MLIR) it halves once more, and a program is compiled once for all tests and the
# processes they start. In the machine's own temporary folder, never a shared one: compiled code fits
# one kind of processor.
os.environ.setdefault(
  "XLA_FLAGS",
  "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
  " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(Path(tempfile.gettempdir()) / f"flexivit_jax-{getpass.getuser()}" / "compiled"),
)
os.environ.setdefault("MPLBACKEND", "agg")

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest
from jax._src.interpreters import mlir

_jaxtyped = jaxtyping.jaxtyped


def _checked(*, typechecker):
  """jaxtyping's decorator, which compares shapes of arrays; of a function without arrays, beartype alone.

  In the tests most calls are of such functions, and the decorator takes longer than they do. A function inside another
  has jaxtyping's as well: beartype's has a new name each time it is made, which JAX writes into programs.
  """

  def decorate(fn):
    plain = isinstance(fn, types.FunctionType) and "<locals>" not in fn.__qualname__
    plain = plain and not any(map(_of_arrays, fn.__annotations__.values()))
    return typechecker(fn) if plain else _jaxtyped(typechecker=typechecker)(fn)

  return decorate


def _of_arrays(hint) -> bool:
  """Whether an annotation has a part that is jaxtyping's, or a text, which may stand for anything."""
  if isinstance(hint, str) or type(hint).__module__.startswith("jaxtyping"):
    return True
  if typing.get_origin(hint) is typing.Literal:
    return False
  return any(map(_of_arrays, hint if isinstance(hint, list) else typing.get_args(hint)))


# Checks every annotation in the package, which must not be imported before. An int may stand where
# a float is expected, as everywhere in Python.
jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook(
  "flexivit_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Derandomized: a change is judged on its own merits, not on the luck of a draw.
# `pytest --hypothesis-profile=wide` looks further.
hypothesis.settings.register_profile("fast", deadline=None, max_examples=25, derandomize=True)
hypothesis.settings.register_profile("wide", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fast")

# JAX makes an MLIR context for each program, which is 40 % of the CPU time of a small one (2026-11-28, 180 programs of
# one operation: 2.98 s, 1.74 s with one context). The tests lower thousands, so 200 share one; a context keeps what was
# made in it, and one thread uses it. The function is JAX's own affair: where it is not there, each program has its own.
_make_context, _contexts = getattr(mlir, "make_ir_context", None), threading.local()


def _shared_context():
  if next(_contexts.__dict__.setdefault("uses", itertools.count())) % 200 == 0:
    _contexts.current = _make_context()
  return _contexts.current


if _make_context is not None:
  mlir.make_ir_context = _shared_context


def pytest_collection_finish():
  """What imports and collection made stays to the end, so the garbage collector need not walk it again and again."""
  gc.collect()
  gc.freeze()


REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"


def pytest_runtest_setup(item):
  if item.get_closest_marker("shared") and not SHARED.is_dir():
    pytest.skip(f"needs the folder {SHARED}")


@pytest.fixture
def shared() -> Path:
  """The folder ../shared: reference arrays and data that are not part of the repository."""
  if not SHARED.is_dir():
    pytest.skip(f"needs the folder {SHARED}")
  return SHARED


@pytest.fixture
def repository() -> Path:
  """The top level of the repository."""
  return REPOSITORY


class StoppedError(Exception):
  """Stands for whatever ends a run."""


@pytest.fixture
def train_until(monkeypatch):
  """Trains a config in a folder and ends after so many steps, before the next is drawn."""
  from flexivit_jax import train
  from flexivit_jax.training import patch_schedule

  draw = patch_schedule.draw

  def run(settings, workdir, stop: int) -> None:
    def draw_or_stop(flexi, *, step, **given):
      if step == stop:
        raise StoppedError
      return draw(flexi, step=step, **given)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
      patch.setattr(patch_schedule, "draw", draw_or_stop)
      train.train(settings, workdir)

  return run


def _environment(devices: int) -> dict[str, str]:
  """That of a process in which JAX sees so many CPU devices."""
  flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
  return os.environ | {
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": os.pathsep.join(sys.path),
  }


@pytest.fixture(scope="session")
def environment_of():
  """Makes the environment of a process in which JAX sees so many CPU devices."""
  return _environment


@pytest.fixture
def on_eight_devices():
  """Calls a function of a test's module with one argument, a string, where JAX sees eight devices."""

  def call(function, argument: str) -> None:
    command = "import runpy, sys; runpy.run_path(sys.argv[1])[sys.argv[2]](sys.argv[3])"
    arguments = [function.__code__.co_filename, function.__name__, argument]
    subprocess.run([sys.executable, "-c", command, *arguments], env=_environment(8), check=True)

  return call


@pytest.fixture(scope="session")
def random_params():
  """Makes parameters of a model of which every array is random, so that each one matters; nothing is compiled."""

  def make(model, hwc):
    image = jax.ShapeDtypeStruct((1, *hwc), np.float32)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x), image)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32) * 0.3, shapes)

  return make


@pytest.fixture(scope="session")
def save_small(random_params):
  """Saves a small classifier for images of 24 pixels as FOLDER/model.npz, with a record of a training."""
  from flexivit_jax import weights
  from flexivit_jax.models import FlexiViT

  def save(folder, names=("a", "b", "c"), seqhw=(2, 4), **fields):
    fields = dict(width=16, depth=1, mlp_dim=16, num_heads=2, num_classes=len(names)) | fields
    fields |= dict(patch_size=(8, 8), posemb_size=(3, 3))
    model = FlexiViT(**fields, head_zeroinit=False)
    record = {
      "model": {**fields, "patch_size": [8, 8], "posemb_size": [3, 3]}, "image_size": [24, 24],
      "source": {"file": "model.npz", "format": "ours"}, "class_names": [*names],
    }  # fmt: skip
    record |= {"trained": {"seqhw": [*seqhw]}} if seqhw else {}
    weights.save_npz(folder / "model.npz", model, random_params(model, (24, 24, 3)), record)
    return folder / "model.npz"

  return save


@pytest.fixture(scope="session")
def save_photos():
  """Saves so many photos of noise of each class as FOLDER/photos/val/CLASS/*.png."""
  from PIL import Image

  def save(folder, number, names=("a", "b", "c")):
    rng = np.random.default_rng(0)
    for name in names:
      (folder / "photos" / "val" / name).mkdir(parents=True)
      for i in range(number):
        image = Image.fromarray(rng.integers(0, 256, (26, 30, 3), np.uint8))
        image.save(folder / "photos" / "val" / name / f"{i}.png")

  return save


@pytest.fixture(scope="session")
def timm_state_dict():
  """Makes random arrays with timm's names and the shapes of a small ViT: 4 heads, 32x32 pixels."""

  def make(
    *,
    layer_scale=False,
    cls=True,
    cls_position=True,
    classes=7,
    width=32,
    registers=0,
    distilled=False,
    attention_pool=False,
    pre_norm=False,
    final_norm="norm",
  ):
    """Random arrays with timm's names and shapes; with `cls_position` all tokens have one."""
    rng, depth, patch, cells = np.random.default_rng(0), 2, 8, 16
    d, mlp = width, 48
    block = {"norm1.weight": (d,), "norm1.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,)}
    dense = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (mlp, d), "mlp.fc2": (d, mlp)}
    for name, shape in dense.items():
      block |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    if layer_scale:
      block |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}
    shapes |= {"patch_embed.proj.weight": (d, 3, patch, patch), "patch_embed.proj.bias": (d,)}
    tokens = {"cls_token": cls, "dist_token": distilled, "reg_token": registers}
    shapes |= {name: (1, int(n), d) for name, n in tokens.items() if n}
    shapes |= {"pos_embed": (1, cells + cls_position * sum(tokens.values()), d)}
    for norm in [final_norm] + ["norm_pre"] * pre_norm:
      shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    if pre_norm:
      del shapes["patch_embed.proj.bias"]
    if attention_pool:
      dense = {
        "q": (d, d),
        "kv": (2 * d, d),
        "proj": (d, d),
        "mlp.fc1": (mlp, d),
        "mlp.fc2": (d, mlp),
      }
      for name, shape in dense.items():
        shapes |= {f"attn_pool.{name}.weight": shape, f"attn_pool.{name}.bias": shape[:1]}
      shapes |= {"attn_pool.latent": (1, 1, d)}
      shapes |= {"attn_pool.norm.weight": (d,), "attn_pool.norm.bias": (d,)}
    for head in (["head"] + ["head_dist"] * distilled) * bool(classes):
      shapes |= {f"{head}.weight": (classes, d), f"{head}.bias": (classes,)}
    return {n: (0.3 * rng.normal(size=s)).astype(np.float32) for n, s in shapes.items()}

  return make


@pytest.fixture(scope="session")
def debug_run(tmp_path_factory) -> Path:
  """A run folder of `configs/digits.py:debug`, for tools that look into a run; only to be read."""
  from flexivit_jax import config, train

  return train.train(config.load("digits:debug"), tmp_path_factory.mktemp("debug") / "run")


@pytest.fixture(scope="session")
def save_towers(tmp_path_factory):
  """Saves two small towers for images of 24 pixels and returns their file."""

  from flexivit_jax import weights
  from flexivit_jax.data import text
  from flexivit_jax.models import TwoTowers
  from flexivit_jax.weights import model_records

  @functools.cache
  def save(bias=-1.0, tokenizer=True):
    model = TwoTowers(
      image=dict(width=16, depth=1, mlp_dim=16, num_heads=2, patch_size=(6, 6), posemb_size=(2, 2)),
      text=dict(width=12, depth=1, mlp_dim=16, num_heads=2, vocab_size=258, max_length=12),
      embed_dim=4,
      bias=bias,
    )
    inputs = np.zeros((1, 12, 12, 3), np.float32), np.zeros((1, 12), int)
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(0, 0.5, s.shape).astype(np.float32), shapes)
    pp = (
      "decode|resize(24)|value_range|first_caption|tokenize('gone.json', length=12, pad=1, end=1)"
    )
    record = {
      "model": model_records.record_of(model), "pp": f"{pp}|keep('image', 'tokens')",
      "source": {"file": "towers.npz", "format": "ours"}, "trained": {"seqhw": [2, 4]},
    }  # fmt: skip
    if tokenizer:
      record["text"] = text.load("bytes", length=12, pad="[PAD]", end="[END]").record()
    file = tmp_path_factory.mktemp("towers") / "towers.npz"
    weights.save_npz(file, model, params, record)
    return file

  return save


@pytest.fixture(scope="module")
def browser():
  """Debian's Chromium without a window (requirements-browser.txt); it downloads none."""
  import shutil

  sync_api = pytest.importorskip("playwright.sync_api", reason="needs requirements-browser.txt")
  path = shutil.which("chromium") or shutil.which("google-chrome")
  if path is None:
    pytest.skip("no Chromium is installed; on Debian: apt-get install chromium")
  with sync_api.sync_playwright() as started:
    yield started.chromium.launch(executable_path=path, args=["--no-sandbox"])
