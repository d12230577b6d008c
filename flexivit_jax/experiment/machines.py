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


# Read on 2026-11-28; docs/distributed.md has a table of it with what could not be verified.
# FLOP/s and nominal memory of TPUs: Google's pages docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v6e}: v3 123e12 and 32 GiB
# a chip of two cores, v4 275e12 and 32 GiB, v5e 197e12 and 16 GB, v6e 918e12 and 32 GB. That JAX lists the cores of a
# v3 and the chips of a v4: jax-ml/jax pull request 21242 and discussion 36155, huggingface/transformers issue 20252.
# What is left of the memory, in XLA's messages in reports of runs: v4 "of 30.75G hbm" (erfanzar/EasyDeL issue 166), v6e
# 31.25 (megacpp.pages.dev/blog/oom-on-v6e); 15.48 of a v3 and 15.75 of a v5e were read earlier and not found again.
# FLOP/s of GPUs: NVIDIA's data sheets as pages quote them (glennklockwood.com/garden/processors), without sparsity.
# Their memory: three quarters, which JAX takes at the start (docs.jax.dev, "GPU memory allocation"), of what nvidia-smi
# says: 40, 80 and 79.65 GiB (thundergolfer.com/blog/nvidia-gpu-memory-capacity); the RTX 4090's is nominal.
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
  "8xH100": Machine(8, 0.75 * 79.65, 989e12, "gpu"),
  "RTX4090": Machine(1, 0.75 * 24, 165e12, "gpu"),  # one GPU of 24 GB
}
