"""Every command that reads weights takes the options of reading them, and prints what a user should know of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import cli, trees, weights
from flexivit_jax.commands import options
from flexivit_jax.experiment import loaders
from flexivit_jax.models import FlexiViT

COMMANDS = {
  "eval": ["--config=c.py", "--checkpoint=w"],
  "inspect": ["w"],
  "convert": ["w", "out.npz"],
  "export": ["w", "out.zip", "--seqhw=4"],
  "flexify": ["--init=w", "--data=d", "--out=o"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_takes_the_options_of_reading(command):
  given = ["--num_heads=4", "--gelu=quick", "--mean=0.4,0.5,0.6", "--std=0.2,0.2,0.3"]
  args = cli.parse([command, *COMMANDS[command], *given, "--ema", "--posemb_size=9,16"])
  want = {"num_heads": 4, "gelu": "quick", "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.3)}
  assert options.loading(args) == want | {"ema": True, "posemb_size": (9, 16)}
  assert options.loading(cli.parse([command, *COMMANDS[command]])) == {}


def test_what_a_command_reads_weights_with_a_config_can_say_of_init_and_teachers(tmp_path):
  given = ["--num_heads=4", "--gelu=quick", "--mean=0.4,0.5,0.6", "--std=0.2,0.2,0.3"]
  args = cli.parse(["inspect", "w", *given, "--ema", "--posemb_size=9,16"])
  for load in (loaders.load_init, loaders.load_teacher):
    assert options.loading(args).keys() <= inspect.signature(load).parameters.keys()


def test_a_rectangular_grid_and_the_ema_are_read_into_a_model_of_another_grid(tmp_path):
  fields = dict(width=8, depth=1, mlp_dim=16, num_heads=2, patch_size=(2, 2), num_classes=0)
  wide = FlexiViT(**fields, posemb_size=(2, 4), pool_type="gap", gelu="quick")
  params = jax.jit(wide.init)(jax.random.key(0), jnp.zeros((1, 4, 8, 3)))["params"]
  raw = {f"params/{name}": np.asarray(a) for name, a in trees.flatten(params).items()}
  averaged = {f"ema_params/{name.removeprefix('params/')}": a + 1 for name, a in raw.items()}
  np.savez(tmp_path / "w.npz", **raw, **averaged)
  model = FlexiViT(**fields, posemb_size=(3, 3), pool_type="gap", gelu="quick")
  read = dict(checkpoint=str(tmp_path / "w.npz"), gelu="quick", posemb_size=(2, 4))
  start, average = (loaders.load_init(model, **read, ema=ema).params for ema in (False, True))
  assert start["pos_embedding"].shape == (1, 9, 8)
  np.testing.assert_allclose(average["pos_embedding"], start["pos_embedding"] + 1, atol=1e-6)


def test_notes_of_teachers_and_init_are_printed_once_in_a_process(monkeypatch, capsys, tmp_path):
  monkeypatch.setattr(loaders, "_printed", set())
  record = {"notes": ["Heads are assumed."]}
  loaders._print_notes(record)
  loaders._print_notes(record)
  assert capsys.readouterr().err == "note: Heads are assumed.\n"
  weights.print_notes(record)
  assert capsys.readouterr().err == "note: Heads are assumed.\n"
