"""Compares our numbers with published ones: as text, CSV, JSON and a figure."""

import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from flexivit_jax.evaluators import results
from flexivit_jax.paper import published, test_sets
from flexivit_jax.paper.measuring import Measured
from flexivit_jax.trees import Json

Figure = Any  # of matplotlib, which is imported late
# Published metrics and their keys in a row; published percentages are fractions here.
METRICS = {
  "top1": "top1", "top5": "top5", "precision@1": "top1", "latency": "ms", "flops": "gflops",
}  # fmt: skip


def ours_of(value: published.Value, row: Json) -> float | None:
  """Returns our value for a published number, in its unit; None if the row has none."""
  name = METRICS.get(value.metric)
  if name is None or value.patch != row["patch"] or row.get(name) is None:
    return None
  return row[name] * (100 if value.unit == "%" else 1)


def beside(measured: Sequence[Measured], tables: Sequence[str]) -> list[Json]:
  """Returns a row for each checkpoint, set and patch size, and one for each further published number of it.

  Args:
    measured: ours.
    tables: names for `published.read`.

  Returns:
    Rows with the same keys; "published" and later keys are None if nothing is published.
  """
  values = [v for name in tables for v in published.read(name)]
  return [
    row
    for result in measured
    for measured_row in result.rows
    for row in _of_row(result, measured_row, [v for v in values if _is_of(v, result)])
  ]


def _is_of(value: published.Value, result: Measured) -> bool:
  subject = result.checkpoint.subject
  if subject is None or value.dataset != test_sets.SETS[result.set_name].published:
    return False
  # How long a model was trained does not change its latency, whose setting is the machine.
  its_setting = value.metric == "latency" or value.setting.startswith(subject.setting)
  return value.model == subject.model and its_setting


def _of_row(result: Measured, row: Json, values: Sequence[published.Value]) -> list[Json]:
  keys = {"checkpoint": result.checkpoint.name, "set": result.set_name, "images": row["n"]}
  keys |= {"seqhw": row["seqhw"], "patch": row["patch"], "device": result.about["device"]}
  pairs = [(v, ours) for v in values if (ours := ours_of(v, row)) is not None]
  lines = []
  if not any(METRICS[v.metric] == "top1" for v, _ in pairs):
    nothing = dict.fromkeys(
      ("published", "error", "difference", "setting", "kind", "source", "note")
    )
    lines.append({**keys, "metric": "top1", "unit": "%", "ours": 100 * row["top1"], **nothing})
  for value, ours in pairs:
    lines.append({
      **keys, "metric": value.metric, "unit": value.unit, "ours": ours, "published": value.value,
      "error": value.error, "difference": ours - value.value, "setting": value.setting, "kind": value.kind,
      "source": value.source, "note": value.note,
    })  # fmt: skip
  return lines


def line(row: Json) -> str:
  """Returns a row as text."""
  start = f"{row['checkpoint']}, {row['set']}, patch {row['patch']}, {row['metric']}: ours {row['ours']:.4g}"
  if row["published"] is None:
    return f"{start} {row['unit']}, nothing published"
  error = "" if row["error"] is None else f" +- {row['error']:g}"
  note = f"; {row['note']}" if row["note"] else ""
  return f"{start}, published {row['published']:g}{error} {row['unit']}, {row['difference']:+.3g} [{row['kind']}{note}]"


def write(out: pathlib.Path, name: str, rows: Sequence[Json], about: Json) -> None:
  """Writes OUT/NAME.json (with `about`), NAME.csv, NAME.png and NAME.svg; NAME_ms.png, .svg if there are speeds."""
  (out / f"{name}.json").write_text(
    json.dumps({**about, "rows": list(rows)}, indent=1, allow_nan=False) + "\n"
  )
  results.write_csv(out / f"{name}.csv", rows)
  draw(out / name, rows)
  if any(row["metric"] == "latency" for row in rows):
    draw_speed(out / f"{name}_ms", rows)


def side(patch: int | str) -> float:
  """Returns the side of a patch in pixels; for "24x10" that of the square with equal area."""
  return math.sqrt(math.prod(map(int, str(patch).split("x")))) if isinstance(patch, str) else patch


def draw(stem: pathlib.Path, rows: Sequence[Json]) -> None:
  """Top-1 against patch size, a panel for each set: ours filled, published hollow with its error."""
  import matplotlib.pyplot as plt
  from matplotlib.ticker import NullLocator

  rows = [row for row in rows if METRICS[row["metric"]] == "top1" and row["unit"] == "%"]
  sets = list(dict.fromkeys(row["set"] for row in rows))
  figure, axes = plt.subplots(
    1, len(sets), figsize=(1.4 + 3.4 * len(sets), 3.8), layout="constrained", squeeze=False
  )
  names = list(dict.fromkeys(row["checkpoint"] for row in rows))
  for axis, chosen in zip(axes[0], sets, strict=True):
    for i, name in enumerate(names):
      points = [r for r in rows if r["set"] == chosen and r["checkpoint"] == name]
      ours = {side(r["patch"]): r["ours"] for r in sorted(points, key=lambda r: side(r["patch"]))}
      axis.plot(list(ours), list(ours.values()), "-o", color=_color(i), markersize=4, label=name)
      theirs = [r for r in points if r["published"] is not None]
      axis.errorbar(
        [side(r["patch"]) for r in theirs], [r["published"] for r in theirs], [r["error"] or 0 for r in theirs],
        fmt="s", color=_color(i), markerfacecolor="none", markersize=7, linewidth=1,
      )  # fmt: skip
    patches = {side(r["patch"]): r["patch"] for r in rows if r["set"] == chosen}
    axis.set_xscale("log")
    axis.set_xticks(list(patches), [str(p) for p in patches.values()], fontsize=8)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.set_title(chosen)
    axis.set_xlabel("patch size (pixels)")
    axis.grid(alpha=0.25)
  axes[0, 0].set_ylabel("top-1 (%)")
  axes[0, 0].plot([], [], "ks", markerfacecolor="none", label="published")
  _finish(figure, stem)


def speeds(rows: Sequence[Json], which: str) -> dict[str, list[tuple[float, float]]]:
  """Of each checkpoint its points (ms an image, top-1 in %), from fast to slow, on the set whose speeds are published.

  Args:
    rows: of `beside`.
    which: "ours" or "published".
  """
  top1 = {
    (r["checkpoint"], r["set"], r["patch"]): r[which]
    for r in reversed(rows)
    if r["metric"] == "top1"
  }
  by_checkpoint: dict[str, list[tuple[float, float]]] = {}
  for row in rows:
    accuracy = top1.get((row["checkpoint"], row["set"], row["patch"]))
    if row["metric"] == "latency" and accuracy is not None:
      by_checkpoint.setdefault(row["checkpoint"], []).append((row[which], accuracy))
  return {name: sorted(points) for name, points in by_checkpoint.items()}


def draw_speed(stem: pathlib.Path, rows: Sequence[Json]) -> None:
  """Top-1 against milliseconds, as the paper's figure 2: ours on this machine filled, published hollow and dashed."""
  import matplotlib.pyplot as plt

  figure, axis = plt.subplots(figsize=(6.4, 4.8), layout="constrained")
  ours, known = speeds(rows, "ours"), speeds(rows, "published")
  for i, (name, points) in enumerate(ours.items()):
    axis.plot(*zip(*points, strict=True), "-o", color=_color(i), markersize=4, label=name)
    if name in known:
      axis.plot(
        *zip(*known[name], strict=True), "--s", color=_color(i), markerfacecolor="none", linewidth=1
      )  # fmt: skip
  devices = ", ".join(dict.fromkeys(row["device"] for row in rows))
  axis.set_xscale("log")
  axis.set_xlabel(f"milliseconds an image: ours on {devices}, published on a TPU v3")
  axis.set_ylabel("top-1 (%)")
  axis.grid(alpha=0.25)
  axis.plot([], [], "k--s", markerfacecolor="none", label="published")
  _finish(figure, stem)


def _color(i: int) -> tuple[float, ...]:
  """The default ten, then their light shades."""
  import matplotlib.pyplot as plt

  return plt.get_cmap("tab20")((2 * i + i // 10) % 20)


def _finish(figure: Figure, stem: pathlib.Path) -> None:
  import matplotlib.pyplot as plt

  columns = max(1, int(figure.get_figwidth() // 2))
  figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
  for suffix in ("png", "svg"):
    figure.savefig(stem.with_name(f"{stem.name}.{suffix}"), dpi=150)
  plt.close(figure)
