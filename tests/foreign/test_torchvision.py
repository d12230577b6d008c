"""torchvision's Vision Transformer, read by its names: the same logits, every parameter random."""

import importlib

import numpy as np
import pytest

from flexivit_jax import weights
from flexivit_jax.errors import UserError


@pytest.fixture
def vit():
  import torch

  vision_transformer = importlib.import_module("torchvision.models.vision_transformer")
  torch.manual_seed(0)
  sizes = dict(image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=64, mlp_dim=96)
  model = vision_transformer.VisionTransformer(**sizes, num_classes=5).eval()
  for parameter in model.parameters():
    parameter.data = torch.randn_like(parameter) * 0.2
  return model


@pytest.mark.parametrize("old_names", [False, True])
def test_a_wrapped_file_of_torchvision_gives_its_logits(tmp_path, vit, old_names):
  import torch

  image = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    want = vit(torch.from_numpy(image.transpose(0, 3, 1, 2).copy())).numpy()
  arrays = vit.state_dict()
  if old_names:
    rename = lambda n: n.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2.")  # noqa: E731
    arrays = {rename(name): tensor for name, tensor in arrays.items()}
  torch.save({"model": {f"module.{n}": t for n, t in arrays.items()}}, tmp_path / "vit.pth")
  model, params, record = weights.load_with_record(tmp_path / "vit.pth", num_heads=2)
  got = model.apply({"params": params}, image)[0]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
  assert any("torchvision" in note for note in record["notes"])


@pytest.mark.filterwarnings("ignore")  # torch warns of tracing
def test_a_program_in_torchscript_names_a_way_that_works(tmp_path, vit):
  import torch

  image = torch.zeros(1, 3, 32, 32)
  torch.jit.trace(vit, image, check_trace=False).save(str(tmp_path / "script.pt"))
  with pytest.raises(UserError, match=r"torch\.jit\.load\(FILE, map_location='cpu'\)"):
    weights.load(tmp_path / "script.pt")
  script = torch.jit.load(tmp_path / "script.pt", map_location="cpu")
  torch.save(script.state_dict(), tmp_path / "weights.pth")
  weights.load(tmp_path / "weights.pth", num_heads=2)
