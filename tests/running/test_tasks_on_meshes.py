"""Other tasks than classification on two processes of four devices: the losses of one device."""

import socket
import subprocess
import sys

import numpy as np
import pytest

from flexivit_jax.running import metrics_writer

pytestmark = pytest.mark.slow

# Segmentation is our own model and loss on the stub's data; patches of 5 pixels do not divide its 24.
SEGMENTER = (
  "--config.model={'name': 'segmenter', 'backbone': {'variant': 'mu'}, 'decoder_dropout': 0.0}",
  "--config.objective={'name': 'segmentation', 'loss': {'cross_entropy': 1.0, 'dice': 0.5}}",
  "--config.flexi.seqhw.v=(5,)",
)
DIVIDED = ("--config.mesh.fsdp=4", "--config.accumulate=2")


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def train(environment_of, stub, workdir, processes, devices, changes):
  """Trains a stub with batches of 16 at one size; returns the losses."""
  command = [
    sys.executable,
    "-m",
    "flexivit_jax",
    "train",
    f"--config={stub}",
    f"--workdir={workdir}",
  ]
  command += ["--config.input.batch_size=16", "--config.flexi.seqhw.v=(3,)", *changes]
  if processes > 1:
    command += [f"--coordinator_address=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
  started = [
    subprocess.Popen(
      [*command, *([f"--process_id={i}"] if processes > 1 else [])],
      env=environment_of(devices),
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(processes)
  ]
  said = [p.communicate(timeout=300)[1] for p in started]
  assert [p.returncode for p in started] == [0] * processes, said
  return [row["loss"] for row in metrics_writer.read_rows(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("task", ["image_text", "segmentation", "detection"])
def test_a_task_has_the_same_losses_on_two_processes_that_divide_weights_and_microbatches(
  environment_of, repository, task, tmp_path
):
  stub = repository / f"tests/stubs/{task}.py"
  own = SEGMENTER if task == "segmentation" else ()
  one = train(environment_of, stub, tmp_path / "one", 1, 1, own)
  assert len(one) == 4 and len(set(one)) == 4
  several = train(environment_of, stub, tmp_path / "several", 2, 4, (*own, *DIVIDED))
  # The first losses are of the same parameters; rounding moves the later ones.
  np.testing.assert_allclose(several[0], one[0], rtol=1e-6)
  np.testing.assert_allclose(several, one, rtol=1e-3)
