"""A plain NumPy ViT that runs transformers' names as they are says what the model read from a folder must give."""

import json
import math

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flexivit_jax import trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.weights import conversion
from flexivit_jax.weights.transformers import (
  config as transformers_config,
  names as transformers_names,
)

D, HEADS, MLP, DEPTH, PATCH, IMAGE, CELLS, CLASSES = 16, 4, 24, 2, 4, 16, 16, 5
VIT = dict(
  patch="embeddings.patch_embeddings.projection",
  position="embeddings.position_embeddings",
  cls="embeddings.cls_token",
  block="encoder.layer.{}.",
  norm1="layernorm_before",
  attention=[f"attention.attention.{n}" for n in ("query", "key", "value")],
  out="attention.output.dense",
  norm2="layernorm_after",
  fc1="intermediate.dense",
  fc2="output.dense",
  norm="layernorm",
)
DINO = VIT | dict(norm1="norm1", norm2="norm2", fc1="mlp.fc1", fc2="mlp.fc2")
CLIP = dict(
  patch="embeddings.patch_embedding",
  position="embeddings.position_embedding.weight",
  cls="embeddings.class_embedding",
  block="encoder.layers.{}.",
  norm1="layer_norm1",
  attention=[f"self_attn.{n}_proj" for n in "qkv"],
  out="self_attn.out_proj",
  norm2="layer_norm2",
  fc1="mlp.fc1",
  fc2="mlp.fc2",
  norm="post_layernorm",
)
# Architecture: (model_type, names, beginning of the tower's names, tokens with a position, heads).
KINDS = {
  "ViTModel": ("vit", VIT, "", 1, {}),
  "ViTForImageClassification": ("vit", VIT, "vit.", 1, {"classifier": D}),
  "DeiTModel": ("deit", VIT, "", 2, {}),
  "DeiTForImageClassification": ("deit", VIT, "deit.", 2, {"classifier": D}),
  "DeiTForImageClassificationWithTeacher": (
    "deit",
    VIT,
    "deit.",
    2,
    {"cls_classifier": D, "distillation_classifier": D},
  ),
  "Dinov2Model": ("dinov2", DINO, "", 1, {}),
  "Dinov2ForImageClassification": ("dinov2", DINO, "dinov2.", 1, {"classifier": 2 * D}),
  "Dinov2WithRegistersForImageClassification": (
    "dinov2_with_registers",
    DINO,
    "dinov2_with_registers.",
    1,
    {"classifier": 2 * D},
  ),
  "CLIPVisionModel": ("clip_vision_model", CLIP, "vision_model.", 1, {}),
  "CLIPVisionModelWithProjection": (
    "clip_vision_model",
    CLIP,
    "vision_model.",
    1,
    {"visual_projection": D},
  ),
  "CLIPModel": ("clip", CLIP, "vision_model.", 1, {"visual_projection": D}),
  "SiglipVisionModel": ("siglip_vision_model", CLIP, "vision_model.", 0, {}),
  "SiglipModel": ("siglip", CLIP, "vision_model.", 0, {}),
  "SiglipForImageClassification": ("siglip", CLIP, "vision_model.", 0, {"classifier": D}),
}
ONE_OF_EACH = [
  "ViTForImageClassification",
  "DeiTForImageClassificationWithTeacher",
  "Dinov2ForImageClassification",
  "Dinov2WithRegistersForImageClassification",
  "CLIPModel",
  "SiglipModel",
]
GELU = {"vit": "gelu", "deit": "gelu", "dino": "gelu", "clip": "quick_gelu"}


def shapes_of(kind):
  """Shapes by name without the tower's prefix, and those of everything else."""
  type_, names, _, tokens, heads = KINDS[kind]
  siglip, clip, dino = type_.startswith("siglip"), names is CLIP, names is DINO
  dense = {n: (D, D) for n in (*names["attention"], names["out"])}
  dense |= {names["fc1"]: (MLP, D), names["fc2"]: (D, MLP)}
  block = {f"{n}.weight": s for n, s in dense.items()} | {
    f"{n}.bias": s[:1] for n, s in dense.items()
  }
  norms = [names["norm1"], names["norm2"]]
  block |= {f"{n}.{leaf}": (D,) for n in norms for leaf in ("weight", "bias")}
  if dino:
    block |= {"layer_scale1.lambda1": (D,), "layer_scale2.lambda1": (D,)}
  tower = {names["block"].format(i) + n: s for i in range(DEPTH) for n, s in block.items()}
  tower |= {f"{names['patch']}.weight": (D, 3, PATCH, PATCH)}
  tower |= {f"{names['norm']}.weight": (D,), f"{names['norm']}.bias": (D,)}
  tower[names["position"]] = (CELLS + tokens, D) if clip else (1, CELLS + tokens, D)
  if tokens:
    tower[names["cls"]] = (D,) if clip else (1, 1, D)
  if tokens == 2:
    tower["embeddings.distillation_token"] = (1, 1, D)
  if "registers" in type_:
    tower["embeddings.register_tokens"] = (1, 3, D)
  if clip and not siglip:
    tower |= {"pre_layrnorm.weight": (D,), "pre_layrnorm.bias": (D,)}
  else:
    tower[f"{names['patch']}.bias"] = (D,)
  if siglip:
    tower |= {
      "head.probe": (1, 1, D),
      "head.attention.in_proj_weight": (3 * D, D),
      "head.attention.in_proj_bias": (3 * D,),
      "head.attention.out_proj.weight": (D, D),
      "head.attention.out_proj.bias": (D,),
      "head.layernorm.weight": (D,),
      "head.layernorm.bias": (D,),
      "head.mlp.fc1.weight": (MLP, D),
      "head.mlp.fc1.bias": (MLP,),
      "head.mlp.fc2.weight": (D, MLP),
      "head.mlp.fc2.bias": (D,),
    }
  rest = {f"{n}.weight": (CLASSES, inputs) for n, inputs in heads.items()}
  if "visual_projection" not in heads:
    rest |= {f"{n}.bias": (CLASSES,) for n in heads}
  return tower, rest


def make(kind, prefix=None, **changes):
  """Returns (config.json, random arrays) of an architecture; changes are of its settings."""
  type_, names, usual, _, heads = KINDS[kind]
  tower, rest = shapes_of(kind)
  prefix = usual if prefix is None else prefix
  rng = np.random.default_rng(0)
  arrays = {
    n: (0.3 * rng.normal(size=s)).astype(np.float32)
    for n, s in ({prefix + n: s for n, s in tower.items()} | rest).items()
  }
  settings = dict(
    hidden_size=D,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    image_size=IMAGE,
    patch_size=PATCH,
    layer_norm_eps=1e-3,
  )
  settings |= {"mlp_ratio": MLP / D} if names is DINO else {"intermediate_size": MLP}
  if "registers" in type_:
    settings["num_register_tokens"] = 3
  if "visual_projection" in heads:
    settings["projection_dim"] = CLASSES
  settings |= changes
  top = {"model_type": type_, "architectures": [kind]}
  if "visual_projection" not in heads and heads:
    top["id2label"] = {str(i): f"LABEL_{i}" for i in range(CLASSES)}
  if type_ in ("clip", "siglip"):
    arrays["text_model.embeddings.token_embedding.weight"] = np.zeros((9, 4), np.float32)
    arrays["logit_scale"] = np.array(2.0, np.float32)
    outer = {k: settings.pop(k) for k in ("projection_dim",) if k in settings}
    return top | outer | {"vision_config": settings, "text_config": {}}, arrays
  return top | settings, arrays


def converted(config, arrays):
  return transformers_names.convert(transformers_config.spec(config), arrays)


def save(folder, config, arrays):
  folder.mkdir(exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  save_file(arrays, folder / "model.safetensors")
  return folder


def norm(a, name, x):
  x = x - x.mean(-1, keepdims=True)
  x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-3)
  return x * a[f"{name}.weight"] + a[f"{name}.bias"]


def dense(a, name, x):
  return x @ a[f"{name}.weight"].T + a.get(f"{name}.bias", 0)


ACT = {
  "gelu": lambda x: x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
  "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
  "gelu_pytorch_tanh": lambda x: (
    0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  ),
}


def attend(q, k, v):
  q, k, v = (x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2) for x in (q, k, v))
  scores = q @ k.swapaxes(-1, -2) / math.sqrt(D // HEADS)
  p = np.exp(scores - scores.max(-1, keepdims=True))
  x = ((p / p.sum(-1, keepdims=True)) @ v).swapaxes(1, 2)
  return x.reshape(*x.shape[:2], D)


def forward(kind, arrays, image, hw_patch=(PATCH, PATCH)):
  """Logits of pixels [n, h, w, c], already normalised, in float64."""
  type_, names, prefix, _, heads = KINDS[kind]
  a = {n.removeprefix(prefix): x.astype(np.float64) for n, x in arrays.items()}
  act = ACT["gelu_pytorch_tanh" if "siglip" in type_ else GELU[type_[:4].strip("_")]]
  (n, h, w, c), (ph, pw) = image.shape, hw_patch
  x = image.reshape(n, h // ph, ph, w // pw, pw, c)
  x = np.einsum("nhpwqc,dcpq->nhwd", x, a[f"{names['patch']}.weight"]).reshape(n, -1, D)
  x = x + a.get(f"{names['patch']}.bias", 0)
  before = [names["cls"], "embeddings.distillation_token"]
  tokens = [np.tile(a[t].reshape(1, 1, D), (n, 1, 1)) for t in before if t in a]
  x = np.concatenate([*tokens, x], 1) + a[names["position"]].reshape(1, -1, D)
  registers = a.get("embeddings.register_tokens", np.zeros((1, 0, D)))
  x = np.concatenate([x[:, :1], np.tile(registers, (n, 1, 1)), x[:, 1:]], 1)
  if "pre_layrnorm.weight" in a:
    x = norm(a, "pre_layrnorm", x)
  for b in (names["block"].format(i) for i in range(DEPTH)):
    y = norm(a, b + names["norm1"], x)
    y = attend(*(dense(a, b + name, y) for name in names["attention"]))
    x = x + a.get(f"{b}layer_scale1.lambda1", 1.0) * dense(a, b + names["out"], y)
    y = act(dense(a, b + names["fc1"], norm(a, b + names["norm2"], x)))
    x = x + a.get(f"{b}layer_scale2.lambda1", 1.0) * dense(a, b + names["fc2"], y)
  x = norm(a, names["norm"], x)
  if kind.startswith("Siglip") and not heads:
    weight, bias = a["head.attention.in_proj_weight"], a["head.attention.in_proj_bias"]
    probe = np.tile(a["head.probe"], (n, 1, 1))
    q, k, v = (
      t @ weight[i * D : (i + 1) * D].T + bias[i * D : (i + 1) * D]
      for i, t in enumerate((probe, x, x))
    )
    x = dense(a, "head.attention.out_proj", attend(q, k, v))
    x = x + dense(a, "head.mlp.fc2", act(dense(a, "head.mlp.fc1", norm(a, "head.layernorm", x))))
    return x[:, 0]
  if kind.startswith("Siglip"):
    return dense(a, "classifier", x.mean(1))
  if len(heads) == 2:
    return (dense(a, "cls_classifier", x[:, 0]) + dense(a, "distillation_classifier", x[:, 1])) / 2
  if kind.startswith("Dinov2") and heads:
    x = np.concatenate([x[:, 0], x[:, 1 + registers.shape[1] :].mean(1)], -1)
    return dense(a, "classifier", x)
  return dense(a, next(iter(heads)), x[:, 0]) if heads else x[:, 0]


def pixels(hw=(IMAGE, IMAGE)):
  return np.random.default_rng(1).uniform(-1, 1, (2, *hw, 3)).astype(np.float32)


def logits(model, params, image):
  with jax.default_matmul_precision("highest"):
    return np.asarray(jax.jit(lambda p, x: model.apply({"params": p}, x)[0])(params, image))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_source(tmp_path, kind):
  config, arrays = make(kind)
  model, params, record = weights.load_with_record(save(tmp_path / "model", config, arrays))
  want = forward(kind, arrays, pixels())
  assert want.std() > 0.1
  np.testing.assert_allclose(logits(model, params, pixels()), want, rtol=0, atol=2e-6)
  assert record["source"] == {
    "file": "model",
    "format": f"transformers folder, {config['model_type']}",
  }
  assert record["image_size"] == [IMAGE, IMAGE] and record["native_grid"] == [4, 4]
  assert model.kernel_operator == model.grid_operator == "cubic_antialias"


@pytest.mark.parametrize("kind", KINDS)
def test_every_array_counts_but_those_that_are_noted(kind):
  config, arrays = make(kind)
  before = converted(config, arrays)
  ignored = set()
  for name, array in arrays.items():
    flat = converted(config, arrays | {name: np.float32(1) + array}).flat
    changed = [n for n in flat if not np.array_equal(flat[n], before.flat[n])]
    if not changed:
      ignored.add(name)
  noted = {n for n in arrays if n.startswith(("text_model.", "logit_scale"))}
  if kind == "SiglipForImageClassification":
    noted |= {n for n in arrays if n.startswith("vision_model.head.")}
  assert ignored == noted
  notes = " ".join(before.notes)
  assert ("2 arrays of the text tower and of the loss" in notes) == (len(noted) >= 2)
  assert ("pooling head is left out" in notes) == (len(noted) > 2)
  assert ("LayerScale is folded" in notes) == kind.startswith("Dinov2")


@pytest.mark.parametrize("kind", KINDS)
def test_names_with_and_without_the_beginning_are_the_same_model(kind):
  config, arrays = make(kind)
  _, bare = make(kind, prefix="")
  want, got = (converted(config, a).flat for a in (arrays, bare))
  assert want.keys() == got.keys()
  for name in want:
    np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_all_differences_are_listed_in_their_names(tmp_path, kind):
  _, names, prefix, _, _ = KINDS[kind]
  config, arrays = make(kind)
  one, last = (prefix + names["block"].format(i) for i in (0, 1))
  arrays[f"{last}gain"] = arrays.pop(f"{last}{names['norm2']}.weight")
  arrays["stranger"] = np.zeros(3, np.float32)
  fc1 = f"{one}{names['fc1']}.weight"
  arrays[fc1] = np.ascontiguousarray(arrays[fc1].T)
  out = f"{one}{names['out']}.bias"
  arrays[out] = arrays[out].astype(np.float64)
  half = f"{last}{names['out']}.bias"
  arrays[half] = arrays[half].astype(np.float16)  # widened: no difference
  kernel = f"{prefix}{names['patch']}.weight"
  arrays[kernel] = arrays[kernel][:, :, :3, :3]
  with pytest.raises(UserError) as error:
    weights.load(save(tmp_path / "model", config, arrays))
  first, *lines = str(error.value).splitlines()
  assert first == "The arrays are not those of config.json:"
  lines = sorted(line.strip() for line in lines)
  missing = [line for line in lines if line.startswith("missing")]
  (missing,) = missing
  assert missing.startswith(f"missing {last}{names['norm2']}.weight float32[16].")
  assert [line for line in lines if line != missing] == sorted(
    [
      f"extra {last}gain float32[16]",
      "extra stranger float32[3]",
      f"{fc1}: expected float32[24,16], got float32[16,24]",
      f"{out}: expected float32[16], got float64[16]",
      f"{kernel}: expected float32[16,3,4,4], got float32[16,3,3,3]",
    ]
  )


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize(
  ("change", "array", "expected"),
  [
    (dict(image_size=20), "position", CELLS + 9),
    (dict(image_size=[16, 20]), "position", CELLS + 4),
    (dict(patch_size=2, image_size=8), "patch", "[16,3,2,2]"),
    (dict(patch_size=[4, 2], image_size=[16, 8]), "patch", "[16,3,4,2]"),
    (dict(num_channels=1), "patch", "[16,1,4,4]"),
  ],
)
def test_sizes_in_config_json_must_be_those_of_the_arrays(kind, change, array, expected):
  _, names, prefix, tokens, _ = KINDS[kind]
  name = prefix + names[array] + (".weight" if array == "patch" else "")
  config, arrays = make(kind, **change)
  if array == "position":
    lead = "" if names is CLIP else "1,"
    expected = f"[{lead}{expected + tokens},16]"
  with pytest.raises(UserError) as error:
    converted(config, arrays)
  lines = [line.strip() for line in str(error.value).splitlines()[1:]]
  assert [line.partition(", got")[0] for line in lines] == [f"{name}: expected float32{expected}"]


@pytest.mark.parametrize("kind", ONE_OF_EACH)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_number_of_blocks_must_be_that_of_the_arrays(kind, depth):
  _, names, prefix, _, _ = KINDS[kind]
  config, arrays = make(kind, num_hidden_layers=depth)
  block = prefix + names["block"].format(min(depth, 2))
  with pytest.raises(UserError) as error:
    converted(config, arrays)
  lines = [line.strip().split()[1] for line in str(error.value).splitlines()[1:]]
  assert len(lines) >= 16 and all(line.startswith(block) for line in lines)


def test_a_number_of_blocks_that_cannot_be_takes_no_memory():
  config, arrays = make("ViTModel", num_hidden_layers=10**12)
  with pytest.raises(UserError, match="num_hidden_layers=1000000000000; there are 38 arrays"):
    converted(config, arrays)


def test_a_rectangle_has_its_own_grid(tmp_path):
  config, arrays = make("ViTForImageClassification", image_size=[8, 32])
  model, params = weights.load(save(tmp_path / "model", config, arrays))
  assert model.posemb_size == (2, 8)
  want = forward("ViTForImageClassification", arrays, pixels((8, 32)))
  np.testing.assert_allclose(logits(model, params, pixels((8, 32))), want, rtol=0, atol=2e-6)


def test_pixels_that_no_patch_covers_are_noted(tmp_path):
  config, arrays = make("SiglipVisionModel", image_size=18)
  _, _, record = weights.load_with_record(save(tmp_path / "model", config, arrays))
  assert record["image_size"] == [16, 16]
  assert any("only the (16, 16) at its top left" in note for note in record["notes"])


def test_biases_of_queries_keys_and_values_may_be_missing_as_config_json_says(tmp_path):
  config, arrays = make("ViTModel", qkv_bias=False)
  biases = [n for n in arrays if n.endswith(("query.bias", "key.bias", "value.bias"))]
  with pytest.raises(UserError, match=f"extra {biases[0]}"):
    converted(config, arrays)
  arrays = {n: a for n, a in arrays.items() if n not in biases}
  model, params = weights.load(save(tmp_path / "model", config, arrays))
  want = forward("ViTModel", arrays, pixels())
  np.testing.assert_allclose(logits(model, params, pixels()), want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["ViTModel", "DeiTModel"])
def test_the_pooler_and_the_mask_token_are_left_out_and_noted(kind):
  config, arrays = make(kind)
  want = converted(config, arrays)
  more = {
    "pooler.dense.weight": np.ones((D, D), np.float32),
    "pooler.dense.bias": np.ones(D, np.float32),
    "embeddings.mask_token": np.ones((1, 1, D), np.float32),
  }
  got = converted(config, arrays | more)
  assert got.flat.keys() == want.flat.keys()
  assert any("pooler" in n for n in got.notes) and any("mask_token" in n for n in got.notes)
  del more["pooler.dense.bias"]
  with pytest.raises(UserError, match=r"missing pooler\.dense\.bias"):
    converted(config, arrays | more)
  config, arrays = make("ViTForImageClassification")
  with pytest.raises(UserError, match=r"extra vit\.pooler\.dense\.weight"):
    converted(config, arrays | {"vit.pooler.dense.weight": np.zeros((D, D))})


def test_dinov2s_mask_token_has_its_own_shape():
  config, arrays = make("Dinov2Model")
  good = {"embeddings.mask_token": np.zeros((1, D), np.float32)}
  assert any("mask_token" in n for n in converted(config, arrays | good).notes)
  bad = {"embeddings.mask_token": np.zeros((1, 1, D), np.float32)}
  with pytest.raises(UserError, match=r"mask_token: expected float32\[1,16\], got float32\[1,1"):
    converted(config, arrays | bad)


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_old_files_number_the_positions_in_an_array(kind):
  config, arrays = make(kind)
  want = converted(config, arrays).flat
  name = "vision_model.embeddings.position_ids"
  ids = np.arange(CELLS + KINDS[kind][3])[None]
  got = converted(config, arrays | {name: ids}).flat
  assert got.keys() == want.keys()
  with pytest.raises(UserError, match=f"{name}: expected 0, 1, 2, "):
    converted(config, arrays | {name: ids[:, ::-1]})
  with pytest.raises(UserError, match=f"{name}: expected int64"):
    converted(config, arrays | {name: ids[:, :-1]})


def test_half_precision_is_widened(tmp_path):
  config, arrays = make("CLIPModel")
  half = {n: a.astype(np.float16) for n, a in arrays.items()}
  _, params = weights.load(save(tmp_path / "half", config, half))
  wide = {n: a.astype(np.float32) for n, a in half.items()}
  _, want = weights.load(save(tmp_path / "wide", config, wide))
  jax.tree.map(np.testing.assert_array_equal, params, want)


def test_classes_have_the_names_of_config_json(tmp_path):
  config, arrays = make("ViTForImageClassification")
  _, _, record = weights.load_with_record(save(tmp_path / "a", config, arrays))
  assert "class_names" not in record
  named = config | {"id2label": {str(i): f"bird {i}" for i in range(CLASSES)}}
  _, _, record = weights.load_with_record(save(tmp_path / "b", named, arrays))
  assert record["class_names"] == [f"bird {i}" for i in range(CLASSES)]


def test_a_given_field_that_contradicts_the_arrays_is_an_error(tmp_path):
  folder = save(tmp_path / "model", *make("ViTModel"))
  with pytest.raises(UserError, match="query/kernel: expected"):
    weights.load(folder, num_heads=2)
  assert weights.load(folder, gelu="tanh")[0].gelu == "tanh"


def test_settings_that_config_json_leaves_out_are_the_defaults():
  config, arrays = make("CLIPModel")
  settings = config["vision_config"]
  settings.pop("layer_norm_eps")
  fields = converted(config, arrays).fields
  assert fields["layer_norm_eps"] == 1e-5 and fields["gelu"] == "quick"
  # An old CLIP has its settings twice, and the second ones count.
  twice = config | {"vision_config": {}, "vision_config_dict": settings}
  assert converted(twice, arrays).fields == fields


@pytest.mark.parametrize(
  ("kind", "change", "message"),
  [
    ("ViTModel", {"model_type": None}, "no model_type.*Supported model types: clip, clip_vision"),
    ("ViTModel", {"model_type": "vit_mae"}, "Unknown model_type .*'vit_mae'; known: clip, clip_v"),
    ("ViTModel", {"model_type": ["vit"]}, "Unknown model_type"),
    ("SiglipModel", {"model_type": "siglip2"}, "siglip2.*NaFlex.*not supported"),
    ("SiglipVisionModel", {"model_type": "siglip2_vision_model"}, "NaFlex"),
    ("SiglipVisionModel", {"vision_use_head": False}, "no pooled output"),
    ("Dinov2Model", {"use_swiglu_ffn": True}, "use_swiglu_ffn=true.*not supported"),
    ("ViTModel", {"hidden_act": "relu"}, "Unknown hidden_act .*'relu'; known: gelu, gelu_new"),
    ("ViTModel", {"architectures": ["ViTForMaskedImageModeling"]}, "Unknown architecture .*ViTFor"),
    ("CLIPModel", {"architectures": ["CLIPForImageClassification"]}, "known: CLIPModel"),
    ("ViTModel", {"architectures": None}, "architectures=None; expected a list with one of ViTM"),
    ("ViTModel", {"architectures": [{}]}, "Unknown architecture"),
    ("ViTModel", {"hidden_size": "16"}, "hidden_size='16'; expected a whole number"),
    ("ViTModel", {"pooler_output_size": "a"}, "pooler_output_size='a'; expected a whole number"),
    ("ViTModel", {"num_hidden_layers": True}, "num_hidden_layers=True; expected a whole number"),
    (
      "ViTModel",
      {"num_attention_heads": 3},
      "hidden_size=16, no multiple of num_attention_heads=3",
    ),
    ("ViTModel", {"layer_norm_eps": 0}, "layer_norm_eps=0; expected a number > 0"),
    ("ViTModel", {"image_size": [32, 32, 3]}, "image_size=.*expected pixels"),
    ("ViTModel", {"patch_size": 17}, "no whole patch fits"),
    ("ViTForImageClassification", {"id2label": [1]}, "id2label=.*expected names by number"),
    ("CLIPModel", {"vision_config": 3}, "vision_config=3; expected an object"),
    ("DeiTForImageClassificationWithTeacher", {"id2label": {}}, "two heads needs classes"),
  ],
)
def test_what_config_json_cannot_say_is_an_error(tmp_path, kind, change, message):
  config, arrays = make(kind)
  config = {k: v for k, v in (config | change).items() if k != "model_type" or v is not None}
  with pytest.raises(UserError, match=message):
    weights.load(save(tmp_path / "model", config, arrays))


def test_mean_and_std_of_the_preprocessor_are_folded_unless_others_are_given(tmp_path):
  config, arrays = make("ViTModel")
  folder = save(tmp_path / "model", config, arrays)
  plain, before, record = weights.load_with_record(folder)
  assert any("Nothing beside model says the input's mean" in n for n in record["notes"])
  assert "folded_input" not in record
  mean, std = [0.48, 0.45, 0.4], [0.22, 0.23, 0.27]
  (folder / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": mean, "image_std": std})
  )
  model, params, record = weights.load_with_record(folder)
  want = forward("ViTModel", arrays, ((pixels() + 1) / 2 - mean) / std)
  np.testing.assert_allclose(logits(model, params, pixels()), want, rtol=0, atol=5e-6)
  assert record["folded_input"] == {"mean": mean, "std": std}
  assert not any("Nothing beside" in n for n in record["notes"])
  half = [0.5] * 3
  same, params, record = weights.load_with_record(folder, mean=half, std=half)
  assert same == plain and record["folded_input"]["mean"] == half
  jax.tree.map(np.testing.assert_array_equal, params, before)


def test_the_weights_alone_are_read_as_the_folder_is(tmp_path):
  folder = save(tmp_path / "model", *make("ViTModel"))
  (folder / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": [0.4] * 3, "image_std": [0.3] * 3})
  )
  model, params, record = weights.load_with_record(folder / "model.safetensors")
  same, want, whole = weights.load_with_record(folder)
  assert model == same and record["pp"] == whole["pp"] and record["input"] == whole["input"]
  jax.tree.map(np.testing.assert_array_equal, params, want)
  assert "model.safetensors is read with model/config.json." in record["notes"]


@pytest.mark.full
def test_a_folder_converts_with_a_certificate_of_its_own_input(tmp_path):
  folder = save(tmp_path / "model", *make("Dinov2ForImageClassification"))
  mean, std = [0.48, 0.45, 0.4], [0.22, 0.23, 0.27]
  (folder / "preprocessor_config.json").write_text(
    json.dumps({"image_mean": mean, "image_std": std})
  )
  rows = conversion.convert(folder, tmp_path / "out.npz", num_heads=HEADS)
  (native,) = (row for row in rows if row.seqhw == 4)
  assert 0 < native.difference < 1e-5  # the source is not folded, so there is some rounding
  _, _, record = weights.load_with_record(tmp_path / "out.npz")
  assert record["folded_input"] == {"mean": mean, "std": std}
  # Read again it is folded already: neither twice nor unknowingly.
  rows = conversion.convert(tmp_path / "out.npz", tmp_path / "again.npz")
  assert all(row.difference == 0 for row in rows)
  with pytest.raises(UserError, match="folded into this file already"):
    weights.load(tmp_path / "out.npz", mean=mean, std=std)


def test_a_model_that_is_not_supported_is_refused_before_its_arrays_are_read(tmp_path):
  config, arrays = make("ViTModel")
  folder = save(tmp_path / "model", config | {"model_type": "llama"}, arrays)
  (folder / "model.safetensors").write_bytes(b"not even arrays")
  with pytest.raises(UserError, match="Unknown model_type"):
    weights.load(folder)


@pytest.mark.parametrize(
  ("kind", "projection"),
  [("CLIPVisionModelWithProjection", True), ("ViTForImageClassification", None)],
)
def test_a_record_says_that_a_projection_is_no_classifier(tmp_path, kind, projection):
  _, _, record = weights.load_with_record(save(tmp_path / "model", *make(kind)))
  assert record.get("projection") is projection


def test_flexified_it_keeps_what_it_was(tmp_path):
  folder = save(tmp_path / "model", *make("ViTModel"))
  model, params, record = weights.load_with_record(folder, flexify=((16, 16), (7, 7)))
  assert model.patch_size == (16, 16) and params["pos_embedding"].shape == (1, 49, D)
  assert record["flexified_from"] == {"patch_size": [4, 4], "grid": [4, 4]}
  assert trees.count(params) > 0


WRAPPERS = ("module.", "_orig_mod.", "model.", "encoder.", "vit.", "module._orig_mod.student.")


@pytest.mark.parametrize(
  ("bare", "kind"),
  [(True, "ViTModel"), (True, "CLIPModel")]
  + [(False, kind) for kind in KINDS]
  + [
    pytest.param(True, k, marks=pytest.mark.full)
    for k in KINDS
    if k not in ("ViTModel", "CLIPModel")
  ],
)
def test_wrapped_folders_are_the_same_model(tmp_path, kind, bare):
  config, arrays = make(kind, **({"prefix": ""} if bare else {}))
  _, want = weights.load(save(tmp_path / "plain", config, arrays))
  block = VIT["block"] if "vit.encoder.layer" in " ".join(arrays) else None
  wrapper = WRAPPERS[(len(kind) + bare) % len(WRAPPERS)]
  wrapped = {}
  for name, array in arrays.items():
    inside = name if block is None else name.replace("layer.1.", "layer.1._orig_mod.")
    wrapped[wrapper + inside] = array
    wrapped[f"ema.{inside}"] = np.asarray(array + np.float32(1))
  folder = save(tmp_path / "wrapped", config, wrapped)
  for path in (folder, folder / "model.safetensors"):
    _, got, record = weights.load_with_record(path)
    assert wrapper in " ".join(record["notes"])
    assert any("--ema" in note for note in record["notes"])
    jax.tree.map(np.testing.assert_array_equal, got, want)
    _, averaged = weights.load(path, ema=True)
    scale = averaged["Transformer"]["encoder_norm"]["scale"]
    np.testing.assert_array_equal(scale, want["Transformer"]["encoder_norm"]["scale"] + 1)
