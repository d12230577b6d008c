"""The size that a budget buys: profiles of a model on this device, and the choice among their rows."""

import os
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax

from flexivit_jax import errors, weights
from flexivit_jax.budget import choose as choosing, profile as profiles
from flexivit_jax.budget.choose import Budget
from flexivit_jax.budget.profile import Profile, Row
from flexivit_jax.devices import timing
from flexivit_jax.evaluators import metrics
from flexivit_jax.inference import boxes, masks, predictor, programs, texts
from flexivit_jax.models import TwoTowers
from flexivit_jax.sizes import SeqHw


def choose(
  checkpoint: str | os.PathLike[str],
  *,
  latency_ms: float | None = None,
  gflops: float | None = None,
  memory_mb: float | None = None,
  accuracy: float | None = None,
  throughput: float | None = None,
  profile: str | os.PathLike[str] | None = None,
  estimate: bool = False,
  batch: int | None = None,
) -> Row:
  """Returns the most accurate size that fits a budget on this device, as `flexivit profile` measured it.

  Args:
    checkpoint: what `weights.load` takes, with a profile beside it.
    latency_ms, gflops, memory_mb, accuracy, throughput: limits, see `budget.choose.Budget`.
    profile: the file of the profile, where it is not beside the weights.
    estimate: scale the profile of another device where this one was not measured.
    batch: see `budget.choose.choose`.

  Raises:
    UserError: no profile of these weights on this device; a budget without limits, or that nothing fits.
  """
  budget = Budget(latency_ms, gflops, memory_mb, accuracy, throughput)
  choosing.checked(budget)
  loaded = predictor.load(checkpoint, whole=True)
  measured = of(
    checkpoint, weights.towers.digest(loaded.model, loaded.params), profile, estimate=estimate
  )
  return choosing.choose(measured, budget, batch=batch)


class Asked(NamedTuple):
  """What a command line says of the size: --seqhw, or --budget with --profile and --estimate."""

  seqhw: str | None
  budget: str | None = None
  profile: str | os.PathLike[str] | None = None
  estimate: bool = False


def check(asked: Asked) -> None:
  """Raises a UserError for two options that say the size, or one of --budget without it."""
  if asked.budget is None:
    for option, value in (("--profile", asked.profile), ("--estimate", asked.estimate)):
      if value:
        raise errors.UserError(f"{option} is of --budget; give that, or leave it out.")
  elif asked.seqhw is not None:
    raise errors.UserError(
      f"Give --seqhw={asked.seqhw} or --budget={asked.budget}, which chooses it; not both."
    )
  else:
    choosing.parse(asked.budget)


class Choice(NamedTuple):
  """At which sizes a model is run, how many images at a time (None: the command's default), and by what."""

  sizes: tuple[SeqHw, ...]
  batch_size: int | None
  way: programs.Way = programs.PLAIN


def chosen(
  loaded: predictor.Loaded,
  asked: Asked,
  batch_size: int | None = None,
  *,
  any_way: bool = False,
  note: Callable[[str], None] = lambda text: None,
) -> Choice:
  """Returns the sizes of --seqhw, or that of --budget.

  Args:
    loaded: the model.
    asked: the options.
    batch_size: images at a time; None: those of the row that is chosen.
    any_way: take rows of other runtimes and dtypes, too, where they are installed; else those of XLA in float32 alone.
    note: called with what was chosen, and what it costs.

  Raises:
    UserError: see `predictor.sizes_of` and `choose`.
  """
  if asked.budget is None:
    return Choice(predictor.sizes_of(asked.seqhw, loaded), batch_size)
  digest = weights.towers.digest(loaded.model, loaded.params)
  row = row_for(loaded.name, digest, asked, batch_size, any_way=any_way, note=note)
  return Choice((row.size,), row.batch, way_of(row))


def row_for(
  checkpoint: str | os.PathLike[str],
  digest: str,
  asked: Asked,
  batch_size: int | None = None,
  *,
  any_way: bool = False,
  note: Callable[[str], None] = lambda text: None,
) -> Row:
  """Returns the row that --budget chooses; see `chosen`.

  Args:
    checkpoint: as it was named, which says where the profile is.
    digest: its `weights.towers.digest`.
    asked: with a budget.
    batch_size, any_way, note: as for `chosen`.
  """
  budget = choosing.parse(asked.budget or "")
  measured = of(checkpoint, digest, asked.profile, estimate=asked.estimate)
  runs = programs.runs_here if any_way else lambda way: way == programs.PLAIN
  measured = measured._replace(rows=tuple(row for row in measured.rows if runs(way_of(row))))
  if not measured.rows:
    raise errors.UserError(
      f"The profile of {checkpoint} has no row that this command can run; measure XLA in float32, too:"
      " `flexivit profile --ways jax`."
    )
  row = choosing.choose(measured, budget, batch=batch_size)
  note(words(measured, row))
  return row


def words(measured: Profile, row: Row) -> str:
  """What was chosen, what it gives and costs, for people."""
  metric = metrics.Metric(
    **{k: v for k, v in measured.metric.items() if k in metrics.Metric._fields}
  )
  about = f"estimated from {measured.estimated}" if measured.estimated else "measured"
  low, high = metric.text(row.low), metric.text(row.high)
  return (
    f"{row.name}: {metric.short} {metric.text(row.value)} ({low} to {high}), {row.ms_p90:.3g} ms a batch (p90),"
    f" {about} on images of {measured.image[0]}x{measured.image[1]}"
  )


def of(
  checkpoint: str | os.PathLike[str],
  digest: str,
  file: str | os.PathLike[str] | None = None,
  *,
  estimate: bool = False,
) -> Profile:
  """Returns the profile of a model on this device.

  Args:
    checkpoint: as it was named.
    digest: its `weights.towers.digest`.
    file: where the profiles are; None: beside the weights.
    estimate: see `choose`.

  Raises:
    UserError: there is none; see `budget.profile.of` and `budget.profile.on_device`.
  """
  path = pathlib.Path(file) if file else profiles.path_of(checkpoint, digest)
  peak = peak_gflops() if estimate else None
  return profiles.on_device(profiles.of(path, digest), programs.device_name(), peak)


def way_of(row: Row) -> programs.Way:
  """How a row is run."""
  return programs.Way(row.runtime, row.dtype)


def peak_gflops() -> float:
  """10^9 operations a second of a large matrix product in float32 on this device."""
  return timing.matmul_peak("float32") / 1e9


def output_of(loaded: predictor.Loaded) -> programs.Fn:
  """What a command wants of this model: probabilities, an embedding, scores of pixels, boxes."""
  model = loaded.model
  if predictor.gives_masks(model):
    return masks.scores_of_pixels
  if predictor.gives_boxes(model):
    return boxes.boxes_and_logits
  if isinstance(model, TwoTowers):
    return texts.embedding
  return programs.probabilities if model.num_classes else _pre_logits


def _pre_logits(result: programs.Result) -> jax.Array:
  return result[1]["pre_logits"]
