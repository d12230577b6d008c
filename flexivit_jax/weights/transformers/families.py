"""The model types of Hugging Face's `transformers` that a FlexiViT can be: their names, heads and defaults.

The names are those that `save_pretrained` writes, in version 4 and 5 alike; only the vision towers of CLIP and SigLIP
have a prefix in one and none in the other.
"""

from typing import NamedTuple

from flexivit_jax.trees import Json


class Layout(NamedTuple):
  """The names of a family's arrays; `block` maps our word for a part to theirs."""

  patch: str
  position: str
  lead: tuple[int, ...]  # axes of the positions before [l, d]
  tokens: tuple[str, ...]  # those with a position, in order
  pre_norm: str
  blocks: str
  block: dict[str, str]
  norm: str


class Head(NamedTuple):
  """What a class of models does with the tokens: our pool type, and its dense layers, averaged if there are two."""

  pool_type: str
  dense: tuple[str, ...] = ()


class Family(NamedTuple):
  """A model type: its names, what its config.json may leave out, and its classes.

  `base` is how the tower's names begin in a model with a head. `others` is how those of the other tower and of the loss
  begin, in a model with two.
  """

  layout: Layout
  base: str
  defaults: Json
  classes: dict[str, Head]
  others: tuple[str, ...] = ()

  @property
  def nested(self) -> bool:
    """Tells whether config.json has the tower's settings one level down."""
    return bool(self.others)


_ATTENTION = {
  "query": "attention.attention.query",
  "key": "attention.attention.key",
  "value": "attention.attention.value",
  "out": "attention.output.dense",
}
_VIT = Layout(
  patch="embeddings.patch_embeddings.projection",
  position="embeddings.position_embeddings",
  lead=(1,),
  tokens=("embeddings.cls_token",),
  pre_norm="",
  blocks="encoder.layer",
  block={
    "norm1": "layernorm_before",
    **_ATTENTION,
    "norm2": "layernorm_after",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
  },
  norm="layernorm",
)
_DEIT = _VIT._replace(tokens=(*_VIT.tokens, "embeddings.distillation_token"))
_DINO = _VIT._replace(
  block={
    "norm1": "norm1",
    **_ATTENTION,
    "scale1": "layer_scale1.lambda1",
    "norm2": "norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale2": "layer_scale2.lambda1",
  }
)
_CLIP = Layout(
  patch="embeddings.patch_embedding",
  position="embeddings.position_embedding.weight",
  lead=(),
  tokens=("embeddings.class_embedding",),
  pre_norm="pre_layrnorm",  # so spelt there
  blocks="encoder.layers",
  block={
    "norm1": "layer_norm1",
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "out": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
  },
  norm="post_layernorm",
)
_SIGLIP = _CLIP._replace(tokens=(), pre_norm="")
_OWL = _CLIP._replace(pre_norm="pre_layernorm")

# Of the config classes. A nested config.json leaves out what is equal to them; other settings do not change the model.
_SIZES = {
  "hidden_size": 768,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
}
_VIT_DEFAULTS = _SIZES | {
  "intermediate_size": 3072,
  "patch_size": 16,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "qkv_bias": True,
  "pooler_output_size": None,
}
_DINO_DEFAULTS = _SIZES | {
  "mlp_ratio": 4,
  "patch_size": 14,
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-6,
  "qkv_bias": True,
  "use_swiglu_ffn": False,
}
_CLIP_DEFAULTS = _SIZES | {
  "intermediate_size": 3072,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "projection_dim": 512,
}
_SIGLIP_DEFAULTS = _SIZES | {
  "intermediate_size": 3072,
  "patch_size": 16,
  "hidden_act": "gelu_pytorch_tanh",
  "layer_norm_eps": 1e-6,
  "vision_use_head": True,
}

_OWL_DEFAULTS = {k: v for k, v in _CLIP_DEFAULTS.items() if k != "projection_dim"}
_OWL_DEFAULTS |= {"image_size": 768}

PROJECTION = ("visual_projection",)  # without a bias
_CLASSIFIER = ("classifier",)
_TEXT = ("text_model.", "text_projection.weight", "logit_scale", "logit_bias")


def _detector(base: str, patch_size: int) -> Family:
  """OWL-ViT and OWLv2: CLIP's towers below `base`, and heads beside them."""
  beside = [f"{base}{name}" for name in (*_TEXT, "visual_projection.weight")]
  return Family(
    _OWL,
    f"{base}vision_model.",
    _OWL_DEFAULTS | {"patch_size": patch_size},
    {DETECTORS[base.removesuffix(".")]: Head("tok")},
    (*beside, *DETECTOR_HEADS),
  )


DETECTORS = {"owlvit": "OwlViTForObjectDetection", "owlv2": "Owlv2ForObjectDetection"}
DETECTOR_HEADS = ("class_head.", "box_head.", "objectness_head.", "layer_norm.")

FAMILIES = {
  "vit": Family(
    _VIT,
    "vit.",
    _VIT_DEFAULTS,
    {"ViTModel": Head("tok"), "ViTForImageClassification": Head("tok", _CLASSIFIER)},
  ),
  "deit": Family(
    _DEIT,
    "deit.",
    _VIT_DEFAULTS,
    {
      "DeiTModel": Head("tok"),
      "DeiTForImageClassification": Head("tok", _CLASSIFIER),
      "DeiTForImageClassificationWithTeacher": Head(
        "tok+reg", ("cls_classifier", "distillation_classifier")
      ),
    },
  ),
  "dinov2": Family(
    _DINO,
    "dinov2.",
    _DINO_DEFAULTS,
    {"Dinov2Model": Head("tok"), "Dinov2ForImageClassification": Head("tok+gap", _CLASSIFIER)},
  ),
  "dinov2_with_registers": Family(
    _DINO,
    "dinov2_with_registers.",
    _DINO_DEFAULTS | {"patch_size": 16, "num_register_tokens": 4},
    {
      "Dinov2WithRegistersModel": Head("tok"),
      "Dinov2WithRegistersForImageClassification": Head("tok+gap", _CLASSIFIER),
    },
  ),
  "clip_vision_model": Family(
    _CLIP,
    "vision_model.",
    _CLIP_DEFAULTS,
    {"CLIPVisionModel": Head("tok"), "CLIPVisionModelWithProjection": Head("tok", PROJECTION)},
  ),
  "clip": Family(
    _CLIP, "vision_model.", _CLIP_DEFAULTS, {"CLIPModel": Head("tok", PROJECTION)}, _TEXT
  ),
  "siglip_vision_model": Family(
    _SIGLIP, "vision_model.", _SIGLIP_DEFAULTS, {"SiglipVisionModel": Head("map")}
  ),
  "siglip": Family(
    _SIGLIP,
    "vision_model.",
    _SIGLIP_DEFAULTS,
    {"SiglipModel": Head("map"), "SiglipForImageClassification": Head("gap", _CLASSIFIER)},
    _TEXT,
  ),
  "owlvit": _detector("owlvit.", 32),
  "owlv2": _detector("owlv2.", 16),
}
