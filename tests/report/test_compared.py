import csv
import json

import numpy as np
import pytest

from flexivit_jax.evaluators import image_scores
from flexivit_jax.report import compared, report, runs as runs_lib

N = 200


def make_run(folder, right, *, ids=None, name="run", scored=True, **over):
  """A run that gets the images right that `right` says, at the grids by which it goes."""
  n = len(next(iter(right.values())))
  ids = np.arange(n) if ids is None else ids
  rows = [
    {"seqhw": g, "patch": 24 // g, "tokens": g * g, "gflops": 0.1 * g, "ms": 1.0, "n": n}
    | {"top1": float(r.mean()), "top5": 1.0, "loss": 0.5}
    for g, r in right.items()
  ]
  data = {"name": name, "rows": rows, "dataset": "digits", "split": "test"} | over
  folder.mkdir()
  if scored:
    by_size = {str(g): r[np.argsort(ids)].astype(np.uint8) for g, r in right.items()}
    scores = image_scores.ImageScores(np.sort(ids), np.sort(ids) % 10, by_size)
    encoded = image_scores.encoded(scores)
    (folder / "eval_images.npz").write_bytes(encoded)
    data["images_sha256"] = image_scores.digest(encoded)
  (folder / "eval.json").write_text(json.dumps(data))
  return folder


def discordant(both, b, c):
  """Answers of two runs: both right, only the first, only the second, none."""
  one, two = np.zeros(N, int), np.zeros(N, int)
  one[: both + b] = 1
  two[:both] = 1
  two[both + b : both + b + c] = 1
  return one, two


def of(*folders):
  return compared.compare(runs_lib.load(folders))


# By hand: twice the sum of C(b+c, k) / 2^(b+c) of k = 0 ... min(b, c).
@pytest.mark.parametrize(
  ("b", "c", "p"),
  [(9, 1, 2 * 11 / 1024), (5, 0, 2 / 32), (0, 8, 2 / 256), (6, 2, 2 * 37 / 256), (4, 4, 1.0)],
)
def test_p_values_of_known_counts(tmp_path, b, c, p):
  one, two = discordant(100, b, c)
  (pair,) = of(make_run(tmp_path / "a", {4: one}), make_run(tmp_path / "b", {4: two}))
  (found,) = pair.differences
  assert pair.paired
  assert found.only == (b, c)
  assert found.p == pytest.approx(p)
  assert found.value == pytest.approx((b - c) / N)
  (back,) = of(tmp_path / "b", tmp_path / "a")[0].differences
  assert back.value == -found.value
  assert back.interval == pytest.approx((-found.interval[1], -found.interval[0]))
  assert back.p == found.p


def test_the_interval_is_the_published_one():
  # b = 9, c = 1, n = 200: middle 8 / 202, variance (9.5 + 1.5 - 64 / 202) / 202^2.
  middle, half = 8 / 202, 1.959964 * (11 - 64 / 202) ** 0.5 / 202
  assert compared.paired_interval(9, 1, 200) == pytest.approx((middle - half, middle + half))


def test_unpaired_rates_have_published_values():
  # Fisher's cups of tea: 34 / 70. Newcombe 1998, table II, method 10: 56 of 70 and 48 of 80.
  assert compared.unpaired(3, 4, 1, 4)[0] == pytest.approx(34 / 70)
  assert compared.unpaired(56, 70, 48, 80)[1] == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_a_copy_of_a_run_does_not_differ(tmp_path):
  one, _ = discordant(100, 9, 1)
  (pair,) = of(make_run(tmp_path / "a", {4: one}), make_run(tmp_path / "b", {4: one}))
  (found,) = pair.differences
  assert (found.value, found.p, found.holm) == (0, 1, 1)
  assert compared.verdict(found) == "no difference"


def test_the_order_of_the_images_does_not_matter(tmp_path):
  one, two = discordant(100, 9, 1)
  order = np.random.default_rng(0).permutation(N)
  a = make_run(tmp_path / "a", {4: one})
  straight = of(a, make_run(tmp_path / "b", {4: two}))
  mixed = of(a, make_run(tmp_path / "c", {4: two[order]}, ids=order))
  assert mixed[0].differences == straight[0].differences


def test_p_values_are_corrected_over_the_sizes(tmp_path):
  assert compared.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
  assert compared.holm([0.9, 0.8]) == [1.0, 1.0]
  first, second = discordant(100, 9, 1), discordant(100, 4, 4)
  a = make_run(tmp_path / "a", {4: first[0], 8: second[0]})
  (pair,) = of(a, make_run(tmp_path / "b", {4: first[1], 8: second[1]}))
  by_grid = {d.row.seqhw: d for d in pair.differences}
  assert by_grid[4].holm == pytest.approx(2 * 22 / 1024)
  assert compared.verdict(by_grid[4]) == "first is better"
  assert compared.verdict(by_grid[8]) == "not significant"


def damaged(folder):
  (folder / "eval_images.npz").write_bytes(b"not these")


def without(folder):
  (folder / "eval_images.npz").unlink()


def foreign(folder):
  one = image_scores.ImageScores(np.arange(3), np.arange(3), {"4": np.ones(3, np.uint8)})
  (folder / "eval_images.npz").write_bytes(image_scores.encoded(one))


@pytest.mark.parametrize(
  ("spoil", "words"),
  [(damaged, "is not the one"), (without, "cannot be read"), (foreign, "is not the one")],
)
def test_without_scores_that_belong_to_it_a_run_is_compared_unpaired_and_says_why(
  tmp_path, spoil, words
):
  one, two = discordant(100, 9, 1)
  folders = make_run(tmp_path / "a", {4: one}), make_run(tmp_path / "b", {4: two})
  spoil(folders[1])
  (pair,) = of(*folders)
  assert not pair.paired
  assert pair.note.startswith("Not paired: ")
  assert words in pair.note
  assert pair.differences[0].only is None
  assert pair.differences[0].p == compared.unpaired(109, N, 101, N)[0]
  low, high = pair.differences[0].interval
  assert low < 0.04 < high
  assert "Fisher" in report(folders, tmp_path / "out").read_text()


def test_other_images_are_said(tmp_path):
  one, two = discordant(100, 9, 1)
  a = make_run(tmp_path / "a", {4: one})
  fewer = of(a, make_run(tmp_path / "b", {4: two[:150]}))[0]
  assert "200 images were scored of one run, 150 of the other" in fewer.note
  other = of(a, make_run(tmp_path / "c", {4: two}, ids=np.arange(N) + 1))[0]
  assert "are not the same" in other.note
  assert not fewer.paired and not other.paired
  data = of(a, make_run(tmp_path / "d", {4: two}, dataset="cifar10"))[0]
  assert data.note == "Not compared: the dataset is not the same, digits and cifar10."
  assert data.differences == ()
  sizes = of(a, make_run(tmp_path / "e", {8: two}))[0]
  assert sizes.note == "Not compared: no size was evaluated in both."


def test_old_runs_are_compared_unpaired(tmp_path):
  one, two = discordant(100, 9, 1)
  a = make_run(tmp_path / "a", {4: one}, scored=False)
  (pair,) = of(a, make_run(tmp_path / "b", {4: two}, scored=False))
  assert "says nothing of single images" in pair.note
  assert str(tmp_path) not in pair.note


def test_page_and_csv_say_the_same_and_names_stay_text(tmp_path):
  one, two = discordant(100, 9, 1)
  name = '<script>alert("1")</script>'
  folders = make_run(tmp_path / "a", {4: one}, name=name), make_run(tmp_path / "b", {4: two})
  path = report(folders, tmp_path / "out")
  page = path.read_text()
  assert "<script>" not in page
  assert "Paired: the same images were scored." in page
  assert "<td>+4.0</td>" in page and "<td>0.021</td>" in page
  (row,) = csv.DictReader((path.parent / "differences.csv").read_text().splitlines())
  assert row["first"] == name
  assert (row["only_first"], row["only_other"], row["test"]) == ("9", "1", "McNemar exact")
  assert float(row["p"]) == pytest.approx(22 / 1024)
  report(folders[:1], tmp_path / "alone")
  assert not (tmp_path / "alone" / "differences.csv").exists()


@pytest.mark.full
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_equal_models_are_rarely_called_different(shared):
  """The share of draws that are rejected is at most 5 % (and what 4,000 draws may miss), at any size of a page."""
  rng, draws, sizes = np.random.default_rng(0), 4000, 3
  single = family = covered = 0
  for _ in range(draws):
    ps = []
    for _ in range(sizes):
      hard = rng.random(N) < shared  # images that both answer alike
      a, b = rng.random(N) < 0.8, rng.random(N) < 0.8
      b = np.where(hard, a, b)
      only = int((a & ~b).sum()), int((b & ~a).sum())
      ps.append(compared.mcnemar(*only))
      low, high = compared.paired_interval(*only, N)
      covered += low <= 0 <= high
    single += ps[0] <= compared.ALPHA
    family += min(compared.holm(ps)) <= compared.ALPHA
  assert single / draws <= 0.05
  assert family / draws <= 0.05
  assert covered / (draws * sizes) > 0.94
