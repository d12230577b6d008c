"""RUN/eval.json: a model's accuracy and cost at each patch size, as `flexivit report` reads it."""

import json
import pathlib
from collections.abc import Collection
from typing import Any

import jax

from flexivit_jax import trees


def main_of(names: Collection[str]) -> str | None:
  """The evaluator whose results are a run's eval.json: "test", else the first in the alphabet."""
  return "test" if "test" in names else min(names, default=None)


def file_of(main_file: pathlib.Path, name: str, names: Collection[str]) -> pathlib.Path:
  """Where an evaluator's results go: `main_file` for the main one, beside it eval_NAME.json for others."""
  if name == main_of(names):
    return main_file
  return main_file.with_name(f"{main_file.stem}_{name}{main_file.suffix}")


def measure(evaluator: Any, params: Any) -> list[dict[str, Any]]:
  """Returns a row for each size: seqhw, patch, tokens, gflops, ms, top1, top5, loss, n."""
  scores = evaluator.run(params)
  return [score | cost for score, cost in zip(scores, evaluator.costs(params), strict=True)]


def about(
  name: str, dataset: str, split: str, step: int | None, params: Any, trained_seqhw: list | None
) -> dict[str, Any]:
  """Returns what was measured, on what."""
  return {
    "name": name,
    "dataset": dataset,
    "split": split,
    "step": step,
    "params": trees.count(params),
    "trained_seqhw": trained_seqhw,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
  }


def write(path: pathlib.Path, described: dict[str, Any], rows: list[dict[str, Any]]) -> None:
  """Writes the file at once or not at all; on the first process only."""
  if jax.process_index() == 0:
    known = {k: v for k, v in described.items() if v is not None}
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**known, "rows": rows}, indent=1, allow_nan=False) + "\n")
    temporary.replace(path)


def table(rows: list[dict[str, Any]]) -> str:
  """Returns the rows as text, a line each."""
  names = ("seqhw", "patch", "tokens", "GFLOPs", "ms", "top-1", "top-5", "loss", "n")
  widths = (7, 7, 6, 8, 8, 7, 7, 7, 6)
  head = " ".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
  lines = [
    f"{r['seqhw']!s:>7} {r['patch']!s:>7} {r['tokens']:>6} {r['gflops']:>8.3g} {r['ms']:>8.3g} {r['top1']:>7.2%}"
    f" {r['top5']:>7.2%} {r['loss']:>7.4f} {r['n']:>6}"
    for r in rows
  ]
  return "\n".join([head, *lines])
