"""Other tasks than classification on two processes of several devices: the losses and measurements of one device."""

import json
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
DETECTOR = (
  "--config.model={'name': 'owl_vit', 'backbone': {'variant': 'mu'}, 'embed_dim': 16}",
  "--config.objective={'name': 'detection'}",
)
OWN = {"segmentation": SEGMENTER, "owl_vit": DETECTOR}
DIVIDED = ("--config.mesh.fsdp=4", "--config.accumulate=2")


def free_port():
  with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    return s.getsockname()[1]


def train(environment_of, stub, workdir, processes, devices, changes):
  """Trains a stub at one size; returns the losses."""
  command = [
    sys.executable,
    "-m",
    "flexivit_jax",
    "train",
    f"--config={stub}",
    f"--workdir={workdir}",
  ]
  command += changes
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


@pytest.mark.parametrize("task", ["image_text", "segmentation", "detection", "owl_vit"])
def test_a_task_has_the_same_losses_on_two_processes_that_divide_weights_and_microbatches(
  environment_of, repository, task, tmp_path
):
  stub = repository / f"tests/stubs/{'detection' if task == 'owl_vit' else task}.py"
  sizes = ("--config.input.batch_size=16", "--config.flexi.seqhw.v=(3,)")
  own = (*sizes, *OWN.get(task, ()))
  one = train(environment_of, stub, tmp_path / "one", 1, 1, own)
  assert len(one) == 4 and len(set(one)) == 4
  several = train(environment_of, stub, tmp_path / "several", 2, 4, (*own, *DIVIDED))
  # The first losses are of the same parameters; rounding moves the later ones.
  np.testing.assert_allclose(several[0], one[0], rtol=1e-6)
  np.testing.assert_allclose(several, one, rtol=1e-3)


MEASURED = """
from ml_collections import ConfigDict


def get_config(arg=""):
  data = dict(name="synthetic", image_size=(20, 28), num_classes=3, num_examples=5, annotated=True)
  pp = "decode|value_range|keep('image', 'mask')"
  test = dict(type="segmentation", data=dict(data, split="test"), pp=pp, batch_size=2, threads=0)
  return ConfigDict(dict(
    total_steps=1,
    input=dict(data=dict(data, split="train"), pp=pp, batch_size=4, threads=0),
    model=dict(name="segmenter", decoder="linear", backbone=dict(variant="mu", patch_size=(4, 4))),
    objective=dict(name="segmentation"),
    flexi=dict(seqhw=dict(v=(4,))),
    optim=dict(lr=1e-3),
    evals=dict(
      test=dict(test, seqhw=(2, 4), window=(16, 16), window_stride=(9, 16)),
      whole=dict(test, seqhw=(2, 4), batch_size=4),
    ),
  ))
"""


def test_masks_are_measured_on_two_processes_as_on_one(environment_of, tmp_path):
  """Five images: the second process has one less, and fewer windows."""
  config = tmp_path / "config.py"
  config.write_text(MEASURED)
  rows = {}
  for name, processes, devices in (("one", 1, 1), ("several", 2, 2)):
    train(environment_of, config, tmp_path / name, processes, devices, ())
    files = [tmp_path / name / file for file in ("eval.json", "eval_whole.json")]
    rows[name] = [row for file in files for row in json.loads(file.read_text())["rows"]]
  for one, several in zip(rows["one"], rows["several"], strict=True):
    assert several["class_pixels"] == one["class_pixels"] and several["n"] == one["n"] == 5
    for name in ("miou", "pixel_accuracy", "boundary_iou", "ceiling", "ceiling_constant"):
      assert several[name] == pytest.approx(one[name], abs=0.01), name
