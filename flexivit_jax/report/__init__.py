"""`flexivit report RUN [RUN ...]`: the runs' eval.json files as a page, figures and JSON."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from flexivit_jax.errors import UserError
from flexivit_jax.report import (
  card,
  compared,
  page,
  pareto,
  plots,
  runs as runs_lib,
  tables,
  training,
)


def report(
  runs: Sequence[Path], out: Path, *, metric: str | None = None, command: str | None = None
) -> Path:
  """Writes report.json, report.html and the two figures (PNG at 200 dpi, SVG, their points as CSV); see `pareto`.

  Of two runs or more with top-1 also differences.csv, see `compared`; of runs with rows of steps training.csv.

  The figures are called accuracy_vs_patch and accuracy_vs_gflops, with another metric than an accuracy METRIC_vs_....

  Args:
    runs: run folders holding an eval.json, or such files themselves; in the order of the curves.
    out: the folder to write into; made when missing, files of an earlier report are replaced.
    metric: name of the metric to draw; default: the headline, which must be the same in all runs.
    command: the command line for the page's footer; default: `flexivit report RUN ... --out OUT`.

  Returns:
    The path of report.html, one file that needs no other and no network.

  Raises:
    UserError: a run has no eval.json, or one that is not as `runs.read` expects; the runs have different headlines.
  """
  loaded = runs_lib.load(runs, metric)
  wide = {axis: plots.draw(loaded, axis, plots.WIDE) for axis in plots.AXES}
  narrow = {axis: plots.draw(loaded, axis, plots.NARROW) for axis in plots.AXES}
  option = ["--metric", metric] if metric else []
  words = ["flexivit", "report", *map(str, runs), *option, "--out", str(out)]
  command = command or shlex.join(words)
  stem = tables.stem(loaded[0].metric)
  out.mkdir(parents=True, exist_ok=True)
  for axis, drawing in wide.items():
    (out / f"{stem}_vs_{axis}.png").write_bytes(drawing.png)
    (out / f"{stem}_vs_{axis}.svg").write_text(drawing.svg, encoding="utf-8")
    (out / f"{stem}_vs_{axis}.csv").write_text(tables.csv_of(loaded, axis), encoding="utf-8")
  comparisons, curves = compared.compare(loaded), training.read(loaded)
  _write(out / "differences.csv", compared.csv_of(comparisons) if comparisons else None)
  _write(out / "training.csv", training.csv_of(curves) if curves else None)
  data = json.dumps(pareto.to_json_all(loaded), indent=2, allow_nan=False)
  (out / "report.json").write_text(data + "\n", encoding="utf-8")
  sections = compared.section(comparisons) + training.section(curves)
  html = page.render(loaded, wide=wide, narrow=narrow, command=command, sections=sections)
  (out / "report.html").write_text(html, encoding="utf-8")
  return out / "report.html"


def _write(file: Path, content: str | None) -> None:
  """Writes a file that not every report has; that of an earlier report, which this one would belie, goes."""
  if content is None:
    file.unlink(missing_ok=True)
  else:
    file.write_text(content, encoding="utf-8")


def table(runs: Sequence[Path], metric: str | None = None) -> str:
  """Returns the metric of each run (rows) at each patch size (columns) as plain text; default: the headline."""
  return tables.text(runs_lib.load(runs, metric))


def model_card(runs: Sequence[Path], file: Path, metric: str | None = None) -> None:
  """Writes the model card of one run, see `card`.

  Raises:
    UserError: several runs, or one of several depths; see `report` and `card.write`.
  """
  loaded = runs_lib.load(runs, metric)
  if len(loaded) > 1:
    names = ", ".join(run.name for run in loaded)
    raise UserError(f"--card is of one model; these are {len(loaded)}: {names}.")
  card.write(file, loaded[0])
