"""Images on their way through a cascade."""

import functools

import numpy as np
import pytest

from flexivit_jax import errors, trees
from flexivit_jax.budget.cascade import Cascade
from flexivit_jax.data.inputs import Input
from flexivit_jax.inference import cascades, predictions, predictor, programs, texts
from flexivit_jax.models import FlexiViT

SHAPE = (24, 24, 3)
N = 23


def images(n=N):
  return np.random.default_rng(0).uniform(-1, 1, (n, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def loaded(random_params):
  """A model whose files are named by a number: an image of `images`; others cannot be read."""
  model = FlexiViT(
    num_classes=5, width=32, depth=2, mlp_dim=48, num_heads=2, patch_size=(8, 8),
    posemb_size=(3, 3), head_zeroinit=False,
  )  # fmt: skip
  params = random_params(model, SHAPE)

  def prepare(name):
    if not name.isdigit():
      raise ValueError("not an image")
    return images()[int(name)]

  return predictor.Loaded(model, params, {"notes": []}, "model.npz", prepare)


def of(loaded, sizes=(2, 3, 4), thresholds=(0.0, 0.0), **fields):
  n = len(sizes)
  return Cascade(
    sizes, thresholds, (1.0,) * n, "confidence", 0.02, 0.05, (1.0,) * n, "ms", 1.0, (1 / n,) * n,
    0.0, 0.5, 0.5, 100, 0, 5, trees.digest(loaded.params), **fields,
  )  # fmt: skip


@pytest.fixture(scope="module")
def halves(loaded):
  """A cascade of which each stage stops about half of the images, at batches of 4."""
  levels = []
  for size in (2, 3):
    rows = predictor.outcomes(loaded, programs.probabilities, files(), [size], batch_size=4)
    levels.append(float(np.median([row.outputs[0].max() for row in rows])))
  return of(loaded, thresholds=tuple(levels))


def files(names=range(N)):
  return [Input(str(name)) for name in names]


def answers(loaded, cascade, inputs, batch_size=4, **kwargs):
  return list(cascades.answers(loaded, cascade, inputs, batch_size=batch_size, **kwargs))


def test_answers_come_in_order_and_are_those_of_predict_at_their_size(loaded, halves):
  found = answers(loaded, halves, files())
  assert [file for file, _ in found] == [str(i) for i in range(N)]
  assert {row.seqhw for _, (row,) in found} == {2, 3, 4}
  for file, (row,) in found:
    ((_, (alone,)),) = predictions.predictions(loaded, files([file]), [row.seqhw], batch_size=4)
    assert row == alone  # to the bit


@pytest.mark.parametrize("seed", range(2))
def test_an_answer_does_not_depend_on_what_shares_its_batch(loaded, halves, seed):
  every = dict(answers(loaded, halves, files()))
  order = np.random.default_rng(seed).permutation(N)
  assert dict(answers(loaded, halves, files(order))) == every
  some = order[:6]
  for i in some[:3]:
    assert answers(loaded, halves, files([i])) == [(str(i), every[str(i)])]
  assert dict(answers(loaded, halves, files(some))) == {str(i): every[str(i)] for i in some}


def flow_of(loaded, cascade, batch):
  """A flow, and the number of batches that each stage has run."""
  ran = [0] * len(cascade.sizes)

  def run(stage, call, batch_of_images):
    ran[stage] += 1
    assert batch_of_images.shape == (batch, *SHAPE)
    return np.asarray(call(loaded.params, batch_of_images))

  calls = [programs.call(loaded, programs.probabilities, size) for size in cascade.sizes]
  runs = [functools.partial(run, stage, call) for stage, call in enumerate(calls)]
  return cascades.Flow(cascade, runs, cascades.of_probabilities, batch), ran


def test_the_batches_of_every_stage_are_dense(loaded, halves):
  flow, ran = flow_of(loaded, halves, 4)
  found = {}
  for i, image in enumerate(images()):
    found.update(flow.put(i, image))
  found.update(flow.flush())
  assert sorted(found) == list(range(N)) and not list(flow.flush())
  answered = np.bincount([answer.stage for answer in found.values()], minlength=3)
  reached = [N, N - answered[0], answered[2]]
  assert ran == [-(-n // 4) for n in reached]


def test_few_images_wait_for_company_and_no_answer_waits_for_long(loaded, halves, monkeypatch):
  """With a limit of one batch, answers come while files are still read."""
  monkeypatch.setattr(cascades, "_WAITS", 1)
  read = []
  watched = loaded._replace(prepare=lambda name: read.append(name) or loaded.prepare(name))
  stream = cascades.answers(watched, halves, files([*range(N)] * 4), batch_size=4)
  next(stream)
  assert len(read) < 4 * N
  assert [file for file, _ in stream] == [str(i) for i in [*range(N)] * 4][1:]


def test_files_that_cannot_be_read_keep_their_places(loaded, halves):
  inputs = [Input("a"), *files([3]), Input("b", "is empty"), *files([4])]
  found = answers(loaded, halves, inputs)
  assert [row.error for _, (row,) in found] == ["not an image", None, "is empty", None]
  every = dict(answers(loaded, halves, files()))
  assert found[1] == ("3", every["3"]) and found[3] == ("4", every["4"])


def test_outputs_that_are_not_finite_are_errors(loaded, halves):
  broken = loaded._replace(params=dict(loaded.params))
  broken.params["head"] = {k: v * np.nan for k, v in loaded.params["head"].items()}
  ((_, (row,)),) = answers(broken, halves, files([0]))
  assert row.error == predictor.NOT_FINITE


def test_images_of_another_size_than_in_the_calibration_are_refused(loaded):
  cascade = of(loaded, data={"image": [32, 32, 3]})
  with pytest.raises(errors.UserError, match="calibrated on images of 32 x 32 pixels, these are"):
    answers(loaded, cascade, files([0]))
  with pytest.raises(errors.UserError, match="seqhw=7"):
    answers(loaded, of(loaded, sizes=(2, 7), thresholds=(0.5,)), files([0]))


def among(names=("cat", "dog", "cow")):
  vectors = np.random.default_rng(0).normal(size=(len(names), 5))
  return texts.Names(names, vectors, 3.0, None)


def test_a_cascade_is_of_its_weights_and_classes(loaded):
  cascade = of(loaded)
  cascades.check(cascade, loaded, None)
  with pytest.raises(errors.UserError, match="other weights"):
    cascades.check(cascade._replace(weights="f" * 64), loaded, None)
  with pytest.raises(errors.UserError, match="for the classes of the model's head"):
    cascades.check(cascade, loaded, among())
  named = cascade._replace(names=("cat", "dog", "cow"), templates="one")
  cascades.check(named, loaded, among(), "one")
  for other, templates in ((None, ""), (among(("cat", "dog")), "one"), (among(), "name")):
    with pytest.raises(errors.UserError, match="for the names cat,dog,cow in the templates one"):
      cascades.check(named, loaded, other, templates)


def test_names_have_the_scores_whose_softmax_are_their_probabilities(monkeypatch, loaded):
  """The image tower's output stands for an embedding here."""
  monkeypatch.setattr(texts, "embedding", programs.probabilities)
  names = among()
  cascade = of(loaded, names=names.names, thresholds=(0.5, 0.5))
  found = answers(loaded, cascade, files(), among=names)
  for file, (row,) in found:
    ((_, (alone,)),) = predictions.predictions(
      loaded, files([file]), [row.seqhw], batch_size=4, among=names
    )
    assert row == alone
  embedding = np.random.default_rng(1).normal(size=5).astype(np.float32)
  scores = cascades.of_embeddings(names, embedding[None])[0]
  np.testing.assert_allclose(np.exp(scores) / np.exp(scores).sum(), names.probabilities(embedding))
  assert cascades.of_embeddings(names, np.zeros((0, 5))).shape == (0, 3)
