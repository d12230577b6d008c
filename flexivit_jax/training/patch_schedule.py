"""Which static arguments (e.g. `seqhw`) a step uses: a pure function of (config, seed, step[, the losses so far]).

NumPy only, no state of its own: every host, and every resumed run, draws the same.
"""

import itertools
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flexivit_jax import config
from flexivit_jax.errors import UserError, unknown

Size = int | tuple[int, ...]
State = dict[str, dict[str, Any]]
Cost = Callable[[dict[str, Size]], float]


class Stage(NamedTuple):
  """The probabilities of the values, which sum to 1, until a fraction of the training."""

  until: float
  probs: tuple[float, ...]


class Adapt(NamedTuple):
  """How probabilities follow the losses; see `parse`."""

  signal: str
  every: int
  power: float
  floor: float
  decay: float


class Choice(NamedTuple):
  """The values of one static argument and how often each is drawn, when; `share`: what the weights are shares of."""

  values: tuple[Size, ...]
  stages: tuple[Stage, ...]
  adapt: Adapt | None
  share: str = "steps"


Flexi = dict[str, Choice]


def parse(flexi: config.Section, cost: Cost | None = None) -> Flexi:
  """Validates e.g. `{"seqhw": {"v": (5, 6, 8), "p": (1, 1, 2)}}`; several arguments are drawn independently.

  Args:
    flexi: for each argument a section of these keys; an empty mapping is a run with nothing to draw.

      - v: the values: positive integers, or tuples of them (`grid_hw`).
      - p: weights of any sum; left out, all values are equally likely.
      - share: what the weights are shares of: "steps" (default), or "flops": each value is drawn in proportion to its
        weight divided by what a step costs there, so that equal weights give equal computation.
      - stages: a curriculum, `((until, weights), ...)` with fractions of the training up to 1, in the place of `p`; or
        "coarse_to_fine", "fine_to_coarse": one value after the other, those of fewest or of most tokens (or blocks)
        first, equally long.
      - adapt: arguments of `adaptive`: the weights then follow the losses.
    cost: see `weigh`; None: share="flops" is left to it.

  Raises:
    UserError: no values, a repeated one, one that is no size; weights of another number, negative,
      not finite, or all zero; stages that do not end at 1; an unknown key.
  """
  parsed = {name: _parse_choice(f"flexi.{name}", section) for name, section in flexi.items()}
  shared = [name for name, choice in parsed.items() if choice.share == "flops"]
  if len(shared) > 1:
    raise UserError(f"flexi.{shared[0]} and flexi.{shared[1]} both have share='flops'; one can.")
  return parsed if cost is None else weigh(parsed, cost)


def weigh(flexi: Flexi, cost: Cost) -> Flexi:
  """Returns the same choices, with the weights of share="flops" as probabilities of steps.

  Args:
    flexi: of `parse`.
    cost: FLOPs of a step with these static arguments.
  """
  shared = [name for name, choice in flexi.items() if choice.share == "flops"]
  return flexi | {name: _by_cost(flexi, name, cost) for name in shared}


def adaptive(
  *,
  signal: str = "loss",
  every: int = 100,
  power: float = 1.0,
  floor: float = 0.2,
  decay: float = 0.9,
) -> Adapt:
  """Weights that follow the losses: `p * (signal ** power)`, with a share of the fixed probabilities.

  Args:
    signal: "loss": the running mean of a value's own losses, which under distillation is its distance from the
      teacher; "progress": by how much the short running mean is below the long one (decay ** 0.1), or 0.
    every: steps between changes.
    power: 0 changes nothing, larger values prefer more strongly.
    floor: share of the probabilities that stays as configured, in (0, 1].
    decay: of the running mean, for each step in which the value was drawn.
  """
  if signal not in SIGNALS:
    raise unknown("flexi adapt signal", signal, SIGNALS)
  # A negative power of a signal that is 0 is no number.
  if every < 1 or not (0 < floor <= 1 and 0 < decay < 1 and 0 <= power < math.inf):
    raise UserError(
      f"adapt: every={every}, power={power}, floor={floor}, decay={decay}; expected every >= 1,"
      " a finite power >= 0, 0 < floor <= 1, 0 < decay < 1."
    )
  return Adapt(signal, every, power, floor, decay)


SIGNALS: dict[str, Callable[[float, float], float]] = {
  "loss": lambda short, long: max(short, 0.0),  # a distance of 0 may be rounded to just below it
  "progress": lambda short, long: max(long - short, 0.0),
}


def draw(
  flexi: Flexi, *, seed: int, step: int, total_steps: int | None = None, state: State | None = None
) -> dict[str, Size]:
  """Returns the value of each argument at one step, counted from 0; arguments are drawn independently.

  Args:
    flexi: of `parse`.
    seed: of the run.
    step: counted from 0.
    total_steps: of the run; curricula need it.
    state: of `update`, after the steps before; adaptive choices need it.

  Raises:
    UserError: `seed` or `step` is negative; something that a choice needs is missing.
  """
  if seed < 0 or step < 0:
    raise UserError(f"Got seed={seed}, step={step}; expected numbers >= 0.")
  drawn = {}
  for name, choice in flexi.items():
    probs = probabilities(flexi, name, step=step, total_steps=total_steps, state=state)
    drawn[name] = _pick(choice.values, probs, _uniform(seed, step, name))
  return drawn


def probabilities(
  flexi: Flexi, name: str, *, step: int, total_steps: int | None = None, state: State | None = None
) -> tuple[float, ...]:
  """Returns those of an argument's values at a step."""
  choice = flexi[name]
  if choice.share == "flops":
    raise UserError(f"flexi.{name}.share='flops': what a step costs is not known here.")
  if choice.adapt:
    probs = (state or {}).get(name, {}).get("probs", ())
    if len(probs) != len(choice.values):
      raise UserError(
        f"flexi.{name} is adaptive; its draws need the state of `update` for {len(choice.values)} values, got one for"
        f" {len(probs)}. A run goes on with the choice that it began with; for another give another --workdir."
      )
    return tuple(probs)
  if len(choice.stages) == 1:
    return choice.stages[0].probs
  if total_steps is None:
    raise UserError(f"flexi.{name} has stages; its draws need total_steps.")
  # Rounded: 0.07 of 100 steps is a little more than 7 in floating point, and would end one step late.
  return next(
    s.probs for s in choice.stages if step < round(s.until * total_steps, 6) or s.until == 1
  )


def all_static(flexi: Flexi) -> list[dict[str, Size]]:
  """Returns every combination that `draw` can return, i.e. what there is to compile."""
  possible = [
    [v for i, v in enumerate(choice.values) if any(stage.probs[i] > 0 for stage in choice.stages)]
    for choice in flexi.values()
  ]
  return [dict(zip(flexi, values, strict=True)) for values in itertools.product(*possible)]


def shares(flexi: Flexi, cost: Cost) -> list[tuple[dict[str, Size], float, float]]:
  """Returns for each combination its expected share of the steps of the whole training, and what a step of it costs.

  Adaptive choices count as they begin.
  """
  found = []
  for size in all_static(flexi):
    part = 1.0
    edges = sorted({stage.until for choice in flexi.values() for stage in choice.stages})
    if flexi:
      spans = zip([0.0, *edges], edges, strict=False)
      part = sum((b - a) * _joint(flexi, size, (a + b) / 2) for a, b in spans)
    found.append((size, part, cost(size)))
  return found


def mean_cost(flexi: Flexi, cost: Cost) -> float:
  """Returns the expected FLOPs of a step, the mean over the whole training."""
  return math.fsum(part * flops for _, part, flops in shares(flexi, cost))


def init_state(flexi: Flexi) -> State:
  """Returns the JSON-able state of the adaptive choices before the first step; {} if there are none."""
  return {
    name: {
      "short": [None] * len(choice.values),
      "long": [None] * len(choice.values),
      "probs": list(choice.stages[0].probs),
    }
    for name, choice in flexi.items()
    if choice.adapt
  }


def update(
  flexi: Flexi, state: State, *, step: int, drawn: Mapping[str, Size], loss: float
) -> State:
  """Returns the state after one more step, the `step`-th counted from 1, which drew `drawn` and had `loss`."""
  new = {}
  for name, before in state.items():
    choice = flexi[name]
    adapt = choice.adapt
    assert adapt is not None
    i = choice.values.index(drawn[name])
    after = {key: list(values) for key, values in before.items()}
    for key, decay in (("short", adapt.decay), ("long", adapt.decay**0.1)):
      old = after[key][i]
      after[key][i] = loss if old is None else decay * old + (1 - decay) * loss
    if step % adapt.every == 0:
      after["probs"] = list(_adapted(choice.stages[0].probs, adapt, after))
    new[name] = after
  return new


def is_due(flexi: Flexi, step: int) -> bool:
  """Whether an adaptive choice changes after the `step`-th step, for which all losses until then are needed."""
  return any(choice.adapt and step % choice.adapt.every == 0 for choice in flexi.values())


def _adapted(
  base: tuple[float, ...], adapt: Adapt, running: Mapping[str, list[float | None]]
) -> tuple[float, ...]:
  signal = SIGNALS[adapt.signal]
  pairs = zip(running["short"], running["long"], strict=True)
  seen = [None if a is None or b is None else signal(a, b) for a, b in pairs]
  known = [s for s in seen if s is not None]
  # What was never drawn counts as the best reason to draw it.
  strong = [max(known) if s is None else s for s in seen]
  if not max(strong) > 0:
    return base
  weights = [p * (s / max(strong)) ** adapt.power for p, s in zip(base, strong, strict=True)]
  total = math.fsum(weights)
  if total == 0:
    return base
  return tuple(
    adapt.floor * p + (1 - adapt.floor) * w / total for p, w in zip(base, weights, strict=True)
  )


def _joint(flexi: Flexi, size: Mapping[str, Size], fraction: float) -> float:
  probs = 1.0
  for name, choice in flexi.items():
    stage = next(s for s in choice.stages if fraction < s.until or s.until == 1)
    probs *= stage.probs[choice.values.index(size[name])]
  return probs


def _by_cost(flexi: Flexi, name: str, cost: Cost) -> Choice:
  """The choice with every weight divided by the mean cost of its value over what else is drawn."""
  others = {k: c for k, c in flexi.items() if k != name}

  def mean(value: Size) -> float:
    return mean_cost(others, lambda size: cost({**size, name: value}))

  costs = [mean(value) for value in flexi[name].values]
  stages = []
  for stage in flexi[name].stages:
    weights = [p / c for p, c in zip(stage.probs, costs, strict=True)]
    stages.append(Stage(stage.until, tuple(w / math.fsum(weights) for w in weights)))
  return flexi[name]._replace(stages=tuple(stages), share="steps")


def _uniform(seed: int, step: int, name: str) -> float:
  """Returns a number in [0, 1) with 53 random bits.

  From raw Philox bits, not `Generator.choice`: NumPy promises to keep the stream of a bit generator
  and of SeedSequence over versions, but not that of the distributions (NEP 19).
  """
  words = np.random.SeedSequence(seed, spawn_key=(step, zlib.crc32(name.encode())))
  return (int(np.random.Philox(words).random_raw()) >> 11) * 2.0**-53


def _pick(values: tuple[Size, ...], probs: tuple[float, ...], u: float) -> Size:
  last = max(i for i, p in enumerate(probs) if p > 0)
  # Rounding may leave the sum just below u; it must not reach a value of weight zero then.
  index = np.searchsorted(np.cumsum(probs), u, side="right")
  return values[min(int(index), last)]


_KEYS = ("v", "p", "share", "stages", "adapt")
_ORDERS = ("coarse_to_fine", "fine_to_coarse")
# These are in pixels, where small is fine; other arguments count tokens or blocks.
_IN_PIXELS = ("patch_hw", "stride")


def _parse_choice(key: str, section: object) -> Choice:
  keys = config.check_known(key, section, optional=_KEYS)
  values = _sequence(f"{key}.v", keys.get("v", ()))
  if not values:
    raise UserError(f"{key}.v is empty; give at least one value, e.g. v=(5, 6, 8).")
  values = tuple(_size(f"{key}.v", value) for value in values)
  twice = [value for i, value in enumerate(values) if value in values[:i]]
  if twice:
    raise UserError(f"{key}.v has {twice[0]} twice; use weights p to draw a value more often.")
  if "stages" in keys and ("p" in keys or "adapt" in keys):
    raise UserError(f"{key} has stages and p or adapt; a curriculum's weights are in its stages.")
  adapt = _parse_adapt(f"{key}.adapt", keys.get("adapt"))
  if "stages" in keys:
    stages = _parse_stages(f"{key}.stages", keys["stages"], values)
    return Choice(values, stages, adapt, _share(key, keys))
  weights = _sequence(f"{key}.p", keys.get("p", (1.0,) * len(values)))
  stages = (Stage(1.0, _probs(f"{key}.p", weights, len(values))),)
  return Choice(values, stages, adapt, _share(key, keys))


def _parse_adapt(key: str, options: Any) -> Adapt | None:
  if options is None:
    return None
  config.check(key, options, adaptive)
  return adaptive(**options)


def _parse_stages(key: str, stages: Any, values: tuple[Size, ...]) -> tuple[Stage, ...]:
  n = len(values)
  if isinstance(stages, str):
    if stages not in _ORDERS:
      raise unknown(key, stages, _ORDERS)
    small_first = (stages == "coarse_to_fine") != (key.split(".")[1] in _IN_PIXELS)
    area = [(int(np.prod(value)), value) for value in values]
    order = sorted(range(n), key=lambda i: area[i], reverse=not small_first)
    stages = [((k + 1) / n, [float(i == only) for i in range(n)]) for k, only in enumerate(order)]
  parsed = []
  for stage in _sequence(key, stages):
    if isinstance(stage, str) or not isinstance(stage, Sequence) or len(stage) != 2:
      raise UserError(f"{key} has {stage!r}; expected (until, weights), e.g. (0.5, (1, 1, 0)).")
    if not _is_number(stage[0]):
      raise UserError(f"{key} has {stage[0]!r}; expected a fraction of the training.")
    parsed.append(Stage(float(stage[0]), _probs(key, _sequence(key, stage[1]), n)))
  edges = [stage.until for stage in parsed]
  # Pairwise, since a NaN is as large as its neighbours to `sorted`.
  if not all(a < b for a, b in itertools.pairwise([0.0, *edges])) or edges[-1:] != [1.0]:
    raise UserError(f"{key} end at {edges}; expected rising fractions of the training, the last 1.")
  return tuple(parsed)


def _share(key: str, section: config.Section) -> str:
  share = section.get("share", "steps")
  if share not in ("steps", "flops"):
    raise unknown(f"{key}.share", share, ("steps", "flops"))
  return share


def _sequence(key: str, values: Any) -> tuple[Any, ...]:
  if isinstance(values, str) or not isinstance(values, Sequence | np.ndarray):
    raise UserError(f"{key}={values!r}; expected a tuple, e.g. (5, 6, 8).")
  return tuple(values)


def _size(key: str, value: Any) -> Size:
  if isinstance(value, Sequence) and not isinstance(value, str) and len(value):
    return tuple(_int_size(key, v) for v in value)
  return _int_size(key, value)


def _int_size(key: str, value: Any) -> int:
  if isinstance(value, bool) or not isinstance(value, int | np.integer) or value <= 0:
    raise UserError(f"{key} has {value!r}; expected integers > 0, or tuples of them.")
  return int(value)


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _probs(key: str, weights: tuple[Any, ...], n: int) -> tuple[float, ...]:
  if len(weights) != n:
    raise UserError(f"{key} has {len(weights)} weights for {n} values; give one each, or no p.")
  if not all(_is_number(w) and math.isfinite(w) and w >= 0 for w in weights):
    raise UserError(f"{key}={weights}; expected finite weights >= 0.")
  total = float(sum(weights))
  if total == 0:
    raise UserError(f"{key}={weights}; expected at least one weight > 0.")
  return tuple(float(w) / total for w in weights)
