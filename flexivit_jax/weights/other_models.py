"""Models that are no plain Vision Transformer, told by the names of their arrays: what they have that a ViT has not."""

import re
from collections.abc import Iterable

# Part of a name: what it means. The first that is there is named.
_FEATURES = {
  r"(^|\.)(rope|rope_embed|rotary_emb|rotary)\.|freqs_(cis|cos|sin)|\.rope\.|periods$": "rotary positions",
  r"relative_position_(bias_table|index)|rel_pos(_h|_w|_bias)?(\.|$)": "relative positions",
  r"mlp\.(fc1_[gx]|w12|w[123]|gate_proj|up_proj|ffn_ln)\b": "a gated MLP (SwiGLU)",
  # EVA-02 does not store its rotary positions, so its names are those of a plain ViT but for these.
  r"attn\.[qv]_bias$": "biases of queries and values apart, as BEiT and EVA have with relative or rotary positions",
  r"attn\.[qk]_norm\.|attn\.norm\.": "norms inside the attention",
  r"attn\.[qkv]_proj\.|attn\.(q|k|v)\.weight": "attention with separate projections",
  r"(^|\.)stages?\.\d|(^|\.)layers\.\d+\.(blocks|downsample)|downsample_layers": "stages of different resolutions",
  r"patch_embed\.(backbone|conv|stem|projs?\.\d|norm)": "a patch embedding of several layers",
  r"experts?\.\d": "a mixture of experts",
}
# Models that their config.json names.
KINDS = {
  "dinov3": "rotary positions",
  "eva": "rotary positions",
  "beit": "relative positions",
  "data2vec": "relative positions",
  "swin": "stages of different resolutions",
  "convnext": "convolutions",
  "resnet": "convolutions",
  "vit_hybrid": "convolutions before the blocks",
  "pvt": "stages of different resolutions",
  "mobilevit": "convolutions",
  "levit": "convolutions",
  "segformer": "stages of different resolutions",
  "hiera": "stages of different resolutions",
  "maxvit": "stages of different resolutions",
}


# Names of plain ViTs that this package does not read from arrays alone, and what to do.
_LAYOUTS = {
  r"\.lora_(A|B|embedding)|\.base_layer\.": (
    "are those of PEFT's adapters; merge these into the model (merge_and_unload) and save its weights"
  ),
  r"(^|\.)embeddings\.(cls_token|class_embedding|patch_embeddings?\.|position_embedding)": (
    "are those of transformers, which are read together with their config.json; give the folder that save_pretrained"
    " wrote"
  ),
  r"(^|\.)layers\.\d+\.ffn\.layers\.|patch_embed\.projection\.": (
    "are those of MMPretrain, which are not read; give the model in the names of timm or transformers"
  ),
}
_FIRST = ("rotary positions", "relative positions")  # of these transformers has models, too


def layout(names: Iterable[str]) -> str | None:
  """Says whose names these are if no reader knows them, and what to do; None for others."""
  names = list(names)
  if (what := feature(names)) and what.startswith(_FIRST):
    return None
  for pattern, advice in _LAYOUTS.items():
    name = next((n for n in names if re.search(pattern, n)), None)
    if name is not None:
      return f"The names of the arrays ({name}, ...) {advice}."
  return None


def feature(names: Iterable[str]) -> str | None:
  """Returns the part of the model that no plain ViT has, with one name that shows it, or None."""
  names = list(names)
  for pattern, what in _FEATURES.items():
    name = next((n for n in names if re.search(pattern, n)), None)
    if name is not None:
      return f"{what} ({name})"
  return None


def kind(model: object) -> str | None:
  """Returns what a model of this name in a config.json has that no plain ViT has, or None if it is unknown."""
  text = str(model).lower()
  return next((what for name, what in KINDS.items() if text.startswith(name)), None)


def refusal(what: str, reason: str) -> str:
  """Returns the message on a model that cannot be read."""
  return (
    f"{what} has {reason}, which a FlexiViT does not have. Only plain Vision Transformers can be read: learned"
    " positions or sine-cosine, one kind of block (ViT, DeiT, DINO, DINOv2, CLIP, SigLIP, MAE)."
  )
