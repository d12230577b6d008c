"""FlexiLiT on emoji in miniature: prepares, trains, measures on held-out emoji; goes on where it was stopped.

python tools/paper/emoji.py --out runs/emoji --captions emoji_captions_96.npz --tower vit_ti16.npz --text minilm
  --photos photos
python tools/paper/emoji.py --out runs/emoji --tables                  what is done, and what is claimed of it
python tools/paper/emoji.py --out runs/emoji --tables --csv results    and writes it to results/emoji*.csv

--tower is a ViT-Ti/16, which is flexified with the photos and the emoji that are trained on; --text is the folder of
all-MiniLM-L6-v2. Beside the runs of configs/flexilit_emoji.py: ridge regression from the same image vectors to those of
texts, MiniLM's or bags of words. Its lambda is the best of a part of the training data, as were the config's settings;
then all are trained on the whole of it.
"""

import argparse
import functools
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Integer

from flexivit_jax import cli, config, data, errors, experiment, trees, weights
from flexivit_jax.evaluators import results, retrieval
from flexivit_jax.training import locked

CONFIG = "configs/flexilit_emoji.py"
UNPACK = "tools/maintain/unpack_emoji.py"
PATCHES = {4: 40, 5: 32, 8: 20, 10: 16, 16: 10}  # of 160 pixels, by tokens a side
LAMBDAS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000)
RESAMPLES = 4000
TRAIN = ("train", "val")

Vectors = Float[np.ndarray, "n e"]
Ranks = Float[np.ndarray, "s n"]


class Run(NamedTuple):
  """One of the trainings: its name in tables, the argument of the config, the image tower, and the captions."""

  what: str
  argument: str = ""
  tower: str = "flexified"
  captions: str = "emoji"


RUNS = {
  "random": Run("random sizes"),
  "fixed40": Run("patch 40 only", "fixed=4"),
  "fixed32": Run("patch 32 only", "fixed=5"),
  "fixed20": Run("patch 20 only", "fixed=8"),
  "fixed16": Run("patch 16 only", "fixed=10"),
  "fixed10": Run("patch 10 only", "fixed=16"),
  "plain_random": Run("tower not flexified, random sizes", tower="plain"),
  "plain_fixed16": Run("tower not flexified, patch 16 only", "fixed=10", tower="plain"),
  "without_flags": Run("random sizes, no flags", captions="without_flags"),
  "shuffled": Run("random sizes, captions of other emoji", captions="shuffled"),
}


class Anchor(NamedTuple):
  """What is not trained by steps: its name in tables, the image tower, and what stands for a text."""

  what: str
  tower: str
  target: str


ANCHORS = {
  "ridge": Anchor("ridge", "flexified", "minilm"),
  "plain_ridge": Anchor("tower not flexified, ridge", "plain", "minilm"),
  "bag_of_words": Anchor("ridge on bags of words", "flexified", "words"),
}
CAPTIONS = {"emoji": (), "shuffled": ("--shuffled",), "without_flags": ("--without", "flags")}
SIZES = tuple(PATCHES.values())


class Claim(NamedTuple):
  """What is compared: the name, two runs or anchors, of which the second is taken away, and at which patch sizes."""

  what: str
  first: str
  second: str
  patches: Sequence[int] = SIZES


CLAIMS = (
  Claim("random sizes against ridge", "random", "ridge"),
  Claim("random sizes against ridge on bags of words", "random", "bag_of_words"),
  Claim("not flexified: random sizes against ridge", "plain_random", "plain_ridge"),
  *(Claim("random sizes against the own size", "random", f"fixed{p}", (p,)) for p in SIZES),
  *(Claim("patch 16 only against the own size", "fixed16", f"fixed{p}", (p,)) for p in SIZES if p != 16),
  *(Claim("patch 40 only against the own size", "fixed40", f"fixed{p}", (p,)) for p in SIZES if p != 40),
  Claim("random sizes against patch 16 only", "random", "fixed16"),
  Claim("random sizes against patch 40 only", "random", "fixed40"),
  Claim("flexified against not: random sizes", "random", "plain_random"),
  Claim("flexified against not: patch 16 only", "fixed16", "plain_fixed16"),
  Claim("flexified against not: ridge", "ridge", "plain_ridge"),
)  # fmt: skip


# --- what the runs need ---


def unpack(captions: pathlib.Path, out: pathlib.Path) -> None:
  """Writes the emoji with their captions, with those of others, and without flags."""
  for name, options in CAPTIONS.items():
    if not (out / "data" / name / "test" / "metadata.jsonl").exists():
      call(out, UNPACK, captions, out / "data" / name, *options)


def towers(tower: pathlib.Path, photos: pathlib.Path, out: pathlib.Path, epochs: float) -> None:
  """Flexifies the tower with photos and the training emoji, all without labels; links it as it is, too."""
  folder = out / "towers"
  folder.mkdir(exist_ok=True)
  plain, flexified = (folder / f"{name}.npz" for name in ("plain", "flexified"))
  for path, target in ((plain, tower), (flexified, out / "flexified" / "model.npz")):
    if not path.is_symlink():
      path.symlink_to(target.resolve())
  images = {
    "train/emoji": out / "data/emoji/train", "train/photos": photos, "val/emoji": out / "data/emoji/val"
  }  # fmt: skip
  for name, target in images.items():
    link = out / "unlabelled" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
      link.symlink_to(target.resolve())
  if not flexified.exists():
    sizes = ",".join(map(str, PATCHES))
    call(
      out, "-m", "flexivit_jax", "flexify", "--init", tower, "--data", out / "unlabelled", "--out", out / "flexified",
      "--image_size", 160, "--seqhw", sizes, "--epochs", epochs, "--lr", 5e-5,
    )  # fmt: skip


def train(name: str, out: pathlib.Path, seed: int, text: str, overrides: Sequence[str]) -> None:
  """Trains the texts of one run, or goes on with it; nothing where it is done."""
  workdir = folder_of(name, out, seed)
  if (workdir / "eval.json").exists():
    return
  run = RUNS[name]
  given = [
    f"image={out}/towers/{run.tower}.npz", f"text={text}", f"data_dir={out}/data/{run.captions}", f"seed={seed}"
  ]  # fmt: skip
  spec = f"{CONFIG}:{','.join(filter(None, [run.argument, *given]))}"
  changes = [
    f"input.data.split={'+'.join(TRAIN)}",
    f"tower_cache={out}/tower_cache",
    "evals.test.seqhw=(4,)",  # `measure_run` measures all sizes, with vectors that all runs share
    *(override.removeprefix("--config.") for override in overrides),
  ]
  fill_cache(run, out, spec, changes)
  changes = [f"--config.{change}" for change in changes]
  call(workdir, "-m", "flexivit_jax", "train", "--config", spec, "--workdir", workdir, *changes)


def fill_cache(run: Run, out: pathlib.Path, spec: str, changes: Sequence[str]) -> None:
  """Puts the vectors of the training images where a run looks for them; once for each tower and captions.

  A run embeds the whole batch where it lacks one vector, and a short one would lack some to its end.
  """
  done = out / "tower_cache" / f"{run.tower}_{run.captions}.done"
  if done.exists():
    return
  exp = experiment.from_config(config.load(spec, changes))
  cached, init = exp.tower_cache, exp.init
  assert cached is not None and init is not None
  identity = cached.identity(trees.digest(init["image"]))
  vectors = [image_vectors(out, run.tower, split) for split in TRAIN]
  places = [in_split(out, run.captions, split) for split in TRAIN]
  length = vectors[0][min(PATCHES)].shape[1]
  cache = locked.EmbeddingCache(cached.folder, identity, cached.examples, length)
  for seqhw in PATCHES:
    made = np.concatenate([v[seqhw][place] for v, place in zip(vectors, places, strict=True)])
    cache.write({"seqhw": seqhw}, np.arange(len(made)), unit(made))
  done.touch()


def call(folder: pathlib.Path, *command: object) -> None:
  """Runs a command of Python; its output goes to the end of FOLDER/log.txt."""
  folder.mkdir(parents=True, exist_ok=True)
  text = [str(part) for part in command]
  print(f"--- {' '.join(text)}", flush=True)
  with (folder / "log.txt").open("a") as log:
    subprocess.run([sys.executable, *text], check=True, stdout=log, stderr=subprocess.STDOUT)


def folder_of(name: str, out: pathlib.Path, seed: int) -> pathlib.Path:
  """Where a run is."""
  return out / f"seed{seed}" / name


# --- vectors ---


def captions_of(out: pathlib.Path, name: str, split: str) -> list[str]:
  """The captions of a split, in the order of its images."""
  return [row["captions"][0] for row in source(out, name, split).listing()]


def source(out: pathlib.Path, name: str, split: str) -> data.Source:
  """The images of a split with their captions."""
  return data.make_source(name="captions", split=split, data_dir=str(out / "data" / name))


def in_split(out: pathlib.Path, name: str, split: str) -> Integer[np.ndarray, "m"]:
  """Which of all emoji of a split those of a set of captions are, in its order."""
  place = {row["id"]: i for i, row in enumerate(source(out, "emoji", split).listing())}
  return np.array([place[row["id"]] for row in source(out, name, split).listing()])


def image_vectors(out: pathlib.Path, tower: str, split: str) -> dict[int, Vectors]:
  """Class token and mean of tokens of all emoji of a split, by tokens a side; from a file, if there is one."""
  import jax

  path = out / "vectors" / f"{tower}_{split}.npz"
  if not path.exists():
    model, params, _ = weights.load_with_record(out / "towers" / f"{tower}.npz")
    model = model.clone(pool_type="tok+gap", num_classes=0)
    params = {name: value for name, value in params.items() if name != "head"}
    program = jax.jit(
      lambda x, seqhw: model.apply({"params": params}, x, seqhw=seqhw)[0], static_argnums=1
    )
    pp = "decode|resize(160)|value_range(-1, 1)|keep('image')"
    batches = data.eval_batches(source(out, "emoji", split), pp, batch_size=64, threads=1)
    found: dict[str, list[np.ndarray]] = {str(seqhw): [] for seqhw in PATCHES}
    for batch in batches:
      for seqhw in PATCHES:
        vectors = np.asarray(program(batch["image"], seqhw))
        found[str(seqhw)].append(vectors[batch["_mask"] > 0])
    path.parent.mkdir(exist_ok=True)
    save(path, {name: np.concatenate(parts) for name, parts in found.items()})
  with np.load(path) as archive:
    return {seqhw: archive[str(seqhw)] for seqhw in PATCHES}


def save(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Writes an .npz, which appears when it is complete."""
  temporary = path.with_suffix(".part.npz")
  np.savez(temporary, **dict[str, Any](arrays))
  os.replace(temporary, path)


def unit(x: Vectors) -> Vectors:
  """Vectors of length 1; those of zeros stay."""
  return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def words(texts: Sequence[str], known: Sequence[str]) -> Vectors:
  """Bags of words: log(1 + n / df) of each word that a text has, df of `known` having it."""
  split = lambda text: set(text.lower().replace(",", " ").replace(":", " ").split())  # noqa: E731
  counts: dict[str, int] = {}
  for text in known:
    for word in split(text):
      counts[word] = counts.get(word, 0) + 1
  place = {word: i for i, word in enumerate(sorted(counts))}
  made = np.zeros((len(texts), len(place)))
  for row, text in zip(made, texts, strict=True):
    for word in split(text) & place.keys():
      row[place[word]] = np.log1p(len(known) / counts[word])
  return made


def minilm(texts: Sequence[str], folder: str) -> Vectors:
  """Vectors of all-MiniLM-L6-v2 as it is."""
  import jax

  from flexivit_jax.data import text
  from flexivit_jax.weights import text as text_weights

  model, params, _ = text_weights.load(folder)
  tokens = text.load(folder, length=24, pad="[PAD]", end="[SEP]").encode(texts)
  program = jax.jit(lambda x: model.apply({"params": params}, x)[0])
  padded = np.concatenate([tokens, np.repeat(tokens[:1], -len(tokens) % 64, axis=0)])
  parts = [np.asarray(program(part)) for part in padded.reshape(-1, 64, tokens.shape[1])]
  return np.concatenate(parts)[: len(tokens)]


# --- measures ---


def ranks_of(images: Mapping[int, Vectors], texts: Vectors) -> dict[str, Ranks]:
  """Ranks of each emoji's own caption ("i2t") and image ("t2i"), a row for each size; equal ones count half."""
  own = np.arange(len(texts))
  found = [retrieval.both_ways(unit(images[seqhw]), unit(texts), own) for seqhw in PATCHES]
  return {
    way: np.stack([1 + one[way].above + 0.5 * one[way].equal for one in found])
    for way in retrieval.DIRECTIONS
  }


def measure_run(name: str, out: pathlib.Path, seed: int) -> None:
  """Writes the ranks of a run's test emoji, at all sizes, to its folder."""
  from flexivit_jax.inference import predictor, texts

  path = folder_of(name, out, seed) / "ranks.npz"
  if path.exists():
    return
  run = RUNS[name]
  loaded = predictor.load(path.parent, texts=True)
  model, params, _ = weights.load_with_record(out / "towers" / f"{run.tower}.npz")
  kept = trees.digest({name: value for name, value in params.items() if name != "head"})
  image = loaded.model.parts["image"]
  if kept != trees.digest(loaded.params["image"]) or any(
    getattr(image, field) != getattr(model, field) for field in ("kernel_operator", "grid_operator")
  ):
    raise errors.UserError(
      f"The image tower of {path.parent} is not {out}/towers/{run.tower}.npz, whose vectors are compared; remove the"
      " run, and train it again."
    )
  test = "without_flags" if run.captions == "without_flags" else "emoji"
  images = image_vectors(out, run.tower, "test")
  place = in_split(out, test, "test")
  vectors = texts.embed(loaded, captions_of(out, test, "test"))
  save(path, ranks_of({k: v[place] for k, v in images.items()}, vectors))


def ridge(x: Vectors, y: Vectors, penalty: float) -> Callable[[Vectors], Vectors]:
  """Ridge regression from standardised x to centred y."""
  mean, scale, middle = x.mean(0), x.std(0) + 1e-8, y.mean(0)
  z = (x - mean) / scale
  weight = np.linalg.solve(z.T @ z + penalty * np.eye(z.shape[1]), z.T @ (y - middle))
  return lambda new: (new - mean) / scale @ weight + middle


def measure_anchor(name: str, out: pathlib.Path, text: str) -> None:
  """Fits ridge regression at each size, lambda chosen on val by the mean reciprocal rank, and writes its ranks."""
  path = out / "anchors" / f"{name}.npz"
  if path.exists():
    return
  _, tower, target = ANCHORS[name]
  captions = {split: captions_of(out, "emoji", split) for split in (*TRAIN, "test")}
  known = [caption for split in TRAIN for caption in captions[split]]
  embed = (lambda t: minilm(t, text)) if target == "minilm" else (lambda t: words(t, known))
  y = {split: unit(embed(given).astype(np.float64)) for split, given in captions.items()}
  x = {split: image_vectors(out, tower, split) for split in captions}
  predicted, chosen = {}, []
  for seqhw in PATCHES:
    part = {split: x[split][seqhw].astype(np.float64) for split in captions}
    scores = []
    for penalty in LAMBDAS:
      fitted = ridge(part["train"], y["train"], penalty)(part["val"])
      found = retrieval.both_ways(unit(fitted), y["val"], np.arange(len(fitted)))
      scores.append(np.mean([(1 / (1 + r.above + 0.5 * r.equal)).mean() for r in found.values()]))
    chosen.append(LAMBDAS[int(np.argmax(scores))])
    all_x, all_y = (np.concatenate([each[split] for split in TRAIN]) for each in (part, y))
    predicted[seqhw] = ridge(all_x, all_y, chosen[-1])(part["test"])
  path.parent.mkdir(exist_ok=True)
  save(path, {**ranks_of(predicted, y["test"]), "lambda": np.array(chosen)})


# --- tables ---


def read(name: str, out: pathlib.Path) -> dict[int, dict[str, Ranks]]:
  """The ranks of what is done of a run, by seed; an anchor has one, of seed 0."""
  if name in ANCHORS:
    paths = {0: out / "anchors" / f"{name}.npz"}
  else:
    paths = {int(p.name[4:]): p / name / "ranks.npz" for p in sorted(out.glob("seed*"))}
  return {seed: dict(np.load(path)) for seed, path in paths.items() if path.exists()}


def hits(ranks: Mapping[str, Ranks], k: int, way: str = "") -> Float[np.ndarray, "s n"]:
  """Whether each emoji is among the first k at each size; without a way the mean of both."""
  ways = [way] if way else list(retrieval.DIRECTIONS)
  return np.mean([ranks[one] <= k for one in ways], axis=0)


@functools.cache
def resamples(n: int) -> Float[np.ndarray, "d n"]:
  """The share of each of n in draws of n with replacement."""
  rng = np.random.Generator(np.random.Philox(n))
  return rng.multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n


def interval(values: Float[np.ndarray, "r n"]) -> tuple[float, float]:
  """95 % interval of the mean over r seeds and n emoji: a resample draws of both."""
  seeds, emoji = map(resamples, values.shape)
  low, high = np.quantile(((emoji @ values.T) * seeds).sum(1), [0.025, 0.975])
  return float(low), float(high)


def measured(name: str, out: pathlib.Path) -> list[dict[str, Any]]:
  """What is done of a run: a row for each patch size, in percent."""
  found = read(name, out)
  rows = []
  for i, (seqhw, patch) in enumerate(PATCHES.items() if found else ()):
    row: dict[str, Any] = {"run": name, "patch": patch, "tokens": seqhw**2}
    for way in retrieval.DIRECTIONS:
      for k in (1, 5):
        each = np.stack([hits(ranks, k, way)[i] for ranks in found.values()])
        row[f"{way}_r{k}"] = f"{100 * each.mean():.1f}"
    each = np.stack([hits(ranks, 1)[i] for ranks in found.values()])
    low, high = interval(each)
    row |= {
      "r1": f"{100 * each.mean():.1f}",
      "low": f"{100 * low:.1f}",
      "high": f"{100 * high:.1f}",
    }
    means = 100 * each.mean(1)
    row |= {"least": f"{means.min():.1f}", "most": f"{means.max():.1f}", "seeds": len(each)}
    rows.append(row | {"emoji": each.shape[1], "what": (RUNS | ANCHORS)[name].what})
  return rows


def compared(out: pathlib.Path) -> list[dict[str, Any]]:
  """Differences of R@1 (mean of both ways) that the claims are about, in points, with intervals."""
  rows = []
  for claim in CLAIMS:
    first, second = read(claim.first, out), read(claim.second, out)
    if claim.second in ANCHORS:  # has one fit, which stands beside every seed
      second = {seed: ranks for seed in first for ranks in second.values()}
    seeds = sorted(first.keys() & second.keys())
    for patch in claim.patches if seeds else ():
      i = SIZES.index(patch)
      each = np.stack([hits(first[seed], 1)[i] - hits(second[seed], 1)[i] for seed in seeds])
      low, high = interval(each)
      numbers = {"difference": each.mean(), "low": low, "high": high}
      row = {"what": claim.what, "patch": patch}
      row |= {name: f"{100 * number:+.1f}" for name, number in numbers.items()}
      rows.append(row | {"by_seed": " ".join(f"{100 * x:+.1f}" for x in each.mean(1))})
  return rows


def retained(out: pathlib.Path) -> list[dict[str, Any]]:
  """How often the tower says on emoji what it says at its native size, without and with flexifying, in percent."""
  path = out / "flexified" / "retention.json"
  if not path.exists():
    return []
  made = json.loads(path.read_text())
  titles = {"before": "agreement, PI-resize alone", "after": "agreement, flexified"}
  return [
    {"row": when, "patch": row["patch"], "what": what, "percent": f"{100 * row['agree1']:.1f}"}
    for when, what in titles.items()
    for row in made[when]
  ]


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
  """A Markdown table of rows of the same keys."""
  if not rows:
    return ""
  lines = [" | ".join(rows[0]), "|".join("---" for _ in rows[0])]
  lines += [" | ".join(str(value) for value in row.values()) for row in rows]
  return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
  """Parses the command line."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--out", type=pathlib.Path, required=True, help="folder of all that is made")
  parser.add_argument("--captions", type=pathlib.Path, help="emoji_captions_96.npz")
  parser.add_argument("--tower", type=pathlib.Path, help="weights of a ViT-Ti/16")
  parser.add_argument("--text", help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--photos", type=pathlib.Path, help="folder of images, to flexify with")
  parser.add_argument("--epochs", type=float, default=3, help="of flexifying (default 3)")
  parser.add_argument("--only", help="names of runs, with commas (default: all)")
  parser.add_argument("--seeds", default="0,1,2", help="with commas (default: 0,1,2)")
  parser.add_argument("--tables", action="store_true", help="train and measure nothing")
  parser.add_argument("--csv", type=pathlib.Path, help="folder to write emoji*.csv to")
  args, overrides = parser.parse_known_args()
  if strange := [a for a in overrides if not a.startswith("--config.")]:
    parser.error(f"unknown argument {strange[0]}")
  names = args.only.split(",") if args.only else list(RUNS)
  if unknown := [n for n in names if n not in RUNS]:
    raise errors.unknown("run", unknown[0], RUNS)
  if not args.tables:
    needed = ("captions", "tower", "text", "photos")
    if missing := [f"--{n}" for n in needed if getattr(args, n) is None]:
      parser.error(f"give {', '.join(missing)}, or --tables")
    unpack(args.captions, args.out)
    towers(args.tower, args.photos, args.out, args.epochs)
    for name in ANCHORS:
      measure_anchor(name, args.out, args.text)
    for seed in map(int, args.seeds.split(",")):
      for name in names:
        train(name, args.out, seed, args.text, overrides)
        measure_run(name, args.out, seed)
  rows = [row for name in (*RUNS, *ANCHORS) for row in measured(name, args.out)]
  claims = compared(args.out)
  print(markdown(rows), markdown(claims), sep="\n\n")
  if args.csv:
    made = {"emoji": rows, "emoji_claims": claims, "emoji_flexified": retained(args.out)}
    for name, table in made.items():
      if table:
        results.write_csv(args.csv / f"{name}.csv", table)


if __name__ == "__main__":
  cli.tool(main)
