"""Published names lead to files, are fetched once, and what arrives must be what was published."""

import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexivit_jax import cli, trees, weights
from flexivit_jax.errors import UserError
from flexivit_jax.models import FlexiViT, flexivit, vit
from flexivit_jax.running import exit_codes
from flexivit_jax.weights import registry

FIELDS = dict(num_classes=5, patch_size=(8, 8), width=16, depth=2, mlp_dim=24, num_heads=4)
# As in big_vision's models/proj/flexi/vit.py, below gs://big_vision/flexivit/.
VANITY_NAMES = {
  "FlexiViT-L i1k": "flexivit_l_i1k.npz",
  "FlexiViT-B i1k": "flexivit_b_i1k.npz",
  "FlexiViT-S i1k": "flexivit_s_i1k.npz",
  "FlexiViT-B i21k 90ep": "flexivit_b_i21k_90ep.npz",
  "FlexiViT-B i21k 300ep": "flexivit_b_i21k_300ep.npz",
  "FlexiViT-B i21k 1000ep": "flexivit_b_i21k_1000ep.npz",
  "ViT-B/16 i21k": "vit_b16_i21k_300ep.npz",
  "ViT-B/30 i21k": "vit_b30_i21k_300ep.npz",
}
# As in timm's models/vision_transformer.py.
TIMM_NAMES = {
  "flexivit_base.patch16_in21k": "vit_b16_i21k_300ep.npz",
  "flexivit_base.patch30_in21k": "vit_b30_i21k_300ep.npz",
  "flexivit_base.300ep_in21k": "flexivit_b_i21k_300ep.npz",
  "flexivit_base.1000ep_in21k": "flexivit_b_i21k_1000ep.npz",
}
for _size in ("small", "base", "large"):
  for _epochs, _suffix in ((1200, ""), (600, "_600ep"), (300, "_300ep")):
    TIMM_NAMES[f"flexivit_{_size}.{_epochs}ep_in1k"] = f"flexivit_{_size[0]}_i1k{_suffix}.npz"


@pytest.fixture
def tiny(site, tmp_path, monkeypatch):
  """Publishes a tiny model under three names; returns its parameters by name."""
  model = FlexiViT(**FIELDS)
  shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
  rng = np.random.default_rng(0)
  flat = {n: rng.normal(size=a.shape).astype(np.float32) for n, a in trees.flatten(shapes).items()}
  np.savez(tmp_path / "tiny.npz", **{f"params/{name}": a for name, a in flat.items()})
  site.content = (tmp_path / "tiny.npz").read_bytes()
  publish(monkeypatch, site, pool_type="tok", posemb_size=(7, 7), **FIELDS)
  monkeypatch.setenv("FLEXIVIT_CACHE", str(tmp_path / "cache"))
  return flat


def publish(monkeypatch, site, **expected):
  file = registry.Published(
    "Tiny/8 i1k", f"{site.url}/tiny_i1k.npz", expected, "A note.", "tiny.in1k"
  )
  for name in ("Tiny/8 i1k", "tiny_i1k", "tiny.in1k"):
    monkeypatch.setitem(registry.PUBLISHED, name, file)


def test_the_names_lead_where_their_projects_say():
  files = {name: pathlib.PurePosixPath(p.url).name for name, p in registry.PUBLISHED.items()}
  published = VANITY_NAMES | TIMM_NAMES
  published |= {f.removesuffix(".npz"): f for f in published.values()}
  published |= {f"flexivit_{s}_i1k_90ep": f"flexivit_{s}_i1k_90ep.npz" for s in "sbl"}
  assert files == published
  for file in registry.PUBLISHED.values():
    assert file.url.startswith("https://storage.googleapis.com/big_vision/flexivit/")
    assert file.timm == "" or TIMM_NAMES[file.timm] == file.url.rpartition("/")[2]
    assert bool(file.timm) == ("timm's file" in file.note)


def test_what_is_expected_is_a_model():
  for name, file in registry.PUBLISHED.items():
    model = FlexiViT(**file.expected)
    flexivit.check_fields(model)
    registry.check(file, model, pathlib.Path("w.npz"))
    assert model.num_classes == (21843 if "21k" in name else 1000), name
    width = {"s": 384, "b": 768, "l": 1024}[file.url.rpartition("/")[2].split("_")[1][0]]
    assert model.width == width == vit.VARIANTS[file.expected["variant"]].width
    assert file.expected.get("patch_size") == ((32, 32) if "baseline" in file.note else None)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_a_published_name_loads(site, tiny, kind):
  model, params, record = weights.load_with_record(kind("Tiny/8 i1k"))
  assert model == FlexiViT(**FIELDS)
  for name, array in trees.flatten(params).items():
    np.testing.assert_array_equal(array, tiny[name], err_msg=name)
  assert record["name"] == "Tiny/8 i1k" and record["url"] == f"{site.url}/tiny_i1k.npz"
  assert record["notes"] == ["A note."] and record["source"]["file"] == "tiny_i1k.npz"


def test_all_names_and_the_address_share_the_file(site, tiny):
  for name in ("Tiny/8 i1k", "tiny_i1k", "tiny.in1k", f"{site.url}/tiny_i1k.npz"):
    weights.load(name)
  assert len(site.requests) == 1


def test_options_change_the_model_not_what_is_expected(tiny):
  model, _ = weights.load("tiny_i1k", flexify=((16, 16), (8, 8)), gelu="exact")
  assert (model.patch_size, model.posemb_size, model.gelu) == ((16, 16), (8, 8), "exact")


def test_another_model_than_was_published_is_an_error_that_lists_each_field(
  site, tiny, monkeypatch
):
  publish(monkeypatch, site, variant="Ti", num_classes=1000, pool_type="tok", patch_size=(32, 32))
  with pytest.raises(UserError) as error:
    weights.load("tiny_i1k")
  first, *lines = str(error.value).splitlines()
  assert "tiny_i1k.npz is not the Tiny/8 i1k that was published" in first and "by its path" in first
  assert sorted(line.strip() for line in lines) == [
    "depth: expected 12, got 2",
    "mlp_dim: expected 768, got 24",
    "num_classes: expected 1000, got 5",
    "num_heads: expected 3, got 4",
    "patch_size: expected (32, 32), got (8, 8)",
    "width: expected 192, got 16",
  ]
  with pytest.raises(UserError, match="that was published"):
    weights.load(f"{site.url}/tiny_i1k.npz")  # its address is known too


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_an_address_loads(site, tiny, kind):
  _, params, record = weights.load_with_record(kind(f"{site.url}/some/model.npz"))
  np.testing.assert_array_equal(params["head"]["bias"], tiny["head/bias"])
  assert record["name"] == "model" and record["url"] == f"{site.url}/some/model.npz"
  assert [path for path, _ in site.requests] == ["/some/model.npz"]


def test_an_address_of_something_else_is_an_error_without_a_request(site, tiny):
  with pytest.raises(UserError, match=r"expected the address of an \.npz or \.safetensors file"):
    weights.load(f"{site.url}/weights.h5")
  assert not site.requests


def test_a_file_that_is_there_comes_before_a_published_name(site, tiny, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  pathlib.Path("tiny_i1k").write_text("")
  with pytest.raises(UserError, match=r"tiny_i1k: expected a run folder"):
    weights.load("tiny_i1k")
  assert not site.requests


@pytest.mark.parametrize(
  ("name", "nearest"),
  [
    ("FlexiViT-B 1k", "FlexiViT-B i1k"),
    ("flexivit_b_i1k_30ep", "flexivit_b_i1k_300ep"),
    ("flexivit_large.1200_in1k", "flexivit_large.1200ep_in1k"),
  ],
)
def test_a_name_that_is_not_known_is_an_error_with_the_nearest(name, nearest):
  with pytest.raises(UserError, match=rf"inspect --list` prints\. Did you mean '{nearest}'\?"):
    weights.load(name)


def test_inspect_takes_a_name_and_lists_them(tiny, site, capsys):
  assert cli.main(["inspect", "Tiny/8 i1k"]) == 0
  out = capsys.readouterr().out
  assert f"fetched from  {site.url}/tiny_i1k.npz" in out and "note: A note." in out
  assert cli.main(["inspect", "--list"]) == 0
  heading, *lines = capsys.readouterr().out.splitlines()
  assert heading.split() == ["name", "in", "timm", "classes", "address"]
  assert len(lines) == 18  # the 17 and the tiny one
  assert re.split(" {2,}", lines[4])[:2] == ["FlexiViT-B i1k", "flexivit_base.1200ep_in1k"]
  assert lines[4].split()[-2] == "1000" and lines[4].endswith("/flexivit_b_i1k.npz")
  assert len({line.index("http") for line in lines}) == 1


@pytest.mark.parametrize("args", [[], ["--list", "w.npz"]])
def test_inspect_wants_a_file_or_the_list(args, capsys):
  assert cli.main(["inspect", *args]) == exit_codes.ERROR
  assert "Give a file or a published name to inspect, or --list alone" in capsys.readouterr().err


def test_a_converted_file_says_where_it_came_from(tiny, site, tmp_path):
  out = tmp_path / "out.npz"
  assert cli.main(["convert", "Tiny/8 i1k", str(out), "--image_size=8"]) == 0
  assert len(site.requests) == 1
  certificate = json.loads((tmp_path / "out.certificate.json").read_text())
  assert certificate["source"] == "Tiny/8 i1k"
  _, _, record = weights.load_with_record(out)
  assert record["name"] == "Tiny/8 i1k" and record["url"] == f"{site.url}/tiny_i1k.npz"


def test_an_error_of_the_download_is_one_line(tiny, site, capsys):
  site.statuses = [404]
  assert cli.main(["inspect", "tiny_i1k"]) == exit_codes.ERROR
  err = capsys.readouterr().err
  assert err.count("\n") == 1 and f"{site.url}/tiny_i1k.npz: the server answers 404" in err
