"""`flexivit reproduce`: what the paper shows, how to do it here, at what cost, and ours beside what is published."""

import argparse
import functools
import json
import pathlib
from collections.abc import Iterable, Sequence

from flexivit_jax import config, data, errors, sizes, weights
from flexivit_jax.experiment import costs
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.paper import comparing, measuring, published, test_sets
from flexivit_jax.paper.items import (
  ITEMS,
  OWN_DATA,
  Item,
  PaperEvaluation,
  Work,
  data_of,
  fields_of,
  find,
  weights_of,
)
from flexivit_jax.trees import Json

MACHINE, UTILISATION = "v3-32", 0.4  # those of `flexivit plan`
MEASURING = (
  "checkpoint",
  "data_dir",
  "out",
  "sets",
  "seqhw",
  "protocol",
  "batch_size",
)  # arguments that ask for a measurement
COMPARING = ("results", "model", "setting")


def run(args: argparse.Namespace) -> None:
  """Lists the items, or shows one, or measures it, or puts results beside what is published of it.

  Raises:
    UserError: an argument that would have no effect.
  """
  measures = [name for name in MEASURING if getattr(args, name) is not None]
  if args.item is None:
    compares = [name for name in COMPARING if getattr(args, name) is not None]
    if of_one := [name for name in (*measures, *compares) if name != "data_dir"]:
      raise errors.UserError(f"--{of_one[0]} is for one item; name it: {', '.join(ITEMS)}.")
    print("\n".join(listing(costs=args.costs, data_dir=args.data_dir)))
  elif args.list or args.costs:
    raise errors.UserError(
      f"--{'list' if args.list else 'costs'} is of all items; leave out {args.item!r}, or that."
    )
  elif args.results is not None:
    if measures:
      raise errors.UserError(
        f"--results is of what was measured before; leave out --{measures[0]}."
      )
    try:
      found = json.loads(_read(args.results))
    except ValueError as e:
      raise errors.UserError(f"{args.results} is no JSON: {e}; give an eval.json of a run.") from e
    print("\n".join(compare(args.item, found, model=args.model, setting=args.setting)))
  elif args.model or args.setting:
    raise errors.UserError(
      "--model and --setting choose what --results is compared with; give that too."
    )
  else:
    print("\n".join(reproduce(args) if measures else about(args.item)))


def reproduce(args: argparse.Namespace) -> list[str]:
  """Measures an item on the checkpoints and sets that are asked for; writes and returns ours beside the published.

  Raises:
    UserError: an item that takes training or a tool; sets that cannot be read; no --out.
  """
  item = find(args.item)
  if item.evaluation is None:
    raise errors.UserError(
      f"{args.item} is not measured on checkpoints alone. How it is done: "
      + ("; ".join(item.how) or "not in this project")
    )
  if args.out is None:
    raise errors.UserError(
      "Give --out, the folder for the results; the same command goes on in it."
    )
  checkpoints = measuring.checkpoints_of(item.evaluation, args.checkpoint or [])
  protocol = args.protocol or item.evaluation.protocol
  sets = measuring.open_sets(
    args.sets.split(",") if args.sets else item.evaluation.sets,
    protocol,
    data_dir=args.data_dir,
    seqhw=sizes.parse(args.seqhw or "all", item.evaluation.seqhw),
    **({} if args.batch_size is None else {"batch_size": args.batch_size}),
  )
  measured = measuring.measure(checkpoints, sets, args.out)
  rows = comparing.beside(measured, item.published)
  differs = _differs(item.evaluation, protocol, item.differs, measured)
  differs += _untimed(item, (row for found in measured for row in found.rows))
  files = {
    m.checkpoint.name: {k: m.about.get(k) for k in ("checkpoint", "weights")} for m in measured
  }
  described = {"item": args.item, "title": item.title, "protocol": protocol, "differs": differs}
  described["checkpoints"] = files
  comparing.write(args.out, args.item, rows, described)
  return [*map(comparing.line, rows), *(f"differs: {d}" for d in differs)]


def _differs(
  evaluation: PaperEvaluation, protocol: str, text: str, measured: Sequence[measuring.Measured]
) -> list[str]:
  """How this measurement is not the published one."""
  lines = [text] if text else []
  if protocol != evaluation.protocol:
    says = {p: test_sets.PROTOCOLS[p].says for p in (protocol, evaluation.protocol)}
    lines.append(
      f"protocol {protocol}: {says[protocol]}; this item's is {evaluation.protocol}: {says[evaluation.protocol]}"
    )
  for result in measured:
    expected = test_sets.SETS[result.set_name].data["name"]
    got = result.about["dataset"]
    if got != expected:
      lines.append(
        f"{result.set_name}: {result.about['images']} images of a {got}, where published numbers are of {expected}"
      )
  return list(dict.fromkeys(lines))


def _untimed(item: Item, rows: Iterable[Json]) -> list[str]:
  """That speeds are not compared, where they are published and ours lack them."""
  timed = any(value.metric == "latency" for value in _known(item))
  return ["ours have no milliseconds"] if timed and not any(row.get("ms") for row in rows) else []


def listing(*, costs: bool = False, data_dir: pathlib.Path | None = None) -> list[str]:
  """Some lines for each item: what it needs, what it costs, and whether it can run here.

  Args:
    costs: with the hours of each training.
    data_dir: where TFDS prepared the data; None: TFDS's own default.
  """
  lines = [f"Costs are the time of a TPU {MACHINE} at {UTILISATION:.0%} of its peak."]
  here = _Here(data_dir)
  for name, item in ITEMS.items():
    numbers = sum(len(published.read(p)) for p in item.published)
    said = {0: "no numbers", 1: "1 number"}.get(numbers, f"{numbers} numbers")
    lines.append(f"{name}: {item.title}; {said} known")
    if not item.how and not item.evaluation:
      lines.append("    not in this project yet")
      continue
    needs = {"data": data_of(item), "checkpoints": weights_of(item), "training": item.configs}
    if any(needs.values()):
      lines.append("    " + "; ".join(f"{k}: {_some(v)}" for k, v in needs.items() if v))
    lines.append(f"    {here.says(item)}")
    lines.append(f"    cost: {_cost(item)}")
    if costs:
      lines += [f"      {config}: {_time(training_flops(config))}" for config in item.configs]
  return lines


def _cost(item: Item) -> str:
  training = [training_flops(config) for config in item.configs]
  parts = []
  if training:
    parts.append(
      f"{_time(sum(training))} to train" + (f" all {len(training)}" if training[1:] else "")
    )
  if evaluating := evaluation_flops(item):
    parts.append(f"{_time(evaluating)} to evaluate")
  return ", ".join(parts)


def _time(flops: float) -> str:
  """Two digits of the largest unit of which it is more than one."""
  seconds = flops / (costs.MACHINES[MACHINE].flops * UTILISATION)
  unit, size = next(u for u in (("h", 3600), ("min", 60), ("s", 0)) if seconds >= u[1])
  count = seconds / (size or 1)
  return f"{count:,.0f} {unit}" if count >= 10 else f"{count:.2g} {unit}"


@functools.cache
def training_flops(name: str) -> float:
  """Of a config, as `flexivit plan` has it."""
  return costs.training_flops(config.load(name, []))


def evaluation_flops(item: Item) -> float:
  """Of all checkpoints of an item on all images at all sizes, and of its commands but training; 0: there are none."""
  works = [*item.work]
  if evaluation := item.evaluation:
    chosen = [test_sets.SETS[name] for name in evaluation.sets]
    sources = [{k: s.data[k] for k in ("name", "split")} for s in chosen]
    images = sum(len(data.planned_source(**source)) for source in sources)
    size = test_sets.PROTOCOLS[evaluation.protocol].size
    for name, subject in evaluation.subjects.items():
      fields = {k: fields_of(name, subject)[k] for k in ("variant", "num_classes")}
      works.append(Work(images=images, seqhw=evaluation.seqhw, size=size, **fields))
  return sum(map(_flops, works))


def _flops(work: Work) -> float:
  model = FlexiViT(variant=work.variant, num_classes=work.num_classes)
  one = sum(model.gmacs({"image": (work.size, work.size, 3)}, seqhw=n) for n in work.seqhw)
  return 2e9 * one * work.images * work.passes


def _some(names: Sequence[str]) -> str:
  return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


class _Here:
  """What of an item's needs is on this machine; each data set is looked for once."""

  def __init__(self, data_dir: pathlib.Path | None):
    self._data_dir = data_dir
    self._missing: dict[str, bool] = {}

  def says(self, item: Item) -> str:
    """One line; "yes" only where nothing has to be given."""
    sets = item.evaluation.sets if item.evaluation else ()
    here = {test_sets.SETS[s].data["name"] for s in sets if measuring.in_folders(s, self._data_dir)}
    lacks = [name for name in data_of(item) if name not in here and self._lacks(name)]
    absent = [name for name in weights_of(item) if not weights.is_here(name)]
    brought = [name for name in absent if name not in weights.PUBLISHED]
    lacking = [
      f"{name} (not in TFDS: {OWN_DATA[name]})" if name in OWN_DATA else name for name in lacks
    ]
    parts = {
      "no, lacks ": lacking,
      "to be fetched: ": [name for name in absent if name in weights.PUBLISHED],
      "to be given as --checkpoint NAME=FILE: ": brought,
      f"to be given{' to its commands' if item.evaluation else ''}: ": item.given,
    }
    reason = [f"{words}{_some(names)}" for words, names in parts.items() if names]
    needs = lacks or brought or (item.given and not item.evaluation)
    return "here: " + "; ".join(reason if needs else ["yes", *reason])

  def _lacks(self, name: str) -> bool:
    if name not in self._missing:
      self._missing[name] = not data.is_prepared(name, self._data_dir)
    return self._missing[name]


def about(name: str) -> list[str]:
  """What an item needs, its commands, and the published numbers."""
  item = find(name)
  lines = [f"{name}: {item.title}"]
  if item.evaluation:
    lines.append(f"  flexivit reproduce {name} --data_dir DIR --out OUT")
  lines += [f"  {command}" for command in item.how]
  if len(lines) == 1:
    lines.append("  not in this project yet")
  lines += [f"  to be given: {what}" for what in item.given]
  if item.differs:
    lines.append(f"  differs: {item.differs}")
  for value in _known(item):
    lines.append(f"  {_named(value)}: {_number(value)} [{value.kind}: {value.source}]")
  return lines


def compare(
  name: str, results: Json, *, model: str | None = None, setting: str | None = None
) -> list[str]:
  """Ours beside the published numbers of the same metric and patch size.

  Args:
    name: of the item.
    results: an eval.json.
    model, setting: of the published numbers; only those that contain these words.

  Raises:
    UserError: an item without published numbers, or none that match.
  """
  item = find(name)
  if not item.published:
    raise errors.UserError(f"No numbers of {name} are known; see `flexivit reproduce --list`.")
  lines, differs = [], [item.differs] if item.differs else []
  differs += _untimed(item, results["rows"])
  known, dataset = _known(item), results.get("dataset")
  if of := [s.published for s in test_sets.SETS.values() if s.data["name"] == dataset]:
    known = [value for value in known if value.dataset in of]
  else:
    differs.append(f"ours are of {dataset}, which is none of the published numbers' data sets")
  for value in known:
    if (model or "") not in value.model or (setting or "") not in value.setting:
      continue
    for row in results["rows"]:
      got = comparing.ours_of(value, row)
      if got is not None:
        lines.append(
          f"{_named(value)}: published {_number(value)}, ours {got:.4g}, {got - value.value:+.3g} [{value.kind}]"
        )
  if not lines:
    settings = sorted({f"{v.model} ({v.setting}) on {v.dataset}" for v in _known(item)})
    raise errors.UserError(
      f"No published number of {name} is of a data set, patch size and metric in these results; known are"
      f" {'; '.join(settings)}."
    )
  what = {k: results.get(k) for k in ("name", "dataset", "split", "step", "device")}
  about = "ours: {name} on {dataset} {split}, step {step}, {device}".format_map(what)
  return [about, *lines, *(f"differs: {d}" for d in differs)]


def _known(item: Item) -> list[published.Value]:
  return [value for name in item.published for value in published.read(name)]


def _named(value: published.Value) -> str:
  at = "" if value.patch is None else f" at patch {value.patch}"
  return f"{value.model} ({value.setting}), {value.dataset}, {value.metric}{at}"


def _number(value: published.Value) -> str:
  error = "" if value.error is None else f" +- {value.error:g}"
  return f"{value.value:g}{error} {value.unit}"


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read ({e.strerror}); give an eval.json.") from e
