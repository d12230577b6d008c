"""The sections that docs/evaluation_sets.md gives to paste can be pasted."""

import importlib.util
import re

import pytest

from flexivit_jax.data import label_maps
from flexivit_jax.data.preprocess import parse
from flexivit_jax.experiment import sections
from flexivit_jax.paper import measuring, test_sets


@pytest.fixture
def pasted(repository):
  """The evaluations of the ImageNet-1k config with the page's first fence, and with its second too."""
  spec = importlib.util.spec_from_file_location("i1k_sup", repository / "configs" / "i1k_sup.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  page = (repository / "docs" / "evaluation_sets.md").read_text()
  first, second = re.findall(r"```text\n((?:image|maps).*?)```", page, re.DOTALL)
  c = module.get_config()
  names = {"c": c, "GRIDS": module.GRIDS}
  exec(first, names)
  of_i1k = c.evals.to_dict()
  exec(second, names)
  return of_i1k, c.evals.to_dict()


def test_the_sections_are_right(pasted):
  of_i1k, of_i21k = pasted
  assert {"v2", "a", "r", "sketch", "real", "objectnet"} <= set(of_i1k)
  for evals in pasted:
    for name, section in evals.items():
      sections.check_evaluation(f"evals.{name}", section)
      assert not parse(section["pp"]).random
  for section in (of_i21k[name] for name in ("val", "v2", "a", "r", "sketch", "real")):
    assert label_maps.label_map(section["label_map"]).model_classes == 21843
  assert [k for k, section in of_i1k.items() if section.get("skip_unlabelled")] == ["real"]


def test_the_sets_of_reproduce_are_the_same(pasted):
  of_i1k, _ = pasted
  pp = test_sets.PROTOCOLS["paper_i21k"].pp  # what the page and the config have
  for name in ("v2", "a", "r", "sketch", "real"):
    source, classes = measuring.source_of(name, None)
    made = measuring.section(name, pp, source, classes)
    wanted = {k: of_i1k[name].get(k) for k in ("data", "pp", "label_map", "skip_unlabelled")}
    assert {k: made.get(k) for k in wanted} == wanted
