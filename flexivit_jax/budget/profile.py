"""A profile: what each size of a model gives and costs on one kind of device, in a file beside the weights.

    model.npz                     the weights
    model.npz.profile.json        its profiles, one for each kind of device
    runs/digits/profile.json      those of a run
    vit.zip, onnx/record.json     exports carry those that their source had

A profile belongs to weights by their digest, not by the name of a file. Imports no JAX.
"""

import json
import math
import os
import pathlib
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flexivit_jax import errors, files
from flexivit_jax.budget import sealed
from flexivit_jax.sizes import SeqHw, from_text, size_text

FORMAT = "flexivit profile 1"
NAME = "profile.json"
RECORD = "record.json"  # of an export
RUNTIMES = ("jax", "onnx")
DTYPES = ("float32", "bfloat16", "int8")

Json = dict[str, Any]


class Row(NamedTuple):
  """One size in batches of one shape, run in one way.

  Attributes:
    size: tokens per side, or (per column, per row).
    batch: images in it.
    ms, ms_p90: median and 90th percentile of the milliseconds of the whole batch.
    gflops: of one image, two for a multiply-add.
    value: of the profile's metric at this size.
    low, high: the ends of its 95 % interval.
    n: images that it was measured on.
    nll: mean negative log-likelihood of the labels in nats; None: the metric is not of classes.
    temperature: that by which the logits of this size are divided, to be calibrated; None: as `nll`.
    memory_mb: peak of the program with the weights, 10^6 bytes; None: not known.
    runtime: what runs it, of `RUNTIMES`.
    dtype: of its matrix products, of `DTYPES`.
  """

  size: SeqHw
  batch: int
  ms: float
  ms_p90: float
  gflops: float
  value: float
  low: float
  high: float
  n: int
  nll: float | None = None
  temperature: float | None = None
  memory_mb: float | None = None
  runtime: str = "jax"
  dtype: str = "float32"

  @property
  def images_per_s(self) -> float:
    """Images in a second, one batch after the other."""
    return self.batch / self.ms * 1e3

  @property
  def name(self) -> str:
    """The row in a few words, for messages."""
    other = [self.runtime] * (self.runtime != "jax") + [self.dtype] * (self.dtype != "float32")
    return " ".join([f"seqhw={size_text(self.size)}", f"batch={self.batch}", *other])


class Profile(NamedTuple):
  """What was measured of one model on one kind of device.

  Attributes:
    weights: sha256 of the parameters, `trees.digest`.
    device: the kind of device in words.
    metric: of the values, as an evaluator declares it: "name", "better" ("max" or "min"), "unit", "interval".
    data: on what: "name", "split", "n".
    image: height, width and channels of an image.
    versions: of the packages that ran it, by name.
    peak_gflops: 10^9 operations a second in a large matrix product there; what a scaling to another device goes by.
    rows: in no order.
    estimated: the device that was measured, where the times are scaled from it; "": they are measured.
  """

  weights: str
  device: str
  metric: Mapping[str, Any]
  data: Mapping[str, Any]
  image: tuple[int, int, int]
  versions: Mapping[str, str]
  peak_gflops: float
  rows: tuple[Row, ...]
  estimated: str = ""

  def better(self, one: Row, other: Row) -> bool:
    """Tells whether the value of one row is strictly better than that of the other."""
    return self.merit(one.value) > self.merit(other.value)

  def merit(self, value: float) -> float:
    """The value, negative where smaller is better: larger is better."""
    return -value if self.metric.get("better", "max") == "min" else value

  def safe(self, row: Row) -> float:
    """The worse end of the row's interval: what it gives at least; of an error, at most."""
    return row.high if self.metric.get("better", "max") == "min" else row.low

  def scaled(self, device: str, peak_gflops: float) -> "Profile":
    """An estimate for another device: the times by the ratio of the matrix products, marked as such."""
    if peak_gflops <= 0:
      raise errors.UserError(f"peak_gflops={peak_gflops}; expected more than 0.")
    ratio = self.peak_gflops / peak_gflops
    rows = tuple(row._replace(ms=row.ms * ratio, ms_p90=row.ms_p90 * ratio) for row in self.rows)
    return self._replace(device=device, peak_gflops=peak_gflops, rows=rows, estimated=self.device)


# --- the file ---


def path_of(checkpoint: str | os.PathLike[str], weights: str) -> pathlib.Path:
  """Where the profiles of weights lie: in a folder, beside a file; of a name or an address in the cache folder.

  Args:
    checkpoint: as the user gave it.
    weights: `Profile.weights`.
  """
  path = pathlib.Path(checkpoint)
  if path.is_dir():
    return path / NAME
  if path.exists():
    return path.with_name(f"{path.name}.{NAME}")
  return files.cache_folder() / "profiles" / f"{weights}.{NAME}"


def read(path: pathlib.Path) -> list[Profile]:
  """Reads the profiles of a file; where there is no file, those that an export beside it carries, or none.

  Raises:
    UserError: damaged, of a newer version, or no profile.
  """
  advice = "`flexivit profile` makes it again; remove the file first"
  try:
    file = sealed.parse(path.read_bytes(), path, advice) if path.exists() else _carried(path)
  except OSError as e:
    raise errors.UserError(f"{path} cannot be read: {e.strerror or e}.") from e
  except (ValueError, KeyError, zipfile.BadZipFile) as e:
    if isinstance(e, errors.UserError):
      raise
    raise errors.UserError(f"The export of {path} cannot be read ({e!r}); write it again.") from e
  if file is None:
    return []
  profiles = sealed.opened(file, FORMAT, "profiles", path, advice)
  try:
    return [_of_json(one) for one in profiles]
  except (KeyError, TypeError, ValueError) as e:
    raise errors.UserError(f"{path} is damaged: {e!r}; {advice}.") from e


def _carried(path: pathlib.Path) -> Json | None:
  """The content that an export holds in its record: an artifact X.zip of X.zip.profile.json, an ONNX folder."""
  zipped = path.with_name(path.name.removesuffix(f".{NAME}"))
  if zipped.suffix == ".zip" and zipped != path and zipped.is_file():
    with zipfile.ZipFile(zipped) as file:
      record = json.loads(file.read(RECORD))
  elif path.name == NAME and (path.parent / RECORD).is_file():
    record = json.loads((path.parent / RECORD).read_bytes())
  else:
    return None
  return record.get("profile")


def of(path: pathlib.Path, weights: str) -> list[Profile]:
  """Reads the profiles of these weights.

  Raises:
    UserError: there is no such file, or it holds profiles of other weights alone; or as `read`.
  """
  profiles = read(path)
  own = [profile for profile in profiles if profile.weights == weights]
  if own:
    return own
  make = "make one with `flexivit profile`"
  if not profiles:
    raise errors.UserError(f"There is no profile {path}; {make}, or give --profile.")
  others = ", ".join(sorted({profile.weights[:12] for profile in profiles}))
  raise errors.UserError(
    f"{path} holds the profile of other weights (sha256 {others}; these are {weights[:12]}); {make}."
  )


def write(path: pathlib.Path, profile: Profile) -> None:
  """Writes a profile in the place of that of the same weights and device; others in the file stay.

  Raises:
    UserError: the file is there and damaged, or cannot be written.
  """
  same = lambda one: (one.weights, one.device) == (profile.weights, profile.device)  # noqa: E731
  path.parent.mkdir(parents=True, exist_ok=True)
  files.write_atomically(path, text_of([*(p for p in read(path) if not same(p)), profile]))


def text_of(profiles: Sequence[Profile]) -> str:
  """The content of a file of profiles."""
  return sealed.text(content_of(profiles))


def content_of(profiles: Sequence[Profile]) -> Json:
  """Profiles as JSON, with their checksum: what a file holds, or the record of an export under "profile"."""
  return sealed.seal(FORMAT, "profiles", [_to_json(profile) for profile in profiles])


def on_device(
  profiles: Sequence[Profile], device: str, peak_gflops: float | None = None
) -> Profile:
  """Returns the profile of a device, or, where `peak_gflops` is given, an estimate from that of another one.

  Args:
    profiles: of the same weights.
    device: the kind of device that the model is to run on.
    peak_gflops: see `Profile`, of this device; None: no estimate is wanted.

  Raises:
    UserError: the device was not measured, and no estimate is wanted.
  """
  for profile in profiles:
    if profile.device == device:
      return profile
  if peak_gflops is not None:
    return profiles[0].scaled(device, peak_gflops)
  known = "; ".join(profile.device for profile in profiles)
  raise errors.UserError(
    f"The profile was measured on another device ({known}; this is {device}). `flexivit profile` measures it here;"
    " --estimate scales its times by a matrix product on both."
  )


def _to_json(profile: Profile) -> Json:
  rows = [row._asdict() | {"size": size_text(row.size)} for row in profile.rows]
  return profile._asdict() | {"image": list(profile.image), "rows": rows}


def _of_json(content: Json) -> Profile:
  rows = tuple(Row(**{**row, "size": from_text(row["size"])}) for row in content["rows"])
  for row in rows:
    _check(row)
  height, width, channels = content["image"]
  return Profile(**{**content, "image": (height, width, channels), "rows": rows})


def _check(row: Row) -> None:
  """Raises a ValueError for numbers that no measurement gives."""
  for name in ("batch", "n", "ms", "ms_p90", "gflops"):
    if not (math.isfinite(getattr(row, name)) and getattr(row, name) > 0):
      raise ValueError(f"{name}={getattr(row, name)} of {row.name}")
  if not row.low <= row.value <= row.high:
    raise ValueError(f"value={row.value} of {row.name} is outside of {row.low} to {row.high}")
  if row.runtime not in RUNTIMES or row.dtype not in DTYPES:
    raise ValueError(f"runtime={row.runtime!r}, dtype={row.dtype!r}")
