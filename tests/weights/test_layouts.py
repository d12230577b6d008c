"""Names that are not read are named with the project that they are of, and with what to do."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import weights
from flexivit_jax.errors import UserError

NAMES = {
  "vit.embeddings.patch_embeddings.projection.weight": "folder that save_pretrained wrote",
  "vision_model.embeddings.patch_embedding.weight": "folder that save_pretrained wrote",
  "module.dinov2.embeddings.cls_token": "folder that save_pretrained wrote",
  "backbone.layers.0.ffn.layers.0.0.weight": "MMPretrain",
  "backbone.patch_embed.projection.weight": "MMPretrain",
  "blocks.0.attn.qkv.lora_A.default.weight": "merge_and_unload",
  "base_model.model.blocks.0.attn.qkv.base_layer.weight": "merge_and_unload",
}


@pytest.mark.parametrize("beside", [(), ("vision_model.encoder.layers.0.self_attn.q_proj.weight",)])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_another_project_are_named(tmp_path, name, beside):
  path = tmp_path / "w.safetensors"
  save_file({n: np.zeros((2, 2), np.float32) for n in (name, *beside)}, path)
  with pytest.raises(UserError) as error:
    weights.load(path)
  assert NAMES[name] in str(error.value)
  assert "Did you mean" not in str(error.value)


def test_rotary_positions_come_before_the_names_of_transformers(tmp_path):
  names = ("embeddings.cls_token", "rope_embed.periods")
  save_file({n: np.zeros((2, 2), np.float32) for n in names}, tmp_path / "w.safetensors")
  with pytest.raises(UserError, match="rotary positions"):
    weights.load(tmp_path / "w.safetensors")
