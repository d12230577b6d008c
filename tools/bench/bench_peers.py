"""The same work by this package, by timm and by a plain linen model, side by side.

python tools/bench/bench_peers.py --forward --train --out peers.csv
python tools/bench/bench_peers.py --forward --batch_size 1 --peers ours,timm,onnx --patches 48,30,16,8
python tools/bench/bench_peers.py --compile --peers ours,yardstick

Each peer is a process of its own, which waits while another works; they take turns at every size, and the medians are
compared. Needs the environment of `make test-convert`. Threads are those that this process may use (`taskset`).
"""

import argparse
import csv
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from flexivit_jax import cli

Once = Callable[[], Any]
PEERS = ("ours", "yardstick", "timm", "timm_bf16", "onnx")
SIDES = {
  48: 5,
  40: 6,
  30: 8,
  24: 10,
  20: 12,
  16: 15,
  15: 16,
  12: 20,
  10: 24,
  8: 30,
}  # of 240 pixels: patch, tokens a side
VARIANTS = {
  "S": ("small", 384, 12, 6, 1536),
  "B": ("base", 768, 12, 12, 3072),
  "L": ("large", 1024, 24, 16, 4096),
}


# --- what each peer does ---


def ours(kind: str, variant: str, seqhw: int, batch: int) -> Once:
  """This package: as `flexivit bench` does it."""
  from flexivit_jax.devices import allocator

  allocator.keep_memory()
  import jax

  from flexivit_jax import weights
  from flexivit_jax.experiment import benchmarks
  from flexivit_jax.models import FlexiViT

  model = FlexiViT(num_classes=1000, variant=variant)
  if kind == "train":
    step, _, _ = benchmarks.training(model, [seqhw], batch, 240)
    return lambda: jax.block_until_ready(step(seqhw))
  image = jax.random.normal(jax.random.key(1), (batch, 240, 240, 3))
  params = jax.jit(lambda: model.init(jax.random.key(0), image[:1], seqhw=seqhw)["params"])()
  fixed, baked = weights.bake(model, params, image_hw=(240, 240), seqhw=seqhw)
  apply = jax.jit(lambda params, image: fixed.apply({"params": params}, image)[0])
  return lambda: jax.block_until_ready(apply(baked, image))


def yardstick(kind: str, variant: str, seqhw: int, batch: int) -> Once:
  """The plain linen model with AdamW."""
  import jax
  import yardstick as plain

  _, width, depth, heads, mlp_dim = VARIANTS[variant]
  model = plain.Yardstick(width, depth, heads, mlp_dim)
  image = jax.random.normal(jax.random.key(1), (batch, 240, 240, 3))
  params = jax.jit(lambda: model.init(jax.random.key(0), image[:1], seqhw=seqhw))()
  if kind == "forward":
    apply = jax.jit(functools.partial(model.apply, seqhw=seqhw))
    return lambda: jax.block_until_ready(apply(params, image))
  step, state, data = yardstick_step(model, params, image)
  return stepping(jax.jit(functools.partial(step, seqhw=seqhw), donate_argnums=0), state, data)


def yardstick_step(model: Any, params: Any, image: Any) -> tuple[Any, Any, Any]:
  """Returns the step (state, data, seqhw), the first state, and the data."""
  import jax
  import optax

  labels, tx = jax.numpy.arange(len(image)) % 1000, optax.adamw(1e-3)

  def loss(params: Any, data: Any, seqhw: int) -> Any:
    logits = model.apply(params, data[0], seqhw=seqhw)
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, data[1]).mean()

  def step(state: Any, data: Any, seqhw: int) -> Any:
    value, grads = jax.value_and_grad(loss)(state[0], data, seqhw)
    updates, opt_state = tx.update(grads, state[1], state[0])
    return (optax.apply_updates(state[0], updates), opt_state), value

  return step, (params, tx.init(params)), (image, labels)


def stepping(step: Any, state: Any, data: Any) -> Once:
  """A function that trains one step further."""
  import jax

  held = [state]

  def once() -> None:
    held[0], measured = step(held[0], data)
    jax.block_until_ready((held[0], measured))

  return once


def timm(kind: str, variant: str, seqhw: int, batch: int, bfloat16: bool = False) -> Once:
  """The model of timm of this patch size in eager PyTorch with AdamW."""
  import torch

  # timm imports torchvision, which cannot be imported beside a torch built without CUDA unless these are known.
  if not torch.backends.cuda.is_built():
    known = torch.library.Library("torchvision", "DEF")
    for op in ("nms", "qnms"):
      known.define(f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
  import timm as library

  torch.set_num_threads(len(os.sched_getaffinity(0)))
  name = f"flexivit_{VARIANTS[variant][0]}"
  model = library.create_model(name, img_size=240, patch_size=240 // seqhw, num_classes=1000)
  image, labels = torch.randn(batch, 3, 240, 240), torch.arange(batch) % 1000
  cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16)
  if kind == "forward":
    model.eval()

    def once() -> None:
      with torch.inference_mode(), cast:
        model(image)

    return once
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

  def step() -> None:
    with cast:
      loss = torch.nn.functional.cross_entropy(model(image), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

  return step


def onnx(kind: str, variant: str, seqhw: int, batch: int) -> Once:
  """Our export to ONNX in onnxruntime; inference only."""
  import jax
  import numpy as np
  import onnxruntime

  from flexivit_jax.models import FlexiViT
  from flexivit_jax.training import steps
  from flexivit_jax.weights.export import onnx as onnx_folder

  if kind != "forward":
    raise SystemExit("onnxruntime has --forward only.")
  model = FlexiViT(num_classes=1000, variant=variant)
  params = jax.device_get(
    jax.jit(lambda: steps.init_params(model, {"image": (240, 240, 3)}, seed=0))()
  )
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = len(os.sched_getaffinity(0))
  with tempfile.TemporaryDirectory() as folder:
    out = pathlib.Path(folder) / "export"
    onnx_folder.write(out, model, params, {}, image_hw=(240, 240), sizes=[seqhw])
    file = str(out / onnx_folder.name_of(seqhw))
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
  image = np.random.default_rng(1).standard_normal((batch, 240, 240, 3), np.float32)
  (name,) = (i.name for i in session.get_inputs())
  return lambda: session.run(None, {name: image})


MAKE: dict[str, Callable[..., Once]] = {
  "ours": ours,
  "yardstick": yardstick,
  "timm": timm,
  "timm_bf16": functools.partial(timm, bfloat16=True),
  "onnx": onnx,
}


# --- compilation ---


def compile_ours(variant: str, patches: list[int], batch: int) -> float:
  """Seconds to trace, lower and compile the training steps of all sizes."""
  from flexivit_jax.experiment import benchmarks
  from flexivit_jax.models import FlexiViT

  model = FlexiViT(num_classes=1000, variant=variant)
  return benchmarks.training(model, [SIDES[p] for p in patches], batch, 240)[2].seconds


def compile_yardstick(variant: str, patches: list[int], batch: int) -> float:
  """The same of the plain model."""
  import jax
  import yardstick as plain

  _, width, depth, heads, mlp_dim = VARIANTS[variant]
  model = plain.Yardstick(width, depth, heads, mlp_dim)
  image = jax.random.normal(jax.random.key(1), (batch, 240, 240, 3))
  params = jax.jit(lambda: model.init(jax.random.key(0), image[:1], seqhw=15))()
  step, state, data = yardstick_step(model, params, image)
  begin = time.perf_counter()
  for patch in patches:
    at_size = functools.partial(step, seqhw=SIDES[patch])
    jax.jit(at_size, donate_argnums=0).lower(state, data).compile()
  return time.perf_counter() - begin


COMPILE = {"ours": compile_ours, "yardstick": compile_yardstick}


def compare_compiling(peers: list[str], variant: str, patches: list[int], batch: int) -> None:
  """Prints for each peer the seconds with nothing kept on disk, and with everything."""
  for peer in peers:
    with tempfile.TemporaryDirectory() as folder:
      kept = {
        "JAX_COMPILATION_CACHE_DIR": folder,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
      }
      seconds = []
      for _ in ("cold", "warm"):
        worker = Worker(peer, kept)
        found, missed = worker.ask(compile=dict(variant=variant, patches=patches, batch=batch))
        seconds.append((found, missed))
        worker.process.communicate()
    (cold, compiled), (warm, again) = seconds
    print(
      f"{peer} {variant}, {len(patches)} training steps: cold {cold:.1f} s ({compiled} programs compiled), warm"
      f" {warm:.1f} s ({again} compiled)",
      flush=True,
    )


# --- taking turns ---


def work(peer: str) -> None:
  """Does what each line of standard input says, and answers with a line."""
  once: Once = lambda: None  # noqa: E731
  for line in sys.stdin:
    order = json.loads(line)
    if "make" in order:
      once = MAKE[peer](**order["make"])
      for _ in range(2):
        once()
      answer = None
    elif "compile" in order:
      answer = counted(functools.partial(COMPILE[peer], **order["compile"]))
    else:
      begin = time.perf_counter()
      for _ in range(order["calls"]):
        once()
      answer = (time.perf_counter() - begin) / order["calls"]
    print(json.dumps(answer), flush=True)


def counted(run: Callable[[], float]) -> tuple[float, int]:
  """What a function returns, and how many programs were compiled meanwhile and not found on disk."""
  import jax

  missed = []

  def listen(event: str, **_: Any) -> None:
    if event.endswith("cache_misses"):
      missed.append(event)

  jax.monitoring.register_event_listener(listen)
  return run(), len(missed)


class Worker:
  """A peer's process."""

  def __init__(self, peer: str, environment: dict[str, str] | None = None):
    command = [sys.executable, __file__, "--worker", peer]
    env = os.environ | (environment or {})
    self.process = subprocess.Popen(
      command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    )

  def ask(self, **order: Any) -> Any:
    """Sends an order and waits for the answer."""
    assert self.process.stdin
    assert self.process.stdout
    self.process.stdin.write(json.dumps(order) + "\n")
    self.process.stdin.flush()
    return json.loads(self.process.stdout.readline())


def compare(
  peers: list[str], kind: str, variant: str, patch: int, batch: int, rounds: int
) -> dict[str, list[float]]:
  """Returns seconds a call of each peer, `rounds` of each, in turns."""
  workers = {peer: Worker(peer) for peer in peers}
  make = dict(kind=kind, variant=variant, seqhw=SIDES[patch], batch=batch)
  calls: dict[str, int] = {}
  times: dict[str, list[float]] = {peer: [] for peer in peers}
  for peer, worker in workers.items():
    worker.ask(make=make)
    calls[peer] = max(1, round(0.3 / worker.ask(calls=1)))
  for _ in range(rounds):
    for peer, worker in workers.items():
      times[peer].append(worker.ask(calls=calls[peer]))
  for worker in workers.values():
    worker.process.communicate()
  return times


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--forward", action="store_true")
  parser.add_argument("--train", action="store_true")
  parser.add_argument("--compile", action="store_true", help="ours and yardstick only")
  parser.add_argument("--variants", default="S")
  parser.add_argument("--patches", default=",".join(map(str, SIDES)))
  parser.add_argument("--peers", default="ours,yardstick,timm", help=f"of {', '.join(PEERS)}")
  parser.add_argument("--batch_size", type=int, default=8)
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--out", help="a CSV file to write")
  parser.add_argument("--worker", choices=PEERS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(args.worker)
    return
  peers: list[str] = args.peers.split(",")
  rows: list[dict[str, Any]] = []
  patches = [int(p) for p in args.patches.split(",")]
  if args.compile:
    for variant in args.variants.split(","):
      compare_compiling([p for p in peers if p in COMPILE], variant, patches, args.batch_size)
    return
  kinds = [k for k in ("forward", "train") if getattr(args, k)]
  for kind in kinds or parser.error("give --forward, --train or both"):
    for variant in args.variants.split(","):
      for patch in patches:
        times = compare(peers, kind, variant, patch, args.batch_size, args.rounds)
        medians = {peer: statistics.median(t) for peer, t in times.items()}
        row: dict[str, Any] = {
          "kind": kind,
          "variant": variant,
          "patch": patch,
          "batch": args.batch_size,
        }
        row |= {f"{peer}_ms": round(1e3 * m, 3) for peer, m in medians.items()}
        row |= {
          f"{peer}_spread": round((max(t) - min(t)) / medians[peer], 3) for peer, t in times.items()
        }
        row |= {
          f"{peer}/ours": round(m / medians[peers[0]], 3)
          for peer, m in medians.items()
          if peer != peers[0]
        }
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        rows.append(row)
        if args.out:
          with open(args.out, "w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
  cli.tool(main)
