"""Accelerators that people have, as JAX sees them: how many, with how much memory, how fast."""

from typing import NamedTuple

GIB = 2**30


class Machine(NamedTuple):
  """Equal devices, those that `jax.devices()` lists: cores of a TPU v3, chips of later TPUs, GPUs.

  Attributes:
    devices: their number.
    gib: memory of each that programs may have, `bytes_limit` of its statistics, in GiB.
    each_flops: dense bfloat16 FLOP/s of each, as its maker states.
    platform: for which `models.attention` chooses its form, one of `attention.PLATFORMS`.
  """

  devices: int
  gib: float
  each_flops: float
  platform: str

  @property
  def flops(self) -> float:
    """Dense bfloat16 FLOP/s of all devices together."""
    return self.devices * self.each_flops

  @property
  def room(self) -> float:
    """Bytes of each device for a step: nine tenths, as `compilation.device_memory` has it."""
    return 0.9 * self.gib * GIB


# FLOP/s and nominal memory of TPUs: Google's pages docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v6e}, read 2026-11-28:
# v3 123e12 and 32 GiB a chip of two cores, v4 275e12 and 32 GiB, v5e 197e12 and 16 GB, v6e 918e12 and 32 GB. What is
# left of the memory: as XLA's own messages have it ("Used 19.46G of 15.48G hbm" and so on) in public reports of runs.
# FLOP/s of GPUs: NVIDIA's data sheets, half of what these state "with sparsity"; the sheets themselves could not be
# read here, pages that quote them agree. Their memory: three quarters of the nominal size, which JAX takes at the
# start (docs.jax.dev, "GPU memory allocation"); the exact size of each GPU was not verified.
_TPU_V3 = (15.48, 123e12 / 2, "tpu v3")
_TPU_V4 = (30.75, 275e12, "tpu")
_TPU_V5E = (15.75, 197e12, "tpu")
_TPU_V6E = (31.25, 918e12, "tpu")
MACHINES = {
  "v3-8": Machine(8, *_TPU_V3),
  "v3-32": Machine(32, *_TPU_V3),
  "v4-8": Machine(4, *_TPU_V4),  # eight cores, but a device is a chip of two
  "v5e-8": Machine(8, *_TPU_V5E),
  "v5e-32": Machine(32, *_TPU_V5E),
  "v5e-256": Machine(256, *_TPU_V5E),
  "v6e-8": Machine(8, *_TPU_V6E),
  "8xA100-40": Machine(8, 0.75 * 40, 312e12, "gpu"),
  "8xA100-80": Machine(8, 0.75 * 80, 312e12, "gpu"),
  "8xH100": Machine(8, 0.75 * 80, 989e12, "gpu"),
  "RTX4090": Machine(1, 0.75 * 24, 165e12, "gpu"),  # one GPU of 24 GB
}
