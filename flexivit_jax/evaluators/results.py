"""RUN/eval.json: a model's accuracy and cost at each patch size, as `flexivit report` reads it; and rows as CSV."""

import csv
import json
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import jax

from flexivit_jax import errors, files, trees
from flexivit_jax.evaluators import image_scores
from flexivit_jax.evaluators.base import Evaluator, Illustrated, Row, ScoresImages
from flexivit_jax.evaluators.metrics import CLASSIFICATION, Metric
from flexivit_jax.tables import aligned
from flexivit_jax.trees import Json, Params

# What a row holds besides its evaluator's metrics.
COLUMNS = ("seqhw", "stride", "depth", "patch", "tokens", "gflops", "ms", "n")

# And what is no number of its own: a table of counts, what belongs to one, the ends of intervals.
TABLES = (
  "confusion", "unlabelled", "intervals", "class_iou", "class_pixels", "class_ap", "class_boxes", "samples",
)  # fmt: skip


def metrics_of(row: Json, declared: Sequence[Metric] = CLASSIFICATION) -> list[str]:
  """The names of what an evaluator measured in a row: the declared metrics, the headline first, then its notes."""
  names = [metric.name for metric in declared if metric.name in row]
  return names + [name for name in row if name not in (*COLUMNS, *TABLES, *names)]


def main_of(names: Collection[str]) -> str | None:
  """Name of the main evaluator, written to eval.json: "test" if present, else the alphabetically first."""
  return "test" if "test" in names else min(names, default=None)


def file_of(main_file: pathlib.Path, name: str, names: Collection[str]) -> pathlib.Path:
  """Where an evaluator's results go: `main_file` for the main one, beside it eval_NAME.json for others."""
  if name == main_of(names):
    return main_file
  return main_file.with_name(f"{main_file.stem}_{name}{main_file.suffix}")


def measure(evaluator: Evaluator, params: Params) -> list[Row]:
  """Returns a row for each size: `COLUMNS` and the evaluator's metrics."""
  scores = evaluator.run(params)
  return [score | cost for score, cost in zip(scores, evaluator.costs(params), strict=True)]


def about(
  name: str,
  dataset: str,
  split: str,
  step: int | None,
  params: Params,
  trained_seqhw: list | None,
  classes: Sequence[str] | None = None,
  metrics: Sequence[Metric] | None = None,
) -> Json:
  """Returns what was measured, on what: everything in an eval.json except its rows.

  Args:
    name: of the run or the checkpoint, in reports.
    dataset, split: the images.
    step: of the checkpoint; None: not known.
    params: the model's.
    trained_seqhw: the sizes of its training; None: not known.
    classes: names of those of a table "confusion"; None: there is none.
    metrics: of the rows, the headline first; None: those of labelled images, which a reader then expects.
  """
  return {
    "name": name,
    "dataset": dataset,
    "split": split,
    "step": step,
    "params": trees.count(params),
    "trained_seqhw": trained_seqhw,
    "device": jax.devices()[0].device_kind,
    "jax": jax.__version__,
    "metrics": None if metrics is None else [metric.stated() for metric in metrics],
    "classes": None if classes is None else list(classes),
  }


def samples_folder(path: pathlib.Path) -> pathlib.Path:
  """Where the pictures are that the rows of a file name: eval_samples beside eval.json."""
  return path.with_name(f"{path.stem}_samples")


def write(path: pathlib.Path, described: Json, rows: list[Json], evaluator: object = None) -> None:
  """Writes the file at once or not at all, after what belongs to it; on the first process only.

  These are the pictures of its evaluator, and which images were right; the file has the latter's digest. Pictures of an
  earlier file that this one does not name are removed.
  """
  if jax.process_index() == 0:
    pictures = evaluator.pictures() if isinstance(evaluator, Illustrated) else {}
    if pictures:
      samples_folder(path).mkdir(exist_ok=True)
    for name, data in pictures.items():
      files.write_atomically(samples_folder(path) / name, data)
    if not pictures:
      rows = [{key: value for key, value in row.items() if key != "samples"} for row in rows]
    known = {k: v for k, v in described.items() if v is not None}
    scores = evaluator.image_scores() if isinstance(evaluator, ScoresImages) else None
    if scores is not None:
      data = image_scores.encoded(scores)
      files.write_atomically(image_scores.file_of(path), data)
      known |= {"images_sha256": image_scores.digest(data)}
    text = json.dumps({**known, "rows": rows}, indent=1, allow_nan=False)
    if any({"confusion", "class_pixels", "class_boxes"} & row.keys() for row in rows):
      text = _INTEGERS.sub(lambda found: f"[{', '.join(re.findall(r'[0-9]+', found[0]))}]", text)
    text = _SAMPLE.sub(
      lambda found: re.sub(r"(?<=\{)\s+|\s+(?=\})", "", " ".join(found[0].split())), text
    )
    files.write_atomically(path, text + "\n")
    for old in samples_folder(path).glob("*"):
      if old.name not in pictures and _PICTURE.fullmatch(old.name):
        old.unlink(missing_ok=True)


_INTEGERS = re.compile(r"\[\s*\d+(,\s*\d+)*\s*\]")  # a list of them: one line, not one each
_SAMPLE = re.compile(r'\{\s*"id": \d[^{}]*\}')  # a sample of classification: the same
_PICTURE = re.compile(r"\d+(_[\w=]+)?\.(jpg|png)")  # what evaluators call theirs


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, object]]) -> None:
  """Writes rows with a line of their keys above; what a row lacks is empty."""
  columns = list(dict.fromkeys(key for row in rows for key in row))
  with path.open("w", newline="") as file:
    writer = csv.DictWriter(file, columns)
    writer.writeheader()
    writer.writerows(rows)


def append_csv(path: pathlib.Path, rows: Sequence[Mapping[str, object]]) -> None:
  """Adds rows to a CSV file, or begins one with the columns of the first; what a row lacks is empty.

  Raises:
    UserError: a row has a column that the file does not have.
  """
  begun = path.exists()
  columns = list(rows[0])
  if begun:
    with path.open(newline="") as file:
      columns = next(csv.reader(file), [])
  for name in (name for row in rows for name in row if name not in columns):
    raise errors.unknown(f"column of {path}", name, columns)
  with path.open("a", newline="") as file:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    if not begun:
      writer.writeheader()
    writer.writerows(rows)


def table(rows: list[Json], metrics: Sequence[Metric] = CLASSIFICATION) -> str:
  """Returns the rows as text, a line each."""
  every = {name: None for row in rows for name in row}  # a size may lack what others have
  names = [name for name in COLUMNS[:-1] if name in every]
  names += [*metrics_of(every, metrics), "n"]
  heads = {"gflops": "GFLOPs"} | {metric.name: metric.short for metric in metrics}
  fractions = {metric.name for metric in metrics if metric.unit == "%"}
  cells = [[_cell(row.get(name, ""), name in fractions) for name in names] for row in rows]
  return "\n".join(aligned([[heads.get(name, name) for name in names], *cells]))


def _cell(value: object, fraction: bool) -> str:
  if fraction:
    return f"{value:.2%}"
  return f"{value:.4g}" if isinstance(value, float) else str(value)
