"""A cache of what teachers said: no bit of a run changes, no teacher runs, and nothing else is read for it."""

import contextlib
import copy
import functools
from pathlib import Path

import jax
import numpy as np
import pytest

from flexivit_jax import errors, experiment, train as train_lib, weights
from flexivit_jax.experiment import preparation
from flexivit_jax.objectives import losses
from flexivit_jax.running import metrics_writer
from flexivit_jax.training import teachers
from flexivit_jax.training.teachers import TeacherCache

FIELDS = dict(patch_size=(4, 4), posemb_size=(3, 3), width=8, depth=1, mlp_dim=8, num_heads=2)
TEACHER = dict(FIELDS, num_classes=3, width=16)
CONFIG = dict(
  total_steps=4,
  log_every=2,
  accumulate=2,
  input=dict(
    data=dict(name="synthetic", image_size=12, num_classes=3, num_examples=16, split="train"),
    pp="decode|flip_lr|value_range(-1, 1)|onehot(3)|keep('image', 'labels')",
    batch_size=4,
    threads=0,
  ),
  model=FIELDS,
  flexi=dict(seqhw=dict(v=(2,))),
  objective=dict(
    name="distill", teachers=dict(prof=dict(model=TEACHER, seqhw=6)), mixup_p=0.5, label_weight=0.5
  ),
  optim=dict(lr=1e-2),
  checkpoint=dict(every_steps=2, keep=None),
)


def changed(**values):
  """The config with other values; "a__b=c" is the key a.b."""
  config = copy.deepcopy(CONFIG)
  for key, value in values.items():
    *sections, last = key.split("__")
    functools.reduce(lambda node, name: node[name], sections, config)[last] = value
  return config


def outcome(run):
  """Everything that a run's training made: parameters and numbers of each step."""
  rows = metrics_writer.read_rows(run / "metrics.jsonl")
  return weights.load(run)[1], [(r["seqhw"], r["loss"], r["grad_norm"]) for r in rows]


def same(run, other):
  jax.tree.map(np.testing.assert_array_equal, *map(outcome, (run, other)))


def steps_of(cache):
  return sorted(int(file.stem) for file in cache.rglob("*.npz"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  """A run without a cache."""
  return train_lib.train(CONFIG, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """(cache, the run that made it)."""
  folder = tmp_path_factory.mktemp("written")
  cache = folder / "cache"
  run = train_lib.train(changed(teacher_cache=str(cache)), folder / "run")
  return cache, run


def forbid(monkeypatch):
  """From now on no program of teachers can be compiled, so none can run."""
  monkeypatch.setattr(teachers, "compilation", None)


def test_writing_a_cache_changes_no_bit(plain, written):
  cache, run = written
  same(plain, run)
  assert steps_of(cache) == [0, 1, 2, 3] and not list(cache.rglob("*.tmp"))


def test_a_cached_run_is_bit_for_bit_the_live_one_and_has_no_teacher(
  plain, written, tmp_path, monkeypatch, capsys
):
  forbid(monkeypatch)
  run = train_lib.train(changed(teacher_cache=str(written[0])), tmp_path / "run")
  same(plain, run)
  said = capsys.readouterr().err
  assert "compiled teachers" not in said and "of all steps are in" in said
  with pytest.raises(AttributeError, match="NoneType"):  # so that it could have failed
    train_lib.train(changed(teacher_cache=str(tmp_path / "empty")), tmp_path / "live")


def test_nothing_of_the_teachers_but_their_logits_outlives_a_call():
  """Neither their activations, which are their program's own, nor what they saw."""
  exp, mesh = preparation.place(experiment.from_config(CONFIG))
  taught = preparation.teacher_logits(exp, 0, mesh, contextlib.ExitStack().enter_context)
  batch = {"image": np.ones((4, 12, 12, 3), np.float32)}
  step = jax.numpy.int32(0)
  before = {id(x) for x in jax.live_arrays()}
  logits = jax.block_until_ready(taught(0, batch, step))
  left = [x.shape for x in jax.live_arrays() if id(x) not in before]
  assert left == [x.shape for x in jax.tree.leaves(logits)] == [(4, 3)]


@pytest.mark.full
def test_another_student_reads_the_same_cache(plain, written, tmp_path, monkeypatch):
  other = changed(
    flexi__seqhw=dict(v=(6,)),
    model=dict(FIELDS, pool_type="gap", dropout=0.1),
    objective__temperature=2.0,
    objective__label_weight=0.0,
    objective__distance="logsoftmax_euclidean",
    init_head_bias=1.0,
    optim=dict(lr=1e-3, name="sgd"),
    total_steps=3,
  )
  live = train_lib.train(other, tmp_path / "live")
  forbid(monkeypatch)
  cached = train_lib.train(other | dict(teacher_cache=str(written[0])), tmp_path / "cached")
  same(live, cached)
  assert outcome(live)[1] != outcome(plain)[1][:3]


@pytest.mark.full
def test_a_run_stopped_in_the_middle_goes_on_from_a_cache_with_holes(
  plain, written, tmp_path, train_until
):
  cache, config = tmp_path / "cache", changed(teacher_cache=str(tmp_path / "cache"))
  train_until(config, tmp_path / "run", 3)
  assert steps_of(cache) == [0, 1, 2]
  (hole,) = cache.rglob("000000001.npz")
  hole.unlink()
  train_lib.train(config, tmp_path / "run")  # from the checkpoint of step 2: one read, one made
  same(plain, tmp_path / "run")
  assert steps_of(cache) == [0, 2, 3]
  again = train_lib.train(config, tmp_path / "again")  # from the start: makes what is missing
  same(plain, again)
  for file in written[0].rglob("*.npz"):
    assert (cache / file.relative_to(written[0])).read_bytes() == file.read_bytes()


@pytest.mark.full
def test_a_part_of_the_logits_is_cached_as_it_is_used(plain, tmp_path, monkeypatch):
  config = changed(objective__top_k=1, teacher_cache=str(tmp_path / "cache"))
  live = train_lib.train(config, tmp_path / "live")
  forbid(monkeypatch)
  same(live, train_lib.train(config, tmp_path / "read"))
  assert outcome(live)[1] != outcome(plain)[1]  # two of three classes became one number
  with np.load(next((tmp_path / "cache").rglob("*.npz"))) as arrays:
    shapes = sorted(arrays[name].shape for name in arrays.files)
  assert shapes == [(4,), (4, 1), (4, 1)]


# --- what it refuses ---


def opened(cache, config):
  return TeacherCache(cache, experiment.from_config(config).drawn, (0, 1))


OTHER = dict(prof=dict(model=dict(TEACHER, mlp_dim=16), seqhw=6))
HEADS = dict(prof=dict(model=dict(TEACHER, num_heads=4), seqhw=6))
TWO = CONFIG["objective"]["teachers"] | {"second": dict(model=TEACHER)}


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(seed=1), "seed: 0 there, 1 here"),
    (dict(input__batch_size=8), "batch_size: 4 there, 8 here"),
    (dict(input__pp=CONFIG["input"]["pp"].replace("|flip_lr", "")), "pp: .decode.flip_lr"),
    (dict(input__on_error="skip"), "on_error: None there, 'skip' here"),
    (dict(input__data__split="test"), "data: .*'split': 'train'.* there, .*'split': 'test'.* here"),
    (dict(input__data__seed=3), "data: .*'seed': 3.* here"),
    (dict(objective__mixup_p=0.2), "mixup_p: 0.5 there, 0.2 here"),
    (dict(objective__top_k=2), "top_k: None there, 2 here"),
    (dict(accumulate=1), "accumulate: 2 there, 1 here"),
    (dict(objective__teachers=OTHER), "teachers: .*sha256.* there, .*sha256.* here"),
    (dict(objective__teachers=TWO), "teachers: .* here.*"),
    (dict(objective__teachers__prof__seqhw=3), "'size': {'seqhw': 6}.* there, .*{'seqhw': 3}"),
    # Of the same parameters, and another function of them.
    (dict(objective__teachers=HEADS), "'num_heads': 2.* there, .*'num_heads': 4.* here"),
    (dict(objective__teachers__prof__model__gelu="exact"), "'tanh'.* there, .*'exact'.* here"),
  ],
)
def test_targets_of_other_draws_or_teachers_are_refused(written, values, message):
  with pytest.raises(errors.UserError, match=rf"(?s){written[0]} was made for other.*{message}"):
    opened(written[0], changed(**values))


def test_what_the_targets_do_not_depend_on_is_not_compared(written):
  other = changed(
    total_steps=9,
    input__threads=2,
    model=dict(FIELDS, width=16),
    objective__temperature=2.0,
    objective__distance="logsoftmax_euclidean",
    objective__label_weight=0.0,
  )
  cache = opened(written[0], other)
  assert [cache.has(step) for step in range(5)] == [True] * 4 + [False]
  cache.close()


def test_a_run_with_a_cache_of_others_stops_before_it_trains(written, tmp_path):
  with pytest.raises(errors.UserError, match="seed: 0 there, 1 here"):
    train_lib.train(changed(seed=1, teacher_cache=str(written[0])), tmp_path / "run")
  assert not (tmp_path / "run").exists()  # a refused start leaves nothing
  no_teachers = changed(teacher_cache=str(written[0]), objective=dict(mixup_p=0.5))
  with pytest.raises(errors.UserError, match="the objective has no teachers; remove it"):
    experiment.from_config(no_teachers)


# --- files ---

TREE = {
  "b": np.arange(6, dtype=np.float32).reshape(2, 3),
  "a": losses.SparseLogits(
    np.float32([[1.5], [2.5]]), np.int32([[2], [0]]), np.float32([-1.0, -np.inf])
  ),
}


def filled(folder, identity=None, process=(0, 1)):
  """Returns a cache with one step of `TREE`, and its file."""
  cache = TeacherCache(folder, identity or {"seed": 0}, process)
  assert not cache.has(7)
  cache.write(7, TREE)
  cache.close()
  assert cache.has(7) and not cache.has(6)
  (file,) = folder.glob(f"process_{process[0]}_*/*/000000007.npz")
  return TeacherCache(folder, identity or {"seed": 0}, process), file


def test_a_tree_comes_back_as_it_was(tmp_path):
  cache, _ = filled(tmp_path / "cache")
  got = cache.read(7, TREE)
  assert jax.tree.structure(got) == jax.tree.structure(TREE)
  jax.tree.map(np.testing.assert_array_equal, got, TREE)
  assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(TREE)]
  cache.close()


@pytest.mark.parametrize("mask", [0x01, 0xFF])
def test_no_changed_byte_changes_a_number(tmp_path, mask):
  cache, file = filled(tmp_path / "cache")
  content = file.read_bytes()
  refused = 0
  for i in range(len(content)):
    file.write_bytes(content[:i] + bytes([content[i] ^ mask]) + content[i + 1 :])
    try:
      got = cache.read(7, TREE)
    except errors.UserError as e:
      assert str(file) in str(e)
      refused += 1
    else:  # a byte that says nothing of the numbers, as a date
      jax.tree.map(np.testing.assert_array_equal, got, TREE)
  assert refused > len(content) / 2


def test_a_truncated_file_is_an_error_that_names_it(tmp_path):
  cache, file = filled(tmp_path / "cache")
  content = file.read_bytes()
  for length in range(0, len(content), 7):
    file.write_bytes(content[:length])
    with pytest.raises(errors.UserError, match=f"{file} is damaged .*; delete it, and it is made"):
      cache.read(7, TREE)


def test_other_arrays_than_expected_are_an_error(tmp_path):
  cache, file = filled(tmp_path / "cache")
  wider = TREE | {"b": np.zeros((2, 4), np.float32)}
  with pytest.raises(errors.UserError, match=rf"{file} holds float32\[2, 3\], expected float32\[2"):
    cache.read(7, wider)
  with pytest.raises(errors.UserError, match=r"holds float32.*expected int32"):
    cache.read(7, TREE | {"b": np.zeros((2, 3), np.int32)})
  with pytest.raises(errors.UserError, match=f"{file} is damaged"):
    cache.read(7, TREE | {"c": np.zeros(2)})


def test_an_identity_that_cannot_be_read_is_an_error_that_names_it(tmp_path):
  filled(tmp_path / "cache")
  about = tmp_path / "cache" / "cache.json"
  for content in (b"", b'{"seed": ', b"\xff\xfe", b"7"):
    about.write_bytes(content)
    with pytest.raises(errors.UserError, match=rf"{about} is damaged"):
      TeacherCache(tmp_path / "cache", {"seed": 0}, (0, 1))


def test_each_process_has_its_own_part_and_another_number_of_them_its_own_files(tmp_path):
  first, a = filled(tmp_path / "cache", process=(0, 2))
  _, b = filled(tmp_path / "cache", process=(1, 2))
  assert a.parent != b.parent and a.read_bytes() == b.read_bytes()
  alone = TeacherCache(tmp_path / "cache", {"seed": 0}, (0, 1))
  assert first.has(7) and not alone.has(7)


def test_a_write_that_fails_is_not_silent(tmp_path):
  (tmp_path / "cache").write_text("a file in the place of the folder")
  cache = TeacherCache(tmp_path / "cache", {"seed": 0}, (0, 1))
  cache.write(0, TREE)
  with pytest.raises(OSError, match="cache"):
    cache.close()


# --- many devices ---


def train_with_cache(folder: str) -> Path:
  """A run on all devices there are."""
  config = changed(
    input__batch_size=16,
    total_steps=2,
    optim=dict(lr=0.1, name="sgd"),  # Adam would make much of gradients that are all but zero
    teacher_cache=f"{folder}/cache",
  )
  return train_lib.train(config, Path(folder) / f"run_{len(list(Path(folder).glob('run_*')))}")


def train_twice(folder: str) -> None:
  """The same run twice, the second without teachers."""
  assert jax.device_count() == 8
  first = train_with_cache(folder)
  teachers.compilation = None
  same(first, train_with_cache(folder))


@pytest.mark.full
def test_eight_devices_write_what_one_writes_and_read_what_they_wrote(tmp_path, on_eight_devices):
  eight, one = tmp_path / "eight", tmp_path / "one"
  on_eight_devices(train_twice, str(eight))
  train_with_cache(str(one))
  files = sorted(file.relative_to(one) for file in (one / "cache").rglob("*.npz"))
  assert len(files) == 2
  for file in files:
    with np.load(one / file) as a, np.load(eight / file) as b:
      assert a.files == b.files and a["0"].shape == (16, 3) and np.ptp(a["0"], axis=0).min() > 1e-3
      np.testing.assert_allclose(b["0"], a["0"], rtol=0, atol=5e-6)
  params, rows = zip(*(outcome(folder / "run_0") for folder in (one, eight)), strict=True)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-5), *params)
  np.testing.assert_allclose(rows[1], rows[0], rtol=1e-5)
