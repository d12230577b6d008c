"""A run as a model card: Markdown with the front matter that Hugging Face's hub reads, its results among it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from flexivit_jax.errors import UserError
from flexivit_jax.report import tables
from flexivit_jax.report.rows import EvalRow, ReportRun, is_trained

# The task as the hub calls it, by the metric that only its evaluators have. Of other tasks nothing is said.
_TASKS = {
  "top1": "image-classification",
  "miou": "image-segmentation",
  "ap": "object-detection",
  "img2txt_r1": "zero-shot-image-classification",
}
_KINDS = {
  "top1": "accuracy",
  "miou": "mean_iou",
  "ap": "mean_average_precision",
}  # as the hub calls a metric

_OURS = "library_name: flexivit_jax"
_TEXT = """---
{front}---

# {title}

A Vision Transformer that runs at any patch size that divides its image, with one set of weights (FlexiViT, arXiv
2212.08013).

## Results

{metric} on {data}{interval}:

{table}

{sizes}

## Use

```bash
flexivit predict IMAGE --checkpoint model.npz --seqhw {seqhw}
```

`--seqhw` is the number of tokens per side: more is finer and slower.

## Training

{facts}

## Limits

The numbers are of the images above; what the model does on others was not measured. Its licence is for its owner to
add.
"""


def write(file: Path, run: ReportRun) -> None:
  """Writes the card of a run; `file` may be a card of ours, which is replaced.

  Raises:
    UserError: a folder, or a file that something else wrote.
  """
  if file.is_dir():
    raise UserError(
      f"--card={file} is a folder; expected a file to write, e.g. {file / 'README.md'}."
    )
  if file.exists() and _OURS not in file.read_text("utf-8", errors="replace"):
    raise UserError(
      f"--card={file} is there already, and is no model card of ours; give another file."
    )
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(text(run), "utf-8")


def text(run: ReportRun) -> str:
  """Returns the card of a run; every number in it is of its eval.json."""
  rows = sorted(run.rows, key=lambda row: row.tokens)
  trained = [row for row in rows if is_trained(run, row)]
  facts = {key: value for key, value in run.facts.items() if key not in ("dataset", "split")}
  return _TEXT.format(
    front=yaml.safe_dump(_front(run, rows), sort_keys=False, allow_unicode=True),
    title=_plain(run.name),
    metric=tables.capital(tables.quantity(run.metric)),
    data=_plain(_data(run.facts)),
    interval=" with its 95 % interval" if any(row.interval for row in rows) else "",
    table=_table(run, rows),
    sizes=_sizes(run, rows, trained),
    seqhw=(trained or rows)[len(trained or rows) // 2].seqhw,
    facts="\n".join(f"- {key}: {_plain(value)}" for key, value in facts.items()),
  )


def _front(run: ReportRun, rows: list[EvalRow]) -> dict[str, Any]:
  """What the hub reads; the licence is for the owner to add."""
  task = next((_TASKS[m.name] for m in run.metrics if m.name in _TASKS), None)
  front: dict[str, Any] = {"library_name": "flexivit_jax"}
  front |= {"pipeline_tag": task} if task else {}
  front["tags"] = ["flexivit", "vision", "jax"]
  name = _line(run.facts.get("dataset", ""))
  if not (task and name):  # the hub refuses results without either
    return front
  metrics = [
    {
      "type": _KINDS.get(run.metric.name, run.metric.name),
      "name": f"{run.metric.short} at patch {row.patch}, seqhw={row.seqhw}",
      "value": round(row.value * (100 if run.metric.unit == "%" else 1), 4),
    }
    for row in rows
  ]
  data = {"name": name, "type": name}
  data |= {"split": _line(run.facts["split"])} if run.facts.get("split") else {}
  result = {"task": {"type": task}, "dataset": data, "metrics": metrics}
  front["model-index"] = [{"name": _line(run.name), "results": [result]}]
  return front


def _data(facts: Mapping[str, str]) -> str:
  """The data set and its split, as words."""
  name, split = facts.get("dataset") or "images that the run does not name", facts.get("split")
  return f"{name}, {split}" if split else name


def _table(run: ReportRun, rows: list[EvalRow]) -> str:
  head = f"| patch | seqhw | {run.metric.short} | GFLOPs | images |"
  lines = [head, "|---|---|---|---|---|"]
  for row in rows:
    value = tables.number(run.metric, row.value)
    if row.interval:
      value += f" ({tables.span(run.metric, *row.interval)})"
    lines.append(f"| {row.patch} | {row.seqhw} | {value} | {row.gflops:.3g} | {row.n} |")
  return "\n".join(lines)


def _sizes(run: ReportRun, rows: list[EvalRow], trained: list[EvalRow]) -> str:
  if run.trained is None:
    return "The run does not say at which sizes it was trained."
  other = [f"{row.seqhw}" for row in rows if row not in trained]
  return f"Not trained: seqhw {', '.join(other)}." if other else "Trained at each of these sizes."


def _plain(text: str) -> str:
  """A text that Markdown shows as it is, on one line."""
  return "".join(f"\\{c}" if c in r"\`*_[]<>|#" else c for c in _line(text))


def _line(text: str) -> str:
  return " ".join(str(text).split())
