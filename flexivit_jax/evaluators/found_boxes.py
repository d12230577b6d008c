"""True boxes and detections of all images of a data set, in one table on every process."""

import io
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from flexivit_jax import errors
from flexivit_jax.data import annotations
from flexivit_jax.evaluators.average_precision import Boxes
from flexivit_jax.running import distributed

# Arrays [n, ...] of n images by name: those of batches, and of each size "box_K", "label_K", "score_K".
Images = dict[str, np.ndarray]

NEEDED = ("image", "boxes", "box_labels", "box_mask", "origin")
FEDERATED = ("neg_labels", "not_exhaustive")
_SENT = ("origin", "boxes", "box_labels", "box_mask", "box_crowd", *FEDERATED)


def checked(batch: Mapping[str, np.ndarray], num_classes: int, *, federated: bool) -> Images:
  """Returns what is needed of a batch besides its images, boxes in shares of these.

  Args:
    batch: "image" [n, h, w, c], "boxes" [n, m, 4] in pixels of it, "box_labels", "box_mask" and perhaps "box_crowd"
      [n, m], "origin" [n, 6]; with `federated` also "neg_labels" and "not_exhaustive" [n, classes], zeros and ones.
    num_classes: numbers of classes are below it.
    federated: whether LVIS's rules ask for what each image was searched for.

  Raises:
    UserError: a key is missing; boxes in shares of the image; labels of other classes.
  """
  needed = (*NEEDED, *(FEDERATED if federated else ()))
  if missing := sorted({*needed, "_mask"} - set(batch)):
    raise errors.UserError(
      f"Detection needs {missing} in its batches, they have {sorted(batch)}: mend pp, decode|origin()|...|pad_boxes(N)"
      f"|keep({', '.join(map(repr, needed))})."
      + " The operation federated() makes vectors of what LVIS says of classes."
      * federated
    )
  real = (batch["box_mask"] > 0) & (batch["_mask"] > 0)[:, None]
  boxes, labels = batch["boxes"], batch["box_labels"]
  if real.any() and boxes[real].max() <= 1:
    raise errors.UserError(
      f"The boxes of a batch reach to {boxes[real].max():.3g} pixels: they are shares of the image. Leave"
      " relative_boxes out of pp; an evaluation takes boxes in pixels."
    )
  wrong = labels[real][(labels[real] < 0) | (labels[real] >= num_classes)]
  if wrong.size:
    raise errors.UserError(
      f"A box is of class {wrong[0]}; expected 0 to {num_classes - 1}, the classes of the model."
    )
  h, w = batch["image"].shape[1:3]
  made = {key: batch[key] for key in _SENT if key in batch}
  for key in FEDERATED if federated else ():
    if made[key].shape[1:] != (num_classes,):
      raise errors.UserError(
        f"{key!r} has shape {made[key].shape}; expected a row of {num_classes} classes for each image, as"
        " federated() in pp makes it."
      )
  made.setdefault("box_crowd", np.zeros(real.shape, bool))
  return made | {"boxes": boxes / np.array([w, h, w, h], np.float64), "box_mask": real}


def of_all_processes(parts: Iterable[Images]) -> Images:
  """Joins the images of batches and of processes.

  Their order follows from what they hold: it decides between detections of equal scores, and must not depend on how
  many processes there are.
  """
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, **_joined([*parts]))
  blobs = distributed.blobs(file.getvalue())
  whole = _joined([dict(np.load(io.BytesIO(blob))) for blob in blobs])
  keys = [*_SENT, *sorted(set(whole) - set(_SENT))]
  columns = [np.ascontiguousarray(whole[key]) for key in keys if key in whole]
  content = [b"".join(row.tobytes() for row in rows) for rows in zip(*columns, strict=True)]
  order = sorted(range(len(content)), key=content.__getitem__)
  return {key: array[order] for key, array in whole.items()}


def _joined(parts: Sequence[Images]) -> Images:
  return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def true_boxes(images: Images) -> Boxes:
  """Returns the true boxes, in pixels of the files' images."""
  image, row = np.nonzero(images["box_mask"])
  box = annotations.on_original(images["boxes"], images["origin"])[image, row]
  labels, crowd = images["box_labels"][image, row], images["box_crowd"][image, row].astype(bool)
  return Boxes(image, box, labels.astype(np.int64), np.ones(len(image)), crowd)


def found_boxes(images: Images, number: int) -> Boxes:
  """Returns the detections at a size, in pixels of the files' images, clipped to these."""
  score, label = images[f"score_{number}"], images[f"label_{number}"]
  n, most = score.shape
  box = annotations.on_original(images[f"box_{number}"], images["origin"])
  image = np.repeat(np.arange(n), most)
  flat = label.reshape(-1).astype(np.int64), score.reshape(-1).astype(np.float64)
  return Boxes(image, box.reshape(-1, 4), *flat, np.zeros(n * most, bool))


def pixels_of_a_token(images: Images, tokens: int) -> Float[np.ndarray, "n"]:
  """Returns how many pixels of its file's image a token sees, for each image."""
  origin = images["origin"].astype(np.float64)
  return origin[:, 4] * origin[:, 5] / tokens
