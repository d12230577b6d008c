"""Checks of the devices that JAX sees: which, their memory, whether each computes right, whether they add up."""

import collections
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import errors, storage
from flexivit_jax.config import Section
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.doctor.findings import wrong

_GIB = 2**30
_FREE = 0.9  # of a device's memory, at the start of a process


def backend() -> str:
  """Returns the devices of all processes; looks for accelerators that JAX does not use."""
  devices = jax.devices()
  counts = collections.Counter((d.platform, d.device_kind) for d in devices)
  named = ", ".join(f"{n} x {kind} ({platform})" for (platform, kind), n in counts.items())
  each = collections.Counter(d.process_index for d in devices)
  if len(each) < jax.process_count() or len(set(each.values())) > 1:
    shares = ", ".join(f"process {i}: {each.get(i, 0)}" for i in range(jax.process_count()))
    wrong(
      f"{named}; the processes have different numbers of devices ({shares})",
      "give each process as many: look at CUDA_VISIBLE_DEVICES, and whether a device fell off its host",
    )
  if len(counts) > 1:
    wrong(f"{named}: several kinds", "run on devices of one kind")
  if devices[0].platform == "cpu" and (unused := _unused()):
    wrong(
      f"{named}, but this host has {unused}",
      "pip install '.[cuda13]' (or cuda12, tpu), look at JAX_PLATFORMS, and at the driver (nvidia-smi)",
    )
  processes = jax.process_count()
  return (
    f"{named}; {processes} process{'es' if processes > 1 else ''} of {len(devices) // processes}"
  )


def _unused() -> str:
  """What the system says of accelerators; "" where JAX was told to leave them alone."""
  if os.environ.get("JAX_PLATFORMS", "") == "cpu":
    return ""
  dev = pathlib.Path("/dev")
  found = {"NVIDIA GPUs": "nvidia[0-9]*", "TPUs": "accel[0-9]*"}
  return " and ".join(name for name, pattern in found.items() if any(dev.glob(pattern)))


def mesh(settings: Section | None) -> str:
  """Makes the mesh of a config, and divides its batch; without a config that of plain data parallelism."""
  section = {k: v for k, v in ((settings or {}).get("mesh") or {}).items() if v is not None}
  made = sharding.make_mesh(**{k: v for k, v in section.items() if k not in sharding.OPTIONS})
  text = " x ".join(f"{n} {name}" for name, n in made.shape.items())
  slices = len({sharding.slice_of(device) for device in made.devices.flat})
  text += f", {slices} slices along data" if slices > 1 else ""
  batch = (settings or {}).get("input", {}).get("batch_size")
  if batch is None:
    return text
  sharding.check_divides(int(batch), made)
  return f"{text}; {int(batch) // made.size} examples of {batch} each"


def memory() -> str:
  """Compares the devices' memory: all have to have as much, and it has to be free."""
  rows = [(d, d.memory_stats() or {}) for d in jax.local_devices()]
  limits = {d: s["bytes_limit"] for d, s in rows if "bytes_limit" in s}
  if not limits:
    return "the devices do not say; CPUs take the host's"
  usual = max(limits.values())
  for device, limit in limits.items():
    if limit < _FREE * usual:
      wrong(
        f"{device} has {limit / _GIB:.3g} GiB, others {usual / _GIB:.3g}",
        "another program may hold its memory (nvidia-smi): end it; the smallest device decides what fits",
      )
  for device, stats in rows:
    used = stats.get("bytes_in_use", 0)
    if used > (1 - _FREE) * limits.get(device, np.inf):
      wrong(f"{device}: {used / _GIB:.3g} GiB are in use", "end the program that holds them")
  return f"{min(limits.values()) / _GIB:.3g} GiB for programs on each of {len(limits)}"


def product(device: jax.Device, x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Compiles and runs a matrix product on one device, in full precision."""
  dot = jax.jit(functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST))
  return np.asarray(dot(jax.device_put(x, device), jax.device_put(y, device)))


def programs() -> str:
  """Compiles and runs a small program on every device of this process, and compares the numbers with NumPy's.

  The numbers are small integers, whose products and sums every device has exactly.
  """
  rng = np.random.default_rng(0)
  x, y = rng.integers(-8, 9, (2, 128, 128)).astype(np.float32)
  expected = x @ y
  bad = []
  for device in jax.local_devices():
    if not np.array_equal(product(device, x, y), expected):
      bad.append(str(device))
  if bad:
    wrong(
      f"wrong numbers from {', '.join(bad[:8])}",
      "take these devices out (CUDA_VISIBLE_DEVICES, or another host) and report them",
    )
  return f"right numbers from each of {jax.local_device_count()} devices"


def collective() -> str:
  """Adds up numbers of all devices of all processes; the sum is known."""
  devices = sharding.make_mesh()
  split, whole = sharding.batch_split(devices), sharding.replicated(devices)
  n = devices.size
  places = np.arange(1, n + 1, dtype=np.int32)
  array = jax.make_array_from_callback((n,), split, lambda index: places[index])
  total = int(jax.jit(jnp.sum, out_shardings=whole)(array))
  if total != n * (n + 1) // 2:
    wrong(
      f"the sum of 1 to {n} over the devices is {total}, expected {n * (n + 1) // 2}",
      "look at the links between the devices (nvidia-smi topo -m; TPU: the logs of each host) and leave bad hosts out",
    )
  return f"{n} devices add up"


def cache() -> str:
  """Checks that compiled programs can be kept."""
  setting = jax.config.values["jax_compilation_cache_dir"]
  if not jax.config.values["jax_enable_compilation_cache"]:
    return "turned off by JAX_ENABLE_COMPILATION_CACHE: each start compiles everything"
  if not setting:
    try:
      return f"{compilation.programs_folder()}: writable"
    except OSError as e:
      wrong(
        f"compiled programs are not kept: {e.strerror or e} {e.filename or ''}".strip(),
        "set FLEXIVIT_CACHE to a folder of this user, or each start compiles everything",
      )
  name = f".doctor-{os.getpid()}-{jax.process_index()}"
  if url := storage.address(setting):
    try:
      storage.Bucket(url, attempts=3).check(name)
    except errors.UserError as e:
      wrong(f"JAX_COMPILATION_CACHE_DIR={setting}: {e}", "or name a folder; docs/buckets.md")
    return f"{setting}: writable"
  from etils import epath

  folder = epath.Path(setting)
  probe = folder / name
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe.write_text("x")
    same = probe.read_text() == "x"
    probe.unlink()
  except Exception as e:  # each kind of storage has its own
    wrong(
      f"JAX_COMPILATION_CACHE_DIR={setting}: {type(e).__name__}: {e!s:.200}",
      "name a folder or bucket that may be written to",
    )
  if not same:
    wrong(f"JAX_COMPILATION_CACHE_DIR={setting} returns other bytes", "name another folder")
  return f"{setting}: writable"
