"""With which setting the steps of a config fit a machine, and what that costs: for `flexivit plan --machine`."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

from flexivit_jax import errors, experiment
from flexivit_jax.config import Section
from flexivit_jax.devices import sharding
from flexivit_jax.experiment import costs
from flexivit_jax.experiment.machines import GIB, MACHINES, Machine
from flexivit_jax.models import FlexiViT, Model
from flexivit_jax.models.flops import recomputed
from flexivit_jax.models.vit import which_remat
from flexivit_jax.training import patch_schedule, steps

REMAT = ("", "dots", "blocks")  # from the fewest FLOPs to the least memory


class Fit(NamedTuple):
  """A setting, and what it takes at the size of the most tokens.

  Attributes:
    accumulate: number of microbatches at that size; `accumulate="auto"` takes fewer at others.
    remat: of `model.remat`, "" for none.
    scan: of `model.scan`.
    fsdp: of `mesh.fsdp`.
    gib: estimated memory of each device in GiB.
    extra: FLOPs of what is computed again and of kernels' padding, `flops.recomputed`, as a share of training's.
    reason: why nothing fits; "" where this does.
  """

  accumulate: int
  remat: str
  scan: bool | str
  fsdp: int
  gib: float
  extra: float
  reason: str = ""

  @property
  def setting(self) -> str:
    """In a few words: microbatches, and what else is not as by default."""
    if self.reason:
      return "no"
    words = [str(self.accumulate)]
    words += [self.remat] if self.remat else []
    words += [f"fsdp {self.fsdp}"] if self.fsdp > 1 else []
    return ", ".join(words)


def rows(
  settings: Section, names: list[str], *, utilisation: float = 0.4
) -> Iterator[dict[str, str]]:
  """Yields for each machine what a table says of it.

  Args:
    settings: the config.
    names: of machines.
    utilisation: the share of its peak that a machine reaches.

  Raises:
    UserError: what is wrong with the config; a machine that is not known.
  """
  for name in names:
    if name not in MACHINES:
      raise errors.unknown("machine", name, MACHINES)
  settings = experiment.without_evaluations(settings)
  # Attention, and with it what is stored, is that of each platform.
  platforms = dict.fromkeys(MACHINES[name].platform for name in names)
  exps = {platform: costs.planned(settings, platform) for platform in platforms}
  state = costs.state_of(next(iter(exps.values())))  # the same for all
  for name in names:
    machine = MACHINES[name]
    exp = exps[machine.platform]
    flops = costs.flops_of_training(exp)
    found = fit(exp, state, machine)
    hours = flops * (1 + found.extra) / (machine.flops * utilisation) / 3600
    yield {
      "machine": name,
      "setting": found.setting,
      "accumulate": "" if found.reason else str(found.accumulate),
      "remat": "" if found.reason else found.remat or "none",
      "scan": "" if found.reason else str(found.scan),
      "fsdp": "" if found.reason else str(found.fsdp),
      "GiB": f"{found.gib:.2f}",
      "of GiB": f"{machine.room / GIB:.2f}",
      "extra FLOPs in %": f"{100 * found.extra:.1f}",
      "hours": "" if found.reason else f"{hours:.3g}",
      "why not": found.reason,
    }


def fit(exp: experiment.Experiment, state: steps.TrainState, machine: Machine) -> Fit:
  """Returns the setting that adds the fewest FLOPs, of these the one of the smallest fsdp and the fewest microbatches.

  What the config itself says is where the search begins: it finds no less remat, fsdp or microbatches than that.
  Where nothing fits the setting of the least memory is returned, with the reason.

  Args:
    exp: `costs.planned` for the machine's platform.
    state: see `costs.state_of`.
    machine: one of `MACHINES`.
  """
  if exp.batch_size % machine.devices:
    reason = f"batch_size={exp.batch_size} does not divide over {machine.devices} devices"
    return Fit(0, "", False, 1, math.nan, 0.0, reason)
  share = exp.batch_size // machine.devices
  fewest = 1 if exp.accumulate == "auto" else int(exp.accumulate)
  tried: list[Fit] = []
  for model, extra in _models(exp):
    for fsdp in _divisions(exp.mesh.get("fsdp", 1), machine.devices):
      looped = _looped(model) if fsdp > 1 else model
      remat, scan = which_remat(getattr(looped, "remat", False)), getattr(looped, "scan", False)
      mesh = sharding.abstract_mesh(machine.devices, fsdp=fsdp)
      whole = costs.memory(exp, state, mesh, looped, 1)
      for n in (n for n in range(fewest, share + 1) if share % n == 0):
        total = _in_microbatches(whole, n)
        tried.append(Fit(n, remat, scan, fsdp, total / GIB, extra))
        if total <= machine.room:
          return tried[-1]
  if not tried:
    reason = (
      f"accumulate={fewest} is more than the {share} images of a device, or does not divide them"
    )
    return Fit(0, "", False, 1, math.nan, 0.0, reason)
  least = min(tried, key=lambda one: one.gib)
  return least._replace(reason=f"needs {least.gib:.2f} GiB a device even so")


def _in_microbatches(whole: dict[str, float], n: int) -> float:
  """What `costs.memory` sums up to with n microbatches, from what it says of one."""
  if n == 1:
    return sum(whole.values())
  return sum(whole.values()) + whole["gradients"] - whole["activations"] * (1 - 1 / n)


def _models(exp: experiment.Experiment) -> list[tuple[Model, float]]:
  """The model with each kind of remat from its own on, and the share of FLOPs besides those of training."""
  model: Any = exp.model
  if not isinstance(model, FlexiViT):
    return [(model, 0.0)]
  step = patch_schedule.mean_cost(exp.flexi, exp.step_flops)

  def extra(remat: str) -> float:
    other = model.clone(remat=remat or False)
    again = lambda size: 2e9 * exp.batch_size * recomputed(other, exp.shapes, **size)  # noqa: E731
    return patch_schedule.mean_cost(exp.flexi, again) / step

  kinds = REMAT[REMAT.index(which_remat(model.remat)) :]
  return [(model.clone(remat=kind or False), extra(kind)) for kind in kinds]


def _looped(model: Model) -> Model:
  """The model whose blocks are a loop, so that one block's parameters at a time are whole on a device."""
  fields: Any = model
  return fields.clone(scan=fields.scan or "by_block") if isinstance(model, FlexiViT) else model


def _divisions(fewest: int, devices: int) -> list[int]:
  """Numbers of devices along "fsdp" that may be: the config's own, and its multiples by powers of two."""
  found = [fewest * 2**k for k in range(devices.bit_length())]
  return [n for n in found if devices % n == 0]
