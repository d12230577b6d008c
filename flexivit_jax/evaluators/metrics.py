"""What an evaluator declares of each metric. Imports no JAX: `flexivit report` reads the same from an eval.json."""

from typing import Any, Literal, NamedTuple

Better = Literal["max", "min"]
Interval = Literal["binomial", "bootstrap"]


TEXTS = (
  "unit",
  "label",
  "title",
  "ceiling_of",
)  # what an eval.json holds of a metric, where it is given


class Metric(NamedTuple):
  """One number that an evaluator measures at each size.

  Attributes:
    name: its key in a row, in `checkpoint.best` and in `flexivit report --metric`; no "/", "@" or space.
    better: "max" where larger values are better, "min" where smaller ones are.
    interval: how its 95 % interval is made: "binomial", a fraction of n images (`intervals.binomial`, in closed form);
      "bootstrap", over images, when the evaluator runs (`intervals.bootstrap`), its ends in the row's "intervals";
      None, no interval.
    unit: "%" for a fraction of 0 to 1, which is shown in percent; otherwise what stands behind the number, or "".
    label: the head of a table's column, "top-1"; default: the name.
    title: for axes and sentences, "top-1 accuracy"; default: the label.
    needs: key of the evaluator's section without which the metric is not measured.
    trained: whether training changes it; otherwise no run can go by it.
    ceiling_of: name of the metric that can hardly be larger than this one; a report draws the first of several with it.
  """

  name: str
  better: Better = "max"
  interval: Interval | None = None
  unit: str = ""
  label: str = ""
  title: str = ""
  needs: str = ""
  trained: bool = True
  ceiling_of: str = ""

  @property
  def short(self) -> str:
    """Its label, or its name."""
    return self.label or self.name

  @property
  def long(self) -> str:
    """Its title, or its label, or its name."""
    return self.title or self.short

  def merit(self, value: float) -> float:
    """The value, with the sign that makes larger better."""
    return value if self.better == "max" else -value

  def text(self, value: float) -> str:
    """Writes a value for a progress line: 0.5 in percent is `50.0%`."""
    return f"{value:.1%}" if self.unit == "%" else f"{value:.4g}"

  def stated(self) -> dict[str, Any]:
    """What an eval.json holds of it: all that drawing it needs."""
    about = {key: getattr(self, key) for key in TEXTS}
    given = {key: value for key, value in about.items() if value}
    return {"name": self.name, "better": self.better, "interval": self.interval, **given}


TOP1 = Metric("top1", "max", "binomial", "%", "top-1", "top-1 accuracy")
TOP5 = Metric("top5", "max", "binomial", "%", "top-5", "top-5 accuracy")
LOSS = Metric("loss", "min", None, "nats")
MACRO = Metric("top1_macro", "max", None, "%", "macro", "macro accuracy", needs="per_class")
# Of labelled images, the headline first; also the metrics of an eval.json that states none.
CLASSIFICATION = (TOP1, TOP5, LOSS, MACRO)
