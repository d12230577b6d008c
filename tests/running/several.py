"""One process of small runs, for tests: `python several.py '{"process": 0, "count": 1, "jobs": [...]}'`.

Keys: "process" and "count", with "port"; "fault": what this process does wrong; "jobs", in turn: "workdir", "config",
what is changed, and "restore", {run folder: .npz}, in the place of training. Writes the ids of each batch that it sees
to WORKDIR.ids.PROCESS; of a run in a bucket "ids" is in the place of WORKDIR.
"""

import functools
import json
import os
import pathlib
import signal
import sys
import time

from flexivit_jax import errors, storage, train
from flexivit_jax.devices import compilation
from flexivit_jax.running import distributed, exit_codes, session, signals
from flexivit_jax.training import patch_schedule

DATA = {"name": "synthetic", "image_size": 12, "num_classes": 3, "num_examples": 48}
PP = "value_range(-1, 1)|onehot(3)|keep('image', 'labels')"
CONFIG = {
  "total_steps": 6,
  "log_every": 2,
  "input": {"data": {**DATA, "split": "train"}, "pp": f"decode|flip_lr|{PP}", "batch_size": 16, "threads": 0},
  "model": {
    # No axis of the MLPs' arrays is a multiple of eight: along eight devices they are divided along both.
    "width": 68, "depth": 2, "mlp_dim": 260, "num_heads": 2, "patch_size": (4, 4), "posemb_size": (3, 3),
    "scan": True, "head_zeroinit": False,
  },
  "flexi": {"seqhw": {"v": (2, 3)}},
  "objective": {"mixup_p": 0.5},
  "optim": {"lr": 1e-3, "wd": 1e-3, "clip": 1.0, "mu_dtype": "float32", "schedule": {"warmup_steps": 2}},
  "evals": {
    "test": {"data": {**DATA, "split": "test[:13]"}, "pp": PP, "batch_size": 16, "seqhw": (2, 3), "threads": 0}
  },
  "checkpoint": {"every_steps": 3, "keep": None},
}  # fmt: skip


def restore(config, runs) -> None:
  """Restores step 3 of runs as this topology divides it, and writes it whole."""
  import jax
  import numpy as np
  from jax.experimental import multihost_utils

  from flexivit_jax import experiment, trees
  from flexivit_jax.experiment import preparation
  from flexivit_jax.running.checkpoint import Checkpoints

  exp, mesh = preparation.place(experiment.from_config(config))
  state = preparation.first_state(exp, mesh)
  for run, out in runs.items():
    checkpoints = Checkpoints(pathlib.Path(run) / "checkpoints", keep=None)
    params, rest, _ = checkpoints.restore(3, state.params, preparation.rest(state))
    checkpoints.close()
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True):
      assert new.sharding == old.sharding
    whole = jax.tree.map(
      lambda x: multihost_utils.process_allgather(x, tiled=True), {"params": params, **rest}
    )
    # .npz knows no bfloat16, all of whose values float32 has.
    whole = jax.tree.map(lambda x: np.float32(x) if x.dtype.name == "bfloat16" else x, whole)
    if jax.process_index() == 0:
      np.savez(out, **trees.flatten(whole))


def do(job, process, fault) -> None:
  """Trains, or restores."""
  config = {**CONFIG, **job.get("config", {})}
  config["input"] = {**config["input"], "batch_size": job.get("batch_size", 16)}
  if "restore" in job:
    restore(config, job["restore"])
    return
  ids, next_batch, draw = (
    pathlib.Path(f"{job.get('ids', job['workdir'])}.ids.{process}"),
    NEXT_BATCH,
    DRAW,
  )

  def noting(*args):
    batch = next_batch(*args)
    with ids.open("a") as file:
      file.write(json.dumps(batch["_id"].tolist()) + "\n")
    if len(ids.read_text().splitlines()) == fault.get("at", -1):
      if fault["kind"] == "sleep":
        time.sleep(1000)
      if fault["kind"] == "error":
        raise errors.UserError("no such luck")
      os.kill(os.getpid(), getattr(signal, fault["kind"]))
    return batch

  def other(flexi, *, step, **rest):
    return {"seqhw": fault["size"]} if step == fault["at"] else draw(flexi, step=step, **rest)

  if fault.get("kind") == "impatient":
    wait = dict(attempts=3, wait_s=0.01, longest_s=0.1)
    storage.Bucket = functools.partial(storage.Bucket, **wait)
  if fault.get("kind") == "memory":
    compilation.device_memory = lambda: fault["bytes"]
  config |= fault.get("config", {})
  session.next_batch = noting
  if fault.get("kind") == "draw":
    patch_schedule.draw = other
  train.train(config, pathlib.Path(fault.get("workdir", job["workdir"])))


def main() -> None:
  """Does the jobs in turn; the exit codes are those of `flexivit train`."""
  given = json.loads(sys.argv[1])
  count, process = given["count"], given["process"]
  try:
    if count > 1:
      address = f"127.0.0.1:{given['port']}"
      distributed.start(
        address, count, process, join_timeout=given.get("join", 60), heartbeat_timeout=15
      )
    for job in given["jobs"]:
      do(job, process, given.get("fault", {}))
  except errors.UserError as e:
    print(f"flexivit: error: {e}", file=sys.stderr, flush=True)
    distributed.leave(2)
    sys.exit(2)
  except signals.Stopped:
    distributed.leave(exit_codes.STOPPED)
    sys.exit(exit_codes.STOPPED)
  distributed.leave(0)


NEXT_BATCH, DRAW = session.next_batch, patch_schedule.draw

if __name__ == "__main__":
  main()
