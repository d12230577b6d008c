"""A key with one wrong character, or a value of a wrong type, anywhere in any config, is an error that names it, before
a device is touched."""

import copy
import pathlib
import random
import time

import pytest

from flexivit_jax import config, experiment
from flexivit_jax.errors import UserError

pytestmark = pytest.mark.faults

CONFIGS = sorted(
  p.stem
  for p in (pathlib.Path(__file__).parents[2] / "configs").glob("[a-z]*.py")
  if p.stem != "common"
)
# The longest takes six seconds; the kinds of its sections are in the others too.
configs = pytest.mark.parametrize(
  "name", [pytest.param(n, marks=pytest.mark.full if n == "i1k_distill" else ()) for n in CONFIGS]
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


def check(name, settings):
  """As a run does until it opens data; returns the seconds."""
  opening = experiment.Opening(*(refuse for _ in experiment.Opening._fields))
  begun = time.process_time()
  with pytest.raises(UserError) as caught:
    experiment.from_config({"name": name, **settings}, opening=opening)
  return str(caught.value), time.process_time() - begun


@configs
def test_a_key_that_is_misspelt_is_named_at_once(name):
  settings = config.load(name, [])
  rng, slowest = random.Random(0), 0.0
  every = list(paths(settings))
  assert len(every) > 20 and any(path[0] == "flexi" and path[-1] == "v" for path in every)
  for path in every:
    for _ in range(3):
      wrong = misspelt(path[-1], rng)
      if wrong in at(settings, path[:-1]):
        continue  # "name" of "names" is another key, and right
      said, seconds = check(name, renamed(settings, path, wrong))
      slowest = max(slowest, seconds)
      # The wrong key is named, or that which is now missing or empty.
      assert wrong in said or path[-1] in said, (path, wrong)
  assert slowest < 2


def at(settings, path):
  for key in path:
    settings = settings[key]
  return settings


def changed(settings, path, value):
  """No section is shared with another, as two of a ConfigDict may be."""
  key, *rest = path
  return {**settings, key: changed(settings.get(key) or {}, rest, value) if rest else value}


def wrong_values(value):
  """Values that a key cannot take which takes this one."""
  yield {1, 2}
  if value is None:
    return
  yield 3 if isinstance(value, str | dict | bool) else "x"
  if isinstance(value, dict):
    yield "x"
  else:
    yield {}
  if not isinstance(value, bool):
    yield True
  if isinstance(value, tuple):
    for i in range(len(value)):
      yield (*value[:i], None, *value[i + 1 :])


@configs
def test_a_value_of_a_wrong_type_is_named_at_once(name):
  settings = config.load(name, [])
  slowest, tried = 0.0, 0
  every = [("evals", k) for k in settings["evals"]] + list(paths(settings))
  for path in every:
    for wrong in wrong_values(at(settings, path)):
      if ".".join(path) in config.OF_SEVERAL_TYPES and wrong == 3:
        continue  # a number is right there, as a text is
      if path == ("optim", "freeze") and wrong == "x":
        continue  # a text is right there, as texts are
      said, seconds = check(name, changed(settings, path, wrong))
      slowest, tried = max(slowest, seconds), tried + 1
      assert ".".join(path) in said, (path, wrong, said)
  assert slowest < 2 and tried > 60


@pytest.mark.parametrize(
  ("path", "value"),
  [
    ("hang_after", "x"),
    ("seed", 1.5),
    ("seed", "a"),
    ("log_every", "x"),
    ("init", 3),
    ("objective", 3),
    ("objective.mixup_p", "x"),
    ("objective.name", ["x"]),
    ("input.max_errors", "x"),
    ("input.prefetch", "x"),
    ("input.data.image_size", "x"),
    ("model.dropout", "x"),
    ("model.patch_size", (4.5, 4)),
    ("model.kernel_moment", 3),
    ("flexi.seqhw.p", ("a",) * 5),
    ("flexi.seqhw.stages", ((1.0, "x"),)),
    ("optim.lr", None),
    ("optim.wd_mults", ("x",)),
    ("optim.wd_mults", ((".*", "x"),)),
    ("optim.lr_mults", ((".*",),)),
    ("optim.schedule", ((".*",),)),
    ("optim.schedule", ((".*", 3),)),
    ("optim.schedule.warmup_steps", "x"),
    ("checkpoint.keep", "x"),
    ("checkpoint.every_steps", "x"),
    ("evals.test.stride", 3),
    ("evals.test.skip_unlabelled", 1),
    ("evals.test.every_percent", "x"),
    ("mesh.divide_teachers", 3),
    ("token_budget", 3),
    ("token_budget.most", "x"),
  ],
)
def test_so_is_that_of_a_key_that_the_config_left_to_its_default(path, value):
  settings = config.load("digits", [])
  settings |= {"objective": {}} | ({"token_budget": {}} if "." in path else {})
  said, _ = check("digits", changed(settings, path.split("."), value))
  assert path in said
