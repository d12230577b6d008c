"""`flexivit plan`: what it says is right, it finds what is wrong, and it touches nothing."""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from flexivit_jax import cli, config, data, errors, experiment, trees
from flexivit_jax.devices import compilation, sharding
from flexivit_jax.experiment import costs
from flexivit_jax.models import FlexiViT
from flexivit_jax.models.flops import gmacs
from flexivit_jax.training import steps

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
# Configs whose data have no known size are planned with them.
OWN_DATA = (
  "folder", "flexilit_emoji", "segmenter_camvid", "segment_folder", "detect_bccd", "detect_emoji",
  "detect_folder"
)  # fmt: skip
NAMES = sorted(
  f.stem for f in CONFIGS.glob("*.py") if f.stem not in ("__init__", "common", *OWN_DATA)
)
GRIDS = (5, 6, 8, 10, 12, 15, 16, 20, 24, 30)
# GMACs at 240 pixels with the class token: derived from the architecture; at patch 16 they agree with timm's counts.
GMACS = {
  "S": (0.62, 0.86, 1.49, 2.30, 3.34, 5.34, 6.13, 10.06, 15.39, 26.68),
  "B": (2.35, 3.30, 5.73, 8.90, 12.84, 20.27, 23.18, 37.16, 55.28, 91.62),
  "L": (8.06, 11.42, 20.01, 31.18, 45.0, 70.94, 81.03, 129.2, 190.8, 312.2),
}
PARAMETERS = {"S": 22.06, "B": 86.59, "L": 304.36}  # millions, at patch 16 of 240 pixels: timm


def load(spec, *overrides):
  name, _, arg = spec.partition(":")
  return config.load(f"{CONFIGS / name}.py:{arg}", ["input.data.data_dir=/nowhere", *overrides])


def small(spec, *overrides):
  """A config with only its coarsest and finest size, which lowers faster."""
  settings = load(spec, *overrides)
  sizes = settings["flexi"]["seqhw"]["v"]
  return {**settings, "flexi": {"seqhw": {"v": tuple(dict.fromkeys((sizes[0], sizes[-1])))}}}


@pytest.mark.parametrize("variant", GMACS)
def test_gmacs_at_ten_sizes_are_those_of_the_papers_models(variant):
  model = FlexiViT(num_classes=1000, variant=variant)
  got = [gmacs(model, {"image": (240, 240, 3)}, seqhw=seqhw) for seqhw in GRIDS]
  assert got == pytest.approx(GMACS[variant], rel=0.01)


@pytest.mark.parametrize("variant", PARAMETERS)
def test_parameters_at_patch_16_are_timms(variant):
  """With the position grid of that patch size, 15x15, as timm stores these models; a 7x7 grid has fewer."""
  model = FlexiViT(num_classes=1000, variant=f"{variant}/16", posemb_size=(15, 15))
  params = jax.eval_shape(lambda: steps.init_params(model, {"image": (240, 240, 3)}, seed=0))
  assert trees.count(params) / 1e6 == pytest.approx(PARAMETERS[variant], abs=0.01)


@pytest.mark.parametrize(
  "spec",
  ["i1k_distill:variant=S", pytest.param("i21k_sup:sizes=coarse_to_fine", marks=pytest.mark.full)],
)
def test_training_alone_costs_what_all_costs_say(spec):
  settings = load(spec)
  assert costs.training_flops(settings) == costs.costs(settings)["training_flops"]


@pytest.mark.parametrize("name", ["miniature"])
def test_a_config_is_planned_without_its_data(name):
  made = costs.plan(small(name), meshes=(1, 8))
  assert made["lowered"] == {"8": "2 training steps lowered"}
  assert sum(s["share_of_steps"] for s in made["sizes"]) == pytest.approx(1)
  json.dumps(made, allow_nan=False)


def test_vectors_of_names_that_are_not_here_are_random_ones_of_their_length():
  pp = "decode|sample_queries(4, 2)|query_vectors('nowhere.npz')"
  test = {"type": "detection", "pp": "decode", "vectors": "nowhere.npz"}
  model = {"name": "owl_vit", "query_length": 384}
  made = costs.on_accelerator({"model": model, "input": {"pp": pp}, "evals": {"test": test}})
  assert made["input"]["pp"] == pp.replace("nowhere.npz", "random:384")
  assert made["evals"]["test"] == test | {"vectors": "random:384"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_config_is_planned(name):
  settings = small(name) if name != "digits" else config.load(f"{CONFIGS / name}.py")
  made = costs.plan(settings)
  n = len(settings["flexi"]["seqhw"]["v"])
  divides = [m for m in (8, 32) if settings["input"]["batch_size"] % m == 0]
  assert [made["lowered"][str(m)] for m in divides] == [f"{n} training steps lowered"] * len(
    divides
  )


def test_steps_flops_and_hours_of_the_small_distillation():
  """A step is three passes of the student and one of the teacher, 15.5 GMACs at 384 px; the steps are the paper's."""
  made = costs.plan(small("i1k_distill"), utilisation=0.5, meshes=(1,))
  assert made["steps"] == 111_477
  student = (GMACS["S"][0] + GMACS["S"][-1]) / 2
  want = 2e9 * (3 * student + 15.52) * 1024 * 111_477
  assert made["training_flops"] == pytest.approx(want, rel=0.01)
  hours = made["hours"]["8xH100"]["training"]
  assert hours == pytest.approx(want / (8 * 989e12 * 0.5) / 3600, rel=0.01)
  # 50,000 images at the eleven times of every tenth (the end among them) at two sizes, without the teacher.
  settings = small("i1k_distill")
  settings["evals"] = {"test": {**settings["evals"]["test"], "seqhw": (5, 30)}}
  only = costs.plan(settings, meshes=(1,))
  assert only["evaluation_flops"] == pytest.approx(2e9 * 2 * student * 50_000 * 11, rel=0.1)


@pytest.mark.parametrize(
  ("section", "seen", "views"),
  [
    (dict(window=512, short_side=512), 512, 2),  # of 512 x 683 pixels
    (dict(window=(512, 512), short_side=512, flip=True), 512, 4),
    (dict(window=300, window_stride=100), 300, 2 * 3),  # of 375 x 500, as it is
    (dict(window=300, scales=(0.5, 1)), 300, 2 + 4),  # 188 x 250 is enlarged to 300 x 400
    (dict(scales=(0.5, 1), flip=True), 99, 2 * 1.25),
  ],
)
def test_an_evaluation_of_segmentation_costs_all_that_the_model_sees(section, seen, views):
  """Of the stand-in's images, 375 x 500 pixels."""
  section = {"type": "segmentation", "pp": "decode|keep('image', 'mask')", **section}
  source = data.planned_source(name="ade20k", split="validation")
  assert costs._views(section, source, {"image": (99, 99, 3)}) == (
    {"image": (seen, seen, 3)},
    views,
  )


def test_activations_are_the_students_or_the_teachers_whichever_are_more():
  """Never both: the teachers are a program of their own."""
  exp = costs.planned(small("i1k_distill"), "tpu v3")
  state, mesh = costs.state_of(exp), sharding.abstract_mesh(32)
  found = costs.memory(exp, state, mesh, exp.model, 2)["activations"]
  assert found == exp.model.activation_bytes(exp.shapes, seqhw=30) * 1024 / 32 / 2
  (teacher,) = exp.teachers.values()
  assert teacher.model.dtype == "bfloat16" and teacher.model.attention == "auto:tpu v3"
  large = teacher._replace(model=teacher.model.clone(mlp_dim=2**20))
  found = costs.memory(exp._replace(teachers={"large": large}), state, mesh, exp.model, 2)
  tokens = 577  # 384 pixels at patch 16, and the class token
  assert found["activations"] == tokens * (4 * large.model.width + 4 * 2**20) * 1024 / 32 / 2


@pytest.mark.parametrize("remat", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.parametrize("seqhw", [8])
def test_activations_are_about_what_a_compiled_step_needs(remat, seqhw):
  """Within a factor of 1.3 of XLA's own figure on a CPU, which also holds the gradients (more programs: results/)."""
  settings = load(
    "cifar10", "input.data.name=synthetic", "input.data.split=train", "model.width=64"
  )
  synthetic = dict(name="synthetic", split="train", num_examples=64)
  settings["input"] |= {"data": synthetic, "batch_size": 64}
  settings |= {"evals": None, "flexi": {"seqhw": {"v": (seqhw,)}}, "total_epochs": 1000}
  settings["model"] |= {"remat": remat, "num_heads": 2, "mlp_dim": 256, "depth": 4}
  exp = experiment.from_config(settings)
  state = costs.state_of(exp)
  specs = {k: jax.ShapeDtypeStruct((64, *v), jnp.float32) for k, v in exp.shapes.items()}

  def step(state, batch):
    fields = dict(model=exp.model, objective=exp.objective, tx=exp.optimizer.tx, seed=0)
    return steps.step(state, batch, seqhw=seqhw, **fields)

  found = compilation.compile_one(step, (state, specs), "a step", donate=(0,)).temp_bytes
  estimate = 64 * exp.model.activation_bytes(exp.shapes, seqhw=seqhw) + trees.size_in_bytes(
    state.params
  )
  assert found / 1.3 < estimate < found * 1.3, (found, estimate)


def test_a_batch_that_does_not_divide_is_said():
  made = costs.plan(small("cifar10", "input.batch_size=1000"), meshes=(8, 32))
  assert made["lowered"]["8"] == "2 training steps lowered"
  assert "batch_size=1000 / accumulate=1 does not divide" in made["lowered"]["32"]


@pytest.mark.full
def test_divided_weights_are_held_sent_and_lowered():
  settings = small("cifar10", "input.batch_size=1024")
  settings["model"]["width"] = 256  # of arrays that are worth dividing
  whole = costs.plan(settings, meshes=(8, 32))
  divided = costs.plan(settings | {"mesh": {"fsdp": 8}}, meshes=(4, 8, 32))
  for kind in ("parameters", "gradients", "optimizer"):
    assert whole["memory"]["32"][kind] == whole["memory"]["8"][kind]
    assert divided["memory"]["32"][kind] < whole["memory"]["32"][kind] / 7
  # Twice gathered, once scattered, in the place of a sum: half as much again.
  assert 1.3 < divided["sent"]["8"] / whole["sent"]["8"] < 1.55
  assert divided["lowered"]["8"] == divided["lowered"]["32"] == "2 training steps lowered"
  assert divided["lowered"]["4"] == "not possible: mesh.fsdp=8 does not divide them"
  half = costs.plan(settings | {"mesh": {"fsdp": 8, "gather_dtype": "bfloat16"}}, meshes=(8,))
  assert half["lowered"]["8"] == "2 training steps lowered"
  assert 0.6 < half["sent"]["8"] / divided["sent"]["8"] < 0.75  # one third of it as it was


def test_s_is_divided_over_256_devices():
  """No axis of a block's query [384, 6, 64] is a multiple of 256, but one is of 128 and another of two."""
  settings = {**load("i1k_sup"), "mesh": {"fsdp": 256}}
  assert costs.meshes_of(settings) == (1, 8, 32, 256)
  assert costs.meshes_of({**settings, "mesh": {"fsdp": 32}}) == (1, 8, 32)
  exp = experiment.from_config(settings, opening=costs.PLANNED)
  found = costs.divided(costs.state_of(exp).params, sharding.abstract_mesh(256, fsdp=256))
  assert found["two_axes"] == 4 * 12 + 2  # with the patch embedding's kernel and the head's
  assert list(found["pieces"]) == ["256", "128", "1"]
  assert found["pieces"]["128"] == 4 * 49 * 384  # positions
  assert found["pieces"]["1"] < 2**18 < found["each"] < 0.6 * 2**20
  assert sum(found["pieces"].values()) > 86 * 2**20


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("flexi.seqhw.v=(5,7)", "seqhw=7 does not divide the image"),
    ("optim.lrr=1", "Did you mean 'optim.lr'"),
    ("input.data.name=imagenet_of_mine", "To plan, give one of .*cifar10"),
    ("model.num_classes=999", "the model has 999 classes"),
  ],
)
def test_what_is_wrong_is_an_error(override, message):
  with pytest.raises(errors.UserError, match=message):
    costs.plan(load("i1k_sup", override), meshes=(1,))


def test_known_data_sets_are_divided_as_real_ones():
  source = data.planned_source(name="imagenet2012", split="train[:99%]")
  assert (len(source), source.num_classes) == (1_268_355, 1000)
  assert (
    len(data.planned_source(name="imagenet_v2/matched-frequency:3.0.0", split="test")) == 10_000
  )
  real = data.planned_source(name="imagenet2012_real", split="validation", label_key="real_label")
  assert real[7]["label"] == (0,)
  with pytest.raises(errors.UserError, match="split"):
    data.planned_source(name="imagenet2012", split="test")


def test_attention_is_that_of_the_platform_whatever_this_machine_is(monkeypatch):
  def form(attention, platform="tpu"):
    return costs.on_accelerator({"model": {"attention": attention}}, platform)["model"]["attention"]

  assert costs.on_accelerator({"model": {}})["model"]["attention"] == "auto:tpu"
  assert form("splash") == "splash:tpu" and form("cudnn", "gpu") == "cudnn:gpu"
  assert form("cudnn") == "auto:tpu" and form("splash", "gpu") == "auto:gpu"
  assert form("auto:gpu") == "auto:gpu"
  monkeypatch.setitem(costs.MODELS, "plain", lambda num_classes: None)
  assert "attention" not in costs.on_accelerator({"model": {"name": "plain"}})["model"]


def test_command(capsys):
  arguments = ["plan", str(CONFIGS / "digits.py"), "--config.flexi.seqhw.v=(2,)"]
  assert cli.main(arguments) == 0
  out = capsys.readouterr().out
  assert "seqhw=2" in out and "v3-32" in out and "8 devices: 1 training steps lowered" in out
  assert cli.main([*arguments, "--utilisation=2"]) == 2
  assert "expected a fraction" in capsys.readouterr().err
