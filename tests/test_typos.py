"""A key with one wrong character, anywhere in any config, is an error that names it, before a device is touched."""

import copy
import pathlib
import random
import time

import pytest

from flexivit_jax import config, experiment
from flexivit_jax.errors import UserError

CONFIGS = sorted(
  p.stem for p in (pathlib.Path(__file__).parent.parent / "configs").glob("[a-z]*.py")
)
NAMED_BY_USERS = (("evals",), ("objective", "teachers"))  # below these, keys are names of one's own


def paths(section, prefix=()):
  for key, value in section.items():
    if prefix not in NAMED_BY_USERS:
      yield (*prefix, key)
    if isinstance(value, dict):
      yield from paths(value, (*prefix, key))


def misspelt(key, rng):
  """One character is left out, doubled, replaced, or two change places; never the key itself."""
  while True:
    i = rng.randrange(len(key))
    wrong = rng.choice(
      [
        key[:i] + key[i + 1 :],
        key[: i + 1] + key[i:],
        key[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz_") + key[i + 1 :],
        key[:i] + key[i + 1 : i + 2] + key[i : i + 1] + key[i + 2 :],
      ]
    )
    if wrong and wrong != key and wrong.isidentifier():
      return wrong


def renamed(settings, path, wrong):
  out = copy.deepcopy(settings)
  section = out
  for key in path[:-1]:
    section = section[key]
  section[wrong] = section.pop(path[-1])
  return out


def refuse(*_, **__):
  raise AssertionError("data were opened before the keys were checked")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_key_that_is_misspelt_is_named_at_once(name, monkeypatch):
  settings = config.load(name, [])
  rng, slowest = random.Random(0), 0.0
  opening = experiment.Opening(refuse, refuse, refuse, refuse, refuse)
  every = [p for p in paths(settings) if p[0] != "flexi" or len(p) == 1]
  assert len(every) > 20
  for path in every:
    for _ in range(3):
      wrong = misspelt(path[-1], rng)
      begun = time.process_time()
      broken = renamed(settings, path, wrong)
      with pytest.raises(UserError) as caught:
        config.check("", broken, experiment.build, given=("opening",))
        experiment.build(**{"name": name, **broken}, opening=opening)
      slowest = max(slowest, time.process_time() - begun)
      # The wrong key is named, or that which is now missing.
      assert wrong in str(caught.value) or path[-1] in str(caught.value), (path, wrong)
  assert slowest < 2
