"""OWL-ViT on a FlexiViT: a box and scores of queries for each patch, at any patch size (arXiv 2205.06230).

A query is a text, or one of a fixed list of classes. Each patch's token says one box and how well each query describes
it; there are as many boxes as tokens, so the patch size is also how many objects can be found.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Array, Float

from flexivit_jax import errors
from flexivit_jax.models import base, vit
from flexivit_jax.models.counting import Counted
from flexivit_jax.models.flexivit import FlexiViT
from flexivit_jax.models.grid import Grid
from flexivit_jax.models.text import TextTower
from flexivit_jax.sizes import Size
from flexivit_jax.specs import Specs, image as image_spec, spec
from flexivit_jax.trees import Json, Params

NORM_EPS = 1e-6  # added to the norms of token and query
BIAS_EPS = 1e-4  # of the logit of a box's bias
# The probability of a class at the start; log(0.01 / 0.99) is where "class_shift" begins.
PRIOR = 0.01
MASKED = -1e6  # the score of a query that is padding


class OwlViT(nn.Module, Counted):
  """A FlexiViT whose tokens each give a box and scores of the queries.

  Attributes:
    num_classes: number of classes of the data; without `text` and `query_length` each has a learned query.
    backbone: fields of the `FlexiViT`.
    text: fields of the `TextTower` that encodes queries of tokens; None: there is none.
    query_length: without `text`, length of the vectors that are given as queries, for example of a locked text tower;
      0: the queries are the classes.
    embed_dim: length of the embeddings that are compared; a projection of text features where their length is another.
    unit_queries: of a closed vocabulary, whether the queries are divided by their norms; False for means over several
      sentences about a name, which are shorter (see `with_queries`).
    merge: "class_token": each token times the class token, then a LayerNorm (published weights); "none": a LayerNorm
      alone, for backbones without a class token. Ours.
    box_bias: where a token's box begins. "centre": at the centre of the patch, as large as the patch. "corner": at its
      lower right corner, as in published weights; the last row and column then begin where the sigmoid is flat.
    box_size: (height, width) of a box at the start, in shares of the image; None: those of a patch, as published, which
      change with the patch size, where objects do not.
    objectness: a score of its own for whether a box holds anything (OWLv2, arXiv 2306.09683); no gradient goes from it
      to the tokens.
    gelu: of the heads' layers; see `FlexiViT`.
    dtype: of the matrix products, "float32" or "bfloat16".
    fsdp, gather_dtype: see `FlexiViT`.
  """

  PARTS: ClassVar[dict[str, str]] = {"backbone": "FlexiViT", "text": "TextTower"}

  num_classes: int = 0
  backbone: Mapping[str, Any] = FrozenDict()
  text: Mapping[str, Any] | None = None
  query_length: int = 0
  embed_dim: int = 512
  unit_queries: bool = True
  merge: str = "class_token"
  box_bias: str = "centre"
  box_size: tuple[float, float] | None = None
  objectness: bool = False
  gelu: str = "tanh"
  dtype: str = "float32"
  fsdp: Mesh | AbstractMesh | None = None
  gather_dtype: str = "float32"

  def __post_init__(self) -> None:
    self.backbone = base.hashable(self.backbone)
    self.text = None if self.text is None else base.hashable(self.text)
    if self.box_size is not None and not all(0 < share <= 1 for share in self.box_size):
      raise errors.UserError(
        f"box_size={self.box_size}; expected two shares of the image, (height, width), above 0 and up to 1."
      )
    choices = {"merge": MERGES, "box_bias": tuple(BOX_BIASES), "gelu": tuple(vit.GELU)}
    for name, known in choices.items():
      if getattr(self, name) not in known:
        raise errors.unknown(name, getattr(self, name), known)
    if self.merge == "class_token" and self._backbone().pool_type != "tok":
      raise errors.UserError(
        f"merge='class_token' with a backbone of pool_type={self._backbone().pool_type!r}; expected 'tok', or"
        " merge='none'."
      )
    if self.text is not None and self.query_length:
      raise errors.UserError(
        f"Got text and query_length={self.query_length}, which both say what a query is; give one of them."
      )
    super().__post_init__()

  @nn.nowrap
  def _backbone(self, name: str | None = None) -> FlexiViT:
    given = {"pool_type": "tok", "dtype": self.dtype, **self.backbone, "num_classes": 0}
    return FlexiViT(**given, fsdp=self.fsdp, gather_dtype=self.gather_dtype, name=name)

  @nn.nowrap
  def _text(self, name: str | None = None) -> TextTower:
    given = {"num_classes": self.embed_dim, "dtype": self.dtype, **(self.text or {})}
    return TextTower(**given, name=name)

  @property
  def open(self) -> bool:
    """Whether queries are given: texts, or vectors of texts; else they are the classes."""
    return self.text is not None or self.query_length > 0

  @nn.compact
  def __call__(
    self,
    image: Float[Array | np.ndarray, "n h w c"] | None = None,
    queries: Array | np.ndarray | None = None,
    *,
    embedded: Float[Array | np.ndarray, "n q e"] | None = None,
    train: bool = False,
    **size: Any,
  ) -> tuple[Array, Json]:
    """Returns the boxes (without an image, the embeddings of the queries), and a dict of named outputs.

    Args:
      image: pixels in [-1, 1].
      queries: of each image, tokens [n, q, l] with `text`, or vectors [n, q, query_length]. A query whose first token
        is 0, or a vector of zeros, is padding.
      embedded: what this returns for queries, in their place: a text that is asked often is encoded once.
      train: as for the towers.
      **size: of the backbone, e.g. `seqhw=8`.

    Raises:
      UserError: no queries where the model takes them, or some where its queries are the classes; fewer than one class.
    """
    out: Json = {}
    if embedded is None:
      embedded, real = self._embedded(queries, train)
    else:
      embedded = jnp.asarray(embedded)
      real = (embedded != 0).any(-1)
    out["query_embeddings"] = embedded
    if image is None:
      return embedded, out
    n = image.shape[0]
    if not self.open:
      embedded = jnp.tile(embedded, (n, 1, 1))
      real = jnp.tile(real, (n, 1))
    features = self._backbone("backbone").features(image, train=train, **size)
    x = features.tokens
    if self.merge == "class_token":
      x = x * features.pooled[:, None, None]
    eps = self._backbone().layer_norm_eps
    x = nn.LayerNorm(eps, name="merged_class_token")(x)
    gh, gw, d = x.shape[1:]
    x = x.reshape(n, gh * gw, d)

    act = vit.GELU[self.gelu]
    small = nn.initializers.normal(1e-6)
    tokens = _dense(self, self.embed_dim, "class_embedding", kernel_init=small)(x)
    tokens = tokens.astype(jnp.float32)
    tokens = tokens / (jnp.linalg.norm(tokens, axis=-1, keepdims=True) + NORM_EPS)
    scores = jnp.einsum("nle,nqe->nlq", tokens, embedded)
    start = nn.initializers.constant(np.log(PRIOR / (1 - PRIOR)))
    shift = nn.Dense(1, bias_init=start, name="class_shift")(x)
    scale = nn.elu(nn.Dense(1, name="class_scale")(x)) + 1.0
    out["class_logits"] = jnp.where(real[:, None], (scores + shift) * scale, MASKED)

    bias = BOX_BIASES[self.box_bias]((gh, gw), self.box_size)
    moved = _mlp(self, x, 4, "box", act).astype(jnp.float32)
    boxes = out["pred_boxes"] = nn.sigmoid(moved + bias.reshape(1, gh * gw, 4))
    out["patch_centres"] = jnp.tile(_centres((gh, gw)), (n, 1, 1))
    if self.objectness:
      fixed = jax.lax.stop_gradient(x)
      out["objectness"] = _mlp(self, fixed, 1, "objectness", act)[..., 0].astype(jnp.float32)
    return boxes, out

  def _embedded(
    self, queries: Array | np.ndarray | None, train: bool
  ) -> tuple[Float[Array, "n q e"], Array]:
    """Unit vectors of the queries, and which are no padding; n is 1 of learned queries."""
    if not self.open:
      if queries is not None:
        raise errors.UserError("This detector's queries are its classes; it takes none.")
      if self.num_classes < 1:
        raise errors.UserError(
          f"A detector without text has {self.num_classes} classes; expected 1 or more. Name them in the data, or give"
          " num_classes."
        )
      shape = (1, self.num_classes, self.embed_dim)
      x = self.param("queries", nn.initializers.normal(1.0), shape)
      return _unit(x) if self.unit_queries else x, jnp.ones(shape[:2], bool)
    if queries is None:
      raise errors.UserError(
        "This detector compares images with queries and got none; give it names."
      )
    queries = jnp.asarray(queries)
    n, q = queries.shape[:2]
    if self.text is None:
      real = (queries != 0).any(-1)
      x = nn.Dense(self.embed_dim, name="query_projection")(queries)
    else:
      real = queries[..., 0] != 0
      x, _ = self._text("text")(queries.reshape(n * q, -1), train=train)
      x = x.reshape(n, q, -1)
      if x.shape[-1] != self.embed_dim:
        x = nn.Dense(self.embed_dim, name="query_projection")(x)
    return _unit(x) * real[..., None], real

  @nn.nowrap
  def grid(
    self,
    image_hw: tuple[int, ...],
    *,
    seqhw: int | None = None,
    grid_hw: Size | None = None,
    patch_hw: Size | None = None,
    depth: int | None = None,
  ) -> Grid:
    """See `FlexiViT.grid`."""
    return self._backbone().grid(
      image_hw, seqhw=seqhw, grid_hw=grid_hw, patch_hw=patch_hw, depth=depth
    )

  @property
  def parts(self) -> dict[str, nn.Module]:
    """See `Model.parts`."""
    parts: dict[str, nn.Module] = {"backbone": self._backbone()}
    return parts | ({} if self.text is None else {"text": self._text()})

  @property
  def is_random(self) -> bool:
    """Whether training draws masks."""
    return self._backbone().is_random

  @property
  def inputs(self) -> Specs:
    """See `Model.inputs`."""
    if not self.open:
      return {"image": image_spec()}
    queries = spec(f"q {self.query_length}") if self.text is None else spec("q l", "int")
    return {"image": image_spec(), "queries": queries}

  @property
  def outputs(self) -> Specs:
    """See `Model.outputs`: boxes (cx, cy, w, h) in shares of the image, and scores of queries (logits).

    "patch_centres" are the centres (x, y) of the tokens' patches, in shares of the image.
    """
    q = "q" if self.open else "classes"
    out = {"pred_boxes": spec("tokens 4"), "class_logits": spec(f"tokens {q}")}
    out |= {"patch_centres": spec("tokens 2"), "query_embeddings": spec(f"{q} {self.embed_dim}")}
    return out | ({"objectness": spec("tokens")} if self.objectness else {})


def with_queries(
  model: OwlViT, params: Params, queries: Float[Array | np.ndarray, "q e"]
) -> tuple[OwlViT, Params]:
  """Returns (model, params) of the detector whose classes are these queries: it needs no texts, and no text tower.

  Scores are linear in a query's embedding, so that the mean of the embeddings of several sentences gives the mean of
  their scores.

  Args:
    model, params: a detector that takes queries.
    queries: their embeddings, or means of these; see `OwlViT.__call__`.
  """
  others = {k: v for k, v in params.items() if k not in ("text", "query_projection")}
  closed = model.clone(num_classes=len(queries), text=None, query_length=0, unit_queries=False)
  return closed, others | {"queries": jnp.asarray(queries, jnp.float32)[None]}


MERGES = ("class_token", "none")


BoxSize = tuple[float, float] | None


def centre_bias(grid_hw: Size, size: BoxSize = None) -> Float[np.ndarray, "gh gw 4"]:
  """Logits of boxes (cx, cy, w, h) that are the patches themselves, or of another size, (height, width)."""
  return _box_bias(grid_hw, 0.5, size)


def corner_bias(grid_hw: Size, size: BoxSize = None) -> Float[np.ndarray, "gh gw 4"]:
  """As `centre_bias`, around the patch's lower right corner; source: scenic's owl_vit/utils.py."""
  return _box_bias(grid_hw, 1.0, size)


BOX_BIASES = {"centre": centre_bias, "corner": corner_bias}


def _box_bias(grid_hw: Size, offset: float, size: BoxSize) -> Float[np.ndarray, "gh gw 4"]:
  rows, columns = grid_hw
  height, width = size or (1.0 / rows, 1.0 / columns)
  y, x = np.mgrid[:rows, :columns] + offset
  each = np.broadcast_arrays(x / columns, y / rows, width, height)
  share = np.stack(each, axis=-1)
  return (np.log(share + BIAS_EPS) - np.log1p(-share + BIAS_EPS)).astype(np.float32)


def _centres(grid_hw: Size) -> Float[np.ndarray, "1 l 2"]:
  rows, columns = grid_hw
  y, x = np.mgrid[:rows, :columns] + 0.5
  return np.stack([x / columns, y / rows], -1).reshape(1, -1, 2).astype(np.float32)


def _dense(model: OwlViT, features: int, name: str, **options: Any) -> nn.Dense:
  return nn.Dense(features, dtype=model.dtype, name=name, **options)


def _mlp(model: OwlViT, x: Array, features: int, name: str, act: Any) -> Array:
  """Two hidden layers, and a last one that begins at zero."""
  for i in range(2):
    x = act(_dense(model, x.shape[-1], f"{name}_{i}")(x))
  zeros = nn.initializers.zeros
  return _dense(model, features, f"{name}_2", kernel_init=zeros)(x)


def _unit(x: Float[Array, "n q e"]) -> Float[Array, "n q e"]:
  x = x.astype(jnp.float32)
  norm = jnp.sqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-30))
  return x / (norm + NORM_EPS)
