"""`flexivit reproduce`: every numbered item has a place, its commands exist, and numbers stand side by side."""

import json
import shlex

import pytest

from flexivit_jax import arguments, cli, config, published, reproduce
from flexivit_jax.errors import UserError
from flexivit_jax.weights.registry import PUBLISHED


def test_the_list_names_every_item_and_what_it_needs(capsys):
  assert cli.main(["reproduce", "--list"]) == 0
  said = capsys.readouterr().out
  for name in reproduce.ITEMS:
    assert f"{name}: " in said
  assert "    data: imagenet2012; checkpoints: FlexiViT-L i1k\n" in said
  assert said.count("not in this project yet") == sum(not i.how for i in reproduce.ITEMS.values())


def test_all_that_items_name_exists(repository):
  known = set()
  for item in reproduce.ITEMS.values():
    for given in item.configs:
      assert config.load(given, [])["optim"]
    assert set(item.weights) <= set(PUBLISHED)
    known |= {item.published} - {None}
    for command in item.how:
      word, *rest = shlex.split(command, comments=True)
      if word == "flexivit":
        arguments.parse(rest)
      if word == "python":
        assert (repository / rest[0]).is_file()
  assert known == set(published.names()) - {"intro"}


RESULTS = {
  "name": "mine", "dataset": "imagenet2012", "split": "validation", "step": 10, "device": "cpu",
  "rows": [{"seqhw": 5, "patch": 48, "top1": 0.7, "ms": 2.0}, {"seqhw": 30, "patch": 8, "top1": 0.85, "ms": 9.0}],
}  # fmt: skip


def test_ours_stands_beside_the_published(tmp_path, capsys):
  file = tmp_path / "eval.json"
  file.write_text(json.dumps(RESULTS))
  only = ["--model=FlexiViT-L", "--setting=1200"]
  assert cli.main(["reproduce", "fig2", f"--results={file}", *only]) == 0
  said = capsys.readouterr().out.splitlines()
  assert said[0] == "ours: mine on imagenet2012 validation, step 10, cpu"
  start = "FlexiViT-L (i1k, 1200 epochs), imagenet2012/validation, top1 at patch"
  assert f"{start} 48: published 77.75 +- 0.1 %, ours 70, -7.75 [digitised]" in said
  assert f"{start} 8: published 86.1 %, ours 85, -1.1 [third party]" in said
  assert said[-1].startswith("differs: milliseconds")


def test_an_item_says_how_and_what_is_known(capsys):
  assert cli.main(["reproduce", "fig8"]) == 0
  said = capsys.readouterr().out
  assert "configs/transfer.py:data=imagenet2012,fixed=8,res=240" in said
  assert "top1 at patch 10: 85.3 % [third party: docsaid.org" in said


def test_what_cannot_be_compared_is_said(tmp_path):
  with pytest.raises(UserError, match=r"item of the paper 'fig99'"):
    reproduce.about("fig99")
  with pytest.raises(UserError, match="No numbers of fig5 are known"):
    reproduce.compare("fig5", RESULTS)
  with pytest.raises(
    UserError, match=r"No published number of timm is of a patch size.*FlexiViT-S"
  ):
    reproduce.compare("timm", RESULTS)
  with pytest.raises(UserError, match="cannot be read"):
    reproduce._read(tmp_path / "none.json")


@pytest.mark.slow
def test_costs_are_those_of_the_plan():
  lines = reproduce.listing(costs=True)
  (at,) = (i for i, line in enumerate(lines) if line.startswith("fig8:"))
  assert "h on a TPU v3-32 to train all 1" in lines[at + 2]
