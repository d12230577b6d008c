"""`flexivit plan --machine`: the setting that it finds fits, and the one before it does not."""

import pathlib

import pytest

from flexivit_jax import cli, config, experiment
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import costs, fitting
from flexivit_jax.experiment.machines import GIB, MACHINES, Machine

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
PAPER = [
  *(f"i1k_distill:variant={v}" for v in "SBL"),
  *(f"i1k_sup:variant={v}" for v in "SBL"),
  *(f"i21k_sup:variant={v}" for v in "SBL"),
  "i21k_distill",
]


def load(spec):
  name, _, arg = spec.partition(":")
  return config.load(f"{CONFIGS / name}.py:{arg}", ["input.data.data_dir=/nowhere"])


@pytest.fixture(scope="module")
def planned():
  settings = experiment.without_evaluations(load("i1k_distill"))
  exp = costs.planned(settings, "tpu v3")
  return exp, costs.state_of(exp)


@pytest.mark.full
@pytest.mark.parametrize("spec", PAPER)
def test_the_papers_configs_fit_a_v3_32_as_they_stand(spec):
  settings = load(spec)
  assert settings["accumulate"] == "auto"
  (row,) = fitting.rows(settings, ["v3-32"])
  found = (row["why not"], row["remat"], row["scan"], row["fsdp"], row["extra FLOPs in %"])
  assert found == ("", "none", "False", "1", "0.0")
  assert float(row["GiB"]) <= float(row["of GiB"]) < 14


def test_the_fewest_microbatches_that_fit_are_found(planned):
  exp, state = planned
  machine = MACHINES["v3-32"]
  found = fitting.fit(exp, state, machine)
  assert (found.setting, found.reason) == ("2", "")

  def total(n):
    return sum(costs.memory(exp, state, sharding.abstract_mesh(32), exp.model, n).values())

  assert total(2) == found.gib * GIB <= machine.room < total(1)


def test_less_memory_takes_more_microbatches_and_where_those_do_not_suffice_remat_and_divided_weights(
  planned,
):
  exp, state = planned
  sizes = (16, 1, 0.6, 0.5, 0.01)
  found = [fitting.fit(exp, state, Machine(8, gib, 1e12, "tpu v3")) for gib in sizes]
  assert [one.setting for one in found] == [
    "8", "128, dots", "128, dots, fsdp 8", "128, blocks, fsdp 8", "no",
  ]  # fmt: skip
  assert [one.scan for one in found[:3]] == [False, False, "by_block"]
  extra = [one.extra for one in found]
  assert 0 == extra[0] < extra[1] == extra[2] < extra[3] < 1 / 3
  assert "GiB a device even so" in found[-1].reason


def test_a_batch_that_does_not_divide_fits_nowhere(planned):
  exp, state = planned
  found = fitting.fit(exp._replace(batch_size=1000), state, MACHINES["v5e-256"])
  assert found.setting == "no" and "batch_size=1000 does not divide over 256" in found.reason


def test_a_machine_that_is_not_known_and_rows_without_one_are_errors(capsys):
  arguments = ["plan", str(CONFIGS / "digits.py")]
  assert cli.main([*arguments, "--machine", "v3"]) == 2
  assert "Did you mean 'v3-8'" in capsys.readouterr().err
  assert cli.main([*arguments, "--csv", "a.csv"]) == 2
  assert "give --machine" in capsys.readouterr().err


@pytest.mark.full
def test_attention_is_that_of_each_machine():
  """A kernel for TPUs is "auto" on GPUs; what it computes again is counted, and its scores are not stored."""
  settings = load("i1k_sup")
  settings = {**settings, "model": {**settings["model"], "attention": "splash"}}
  names = ["v3-8", "v6e-8", "8xH100"]
  v3, v6e, h100 = fitting.rows(settings, names)
  assert float(v6e["extra FLOPs in %"]) > float(h100["extra FLOPs in %"]) > 0
  (auto,) = fitting.rows(load("i1k_sup"), ["v3-8"])
  assert float(auto["extra FLOPs in %"]) == 0 < float(v3["extra FLOPs in %"])
  assert float(v3["GiB"]) / float(v3["of GiB"]) <= 1


@pytest.mark.full
def test_command(capsys, tmp_path):
  arguments = ["plan", str(CONFIGS / "digits.py")]
  file = tmp_path / "fits.csv"
  assert cli.main([*arguments, "--machine", "all", "--csv", str(file)]) == 0
  assert len(capsys.readouterr().out.splitlines()) > len(MACHINES)
  lines = file.read_text().splitlines()
  assert len(lines) == 1 + len(MACHINES) and lines[1].startswith("digits,v3-8,1,1,none,")
