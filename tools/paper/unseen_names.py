"""Zero-shot on photos of ImageNet's 1000 classes, 100 of whose names no text named in training; and ridges on the same.

python tools/paper/unseen_names.py imagenet_sample_1k_256.zip --image flexible/model.npz --text minilm --out runs/unseen
python tools/paper/unseen_names.py ... --tables --csv FILE    trains nothing, and writes the rows of what is done

One photo a class. Split k holds out names and photos 100 k to 100 k + 99 of an order drawn with seed 0. The image tower
is locked, and knows all 1000 classes: it was trained with their labels. A run that is done is not run again.

names: the caption of a photo is its name. ranked: of 13 captions, of which one is drawn each time, 3 are its name and
10 those of the 900 names that the tower's own classifier finds likeliest after it. shuffled: as ranked, the names
permuted, a control. MiniLM begins with a projection that a ridge fits to the captions' photos; it and the last two
blocks are then trained by configs/flexilit.py with the softmax loss at temperature 0.1.
ridge to photos, ridge to classes: linear maps from MiniLM's vectors of "a photo of a NAME" to the 900 photos, and to
the 900 rows of the tower's classifier, which 1.28 million labelled photos made; the decay is chosen inside the 900.
The classifier's own answers are the ceiling. A seen photo is one that was trained on; a ninth of them is scored.
"""

import argparse
import csv
import io
import json
import os
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flexivit_jax import cli, config, data, train, weights
from flexivit_jax.data import prompts, text
from flexivit_jax.evaluators import intervals, results
from flexivit_jax.models import TwoTowers
from flexivit_jax.weights import model_records, text as text_weights

ROOT = pathlib.Path(__file__).resolve().parents[2]
HELD_OUT = 100
GRIDS, TRAINED = (5, 8, 15), (8, 15)  # of 240 pixels: patches of 48, 30 and 16
PIXELS = "decode|resize_small(256)|central_crop(240)|value_range(-1, 1)"
LENGTH = 10  # tokens of the longest name
RANKED = 10
DECAYS = (0.1, 0.3, 1.0, 3.0, 10.0)
# Classes that the list calls as others.
RENAMED = {134: "crane bird", 264: "Cardigan corgi", 517: "construction crane", 639: "tank suit"}
MINILM: dict[str, Any] = dict(num_heads=12, max_length=LENGTH, pool_type="mean")
KINDS = {
  "names": "LiT",
  "ranked": "LiT with ranked captions",
  "shuffled": "LiT with shuffled names",
}
SCORED = {
  "unseen": "unseen among 100",
  "unseen_all": "unseen among 1000",
  "seen_all": "seen among 1000",
}


class Photos(NamedTuple):
  """One photo a class, in the order of the classes.

  Attributes:
    names: of the classes, in canonical form.
    files: of the photos.
    pooled: what the tower pools, by tokens a side [1000, e].
    rows, bias: of the tower's classifier [1000, e], [1000].
    logits: of the tower at its finest size [1000, 1000].
    texts, sentences: MiniLM's vectors of the names, and of "a photo of a NAME", not yet of length 1 [1000, d].
  """

  names: Sequence[str]
  files: Sequence[pathlib.Path]
  pooled: Mapping[int, np.ndarray]
  rows: np.ndarray
  bias: np.ndarray
  logits: np.ndarray
  texts: np.ndarray
  sentences: np.ndarray


class Split(NamedTuple):
  """Classes whose names are seen in training, and those that are not."""

  number: int
  seen: np.ndarray
  unseen: np.ndarray


# --- photos and names ---


def unpack(archive: pathlib.Path, folder: pathlib.Path) -> tuple[list[str], list[pathlib.Path]]:
  """Writes the photos; returns names and files of the classes."""
  with zipfile.ZipFile(archive) as opened:
    rows = list(csv.DictReader(io.StringIO(opened.read("labels.csv").decode())))
    files = [folder / pathlib.Path(row["file"]).name for row in rows]
    folder.mkdir(parents=True, exist_ok=True)
    for row, file in zip(rows, files, strict=True):
      if not file.exists():
        file.write_bytes(opened.read(row["file"]))
  names = [RENAMED.get(int(row["index"]), row["name"]) for row in rows]
  return list(prompts.class_texts(names, plain=True)), files


def look(files: Sequence[pathlib.Path], tower: str) -> dict[str, np.ndarray]:
  """Returns "pooled5" and so on of all sizes, "logits" of the finest, and "rows" and "bias" of the classifier."""
  model, params, _ = weights.load_with_record(tower)
  prepare = data.parse(f"{PIXELS}|keep('image')")
  images = np.stack([prepare({"image": file.read_bytes()}, None)["image"] for file in files])
  found = {
    "rows": np.asarray(params["head"]["kernel"]).T,
    "bias": np.asarray(params["head"]["bias"]),
  }
  embed = jax.jit(lambda p, x, s: model.apply({"params": p}, x, seqhw=s), static_argnums=2)
  for seqhw in GRIDS:
    parts = [embed(params, images[i : i + 50], seqhw) for i in range(0, len(images), 50)]
    found[f"pooled{seqhw}"] = np.concatenate([out["pre_logits"] for _, out in parts])
    found["logits"] = np.concatenate([logits for logits, _ in parts])
  return found


def read(texts: Sequence[str], tower: str) -> np.ndarray:
  """Returns the vectors of texts [n, d], as MiniLM pools them."""
  length = LENGTH + 4  # "a photo of a"
  model, params, _ = text_weights.load(tower, **MINILM | {"max_length": length})
  encoded = text.load(tower, length=length, pad="[PAD]", end="[SEP]").encode(list(texts))
  embed = jax.jit(lambda p, x: model.apply({"params": p}, x)[0])
  return np.concatenate([embed(params, encoded[i : i + 100]) for i in range(0, len(encoded), 100)])


def open_photos(args: argparse.Namespace) -> Photos:
  """Photos and names with what both towers make of them, which is kept in OUT/vectors.npz."""
  names, files = unpack(args.zip, args.out / "photos")
  kept = args.out / "vectors.npz"
  if not kept.exists():
    made: dict[str, Any] = look(files, args.image)
    sentences = [f"a photo of a {name}" for name in names]
    np.savez(kept, texts=read(names, args.text), sentences=read(sentences, args.text), **made)
  with np.load(kept) as found:
    pooled = {s: found[f"pooled{s}"] for s in GRIDS}
    return Photos(names, files, pooled, *(found[k] for k in Photos._fields[3:]))


def split_of(number: int, classes: int = 1000) -> Split:
  """The split of a number, 0 to 9."""
  order = np.random.default_rng(0).permutation(classes)
  unseen = np.sort(order[number * HELD_OUT : (number + 1) * HELD_OUT])
  return Split(number, np.setdiff1d(order, unseen), unseen)


# --- ridges ---


def unit(x: np.ndarray) -> np.ndarray:
  """Vectors of length 1."""
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def ridge(
  x: np.ndarray, y: np.ndarray, fitted: np.ndarray, decay: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns kernel [d, e] and bias [e] of the map from x [n, d] to y [n, e] by the rows `fitted`."""
  centre, target = x[fitted].mean(0), y[fitted].mean(0)
  a = x[fitted] - centre
  kernel = np.linalg.solve(a.T @ a + decay * np.eye(a.shape[1]), a.T @ (y[fitted] - target))
  return kernel, target - centre @ kernel


def right(
  images: np.ndarray, texts: np.ndarray, scored: np.ndarray, candidates: np.ndarray
) -> np.ndarray:
  """Returns whether the photo of each class in `scored` is most like its own name among the candidates."""
  alike = unit(images[scored]) @ unit(texts[candidates]).T
  return candidates[alike.argmax(1)] == scored


def measure_ridges(photos: Photos, split: Split) -> list[dict[str, Any]]:
  """Accuracies of both ridges at all sizes; the decay is the best among names that fifths of the seen hold out."""
  rows = []
  finest, parts = GRIDS[-1], [split.seen[k::5] for k in range(5)]
  centred = {s: x - x[split.seen].mean(0) for s, x in photos.pooled.items()}
  texts = unit(photos.sentences)
  for name, made in {"photos": unit(photos.pooled[finest]), "classes": photos.rows}.items():
    targets = made - made[split.seen].mean(0)

    def predicted(fitted: np.ndarray, decay: float, targets: np.ndarray = targets) -> np.ndarray:
      kernel, bias = ridge(texts, targets, fitted, decay)
      return texts @ kernel + bias

    def inside(decay: float, predicted: Callable[..., np.ndarray] = predicted) -> int:
      return sum(
        int(right(centred[finest], predicted(np.setdiff1d(split.seen, p), decay), p, p).sum())
        for p in parts
      )

    decay = max(DECAYS, key=inside)
    for seqhw in GRIDS:
      found = predicted(split.seen, decay)
      for scored, (classes, candidates) in scores(split).items():
        top1 = right(centred[seqhw], found, classes, candidates).mean()
        rows.append(
          dict(
            model=f"ridge to {name}",
            split=split.number,
            scored=scored,
            seqhw=seqhw,
            top1=float(top1),
          )
        )
  return rows


def measure_classifier(photos: Photos, split: Split) -> list[dict[str, Any]]:
  """Accuracies of the tower's own classifier, which needs no name."""
  rows = []
  for seqhw, pooled in photos.pooled.items():
    logits = pooled @ photos.rows.T + photos.bias
    for scored, (classes, candidates) in scores(split).items():
      found = candidates[logits[np.ix_(classes, candidates)].argmax(1)] == classes
      one = dict(model="the tower's own classifier", split=split.number, scored=scored)
      rows.append(one | dict(seqhw=seqhw, top1=float(found.mean())))
  return rows


def scores(split: Split) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Returns the classes of the photos that are scored, and the names that compete."""
  every = np.concatenate([split.seen, split.unseen])
  some = split.seen[:: len(split.seen) // len(split.unseen)]
  return {
    "unseen": (split.unseen, split.unseen),
    "unseen_all": (split.unseen, every),
    "seen_all": (some, every),
  }


# --- runs ---


def captions(photos: Photos, split: Split, kind: str) -> dict[int, list[int]]:
  """Returns the classes whose names are captions of each seen photo; one is drawn, each with equal probability."""
  likeliest = np.argsort(-photos.logits[np.ix_(split.seen, split.seen)], axis=1, kind="stable")
  order = np.random.default_rng(split.number).permutation(len(split.seen))
  called = split.seen[order] if kind == "shuffled" else split.seen
  made = {}
  for place, seen in enumerate(split.seen):
    others = likeliest[place][likeliest[place] != place][:RANKED]
    chosen = [place] if kind == "names" else [place, place, place, *others]
    made[int(seen)] = called[chosen].tolist()
  return made


def write_photos(
  photos: Photos, split: Split, captioned: Mapping[int, Sequence[int]], folder: pathlib.Path
) -> None:
  """Writes FOLDER/captions/train with metadata.jsonl, and a folder for each class in what is scored."""
  lines = []
  for photo, called in captioned.items():
    link(photos.files[photo], folder / "captions" / "train")
    file = photos.files[photo].name
    lines += [json.dumps({"file_name": file, "text": photos.names[k]}) for k in called]
  (folder / "captions" / "train" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
  for scored, (classes, _) in scores(split).items():
    for k in classes:
      link(photos.files[k], folder / "labelled" / scored / f"{k:04}")


def link(file: pathlib.Path, folder: pathlib.Path) -> None:
  """Puts a photo into a folder, without a copy."""
  folder.mkdir(parents=True, exist_ok=True)
  if not (folder / file.name).exists():
    os.link(file, folder / file.name)


def projection(
  photos: Photos, captioned: Mapping[int, Sequence[int]], decay: float
) -> tuple[np.ndarray, np.ndarray]:
  """Returns kernel and bias of the ridge from what MiniLM makes of a name to the mean photo that it is said of."""
  images = unit(photos.pooled[GRIDS[-1]])
  share = np.zeros((len(images), len(images)))
  for photo, called in captioned.items():
    np.add.at(share[:, photo], called, 1 / len(called))
  said = share @ images / np.maximum(share.sum(1, keepdims=True), 1e-9)
  length = np.sqrt((photos.texts**2).sum(1).mean())
  kernel, bias = ridge(photos.texts / length, said, np.array(sorted(captioned)), decay)
  return kernel / length, bias


def write_start(
  photos: Photos,
  captioned: Mapping[int, Sequence[int]],
  args: argparse.Namespace,
  file: pathlib.Path,
) -> None:
  """Writes two towers: the image tower, and MiniLM with the `projection`."""
  kernel, bias = projection(photos, captioned, args.decay)
  _, image_params, image = weights.load_with_record(args.image)
  _, params, record = text_weights.load(args.text, **MINILM)
  head = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}
  fields = text_fields(record, photos)
  model = TwoTowers(image=image_fields(image), text=fields, temperature=0.1, bias=None)
  both = {
    "image": {k: v for k, v in image_params.items() if k != "head"},
    "text": params | {"head": head},
    "t": jnp.full((1,), -np.log(model.temperature), jnp.float32),
  }
  file.unlink(missing_ok=True)
  weights.save_npz(file, model, both, {"model": model_records.record_of(model), "notes": []})


def image_fields(record: Mapping[str, Any]) -> dict[str, Any]:
  """Fields of the tower without its classifier; it is resized as it was flexified."""
  left_out = ("num_classes", "dtype", "head_zeroinit", "head_bias", "remat", "scan")
  return {k: v for k, v in record["model"].items() if k not in left_out} | {"num_classes": 0}


def text_fields(record: Mapping[str, Any], photos: Photos) -> dict[str, Any]:
  """Fields of MiniLM with a projection to what the image tower pools."""
  fields = {k: v for k, v in record["model"].items() if k not in ("head_bias", "dtype", "remat")}
  return fields | {"num_classes": photos.rows.shape[1]}


def settings(
  photos: Photos, split: Split, folder: pathlib.Path, args: argparse.Namespace
) -> dict[str, Any]:
  """The config of a run: configs/flexilit.py with these towers and photos."""
  made = config.load(
    f"{ROOT}/configs/flexilit.py:image={args.image},text={folder}/start.npz,data=captions,"
    f"data_dir={folder}/captions,seed={split.number}"
  )
  tokenize = f"tokenize(path={args.text!r}, pad='[PAD]', end='[SEP]', length={LENGTH})"
  _, _, image = weights.load_with_record(args.image)
  tower, _, record = text_weights.load(args.text, **MINILM)
  made |= dict(
    name=f"FlexiLiT, {folder.name}",
    total_epochs=args.epochs,
    total_steps=None,
    tower_cache=f"{args.out}/tower_cache",
    flexi=dict(seqhw=dict(v=TRAINED)),
    objective=dict(name="softmax_contrastive"),
    checkpoint=dict(every_percent=1.0),
    model=dict(
      name="two_towers",
      image=image_fields(image),
      text=text_fields(record, photos),
      temperature=0.1,
      bias=None,
    ),
    optim=dict(
      lr=1e-4,
      clip=1.0,
      b2=0.95,
      freeze=("image/.*", "t", rf"text/(?!head|Transformer/encoderblock_[{tower.depth - 2}-{tower.depth - 1}]).*"),
      schedule=dict(decay_type="cosine", warmup_percent=0.1),
    ),
  )  # fmt: skip
  made["input"] |= dict(
    pp=f"{PIXELS}|random_caption|{tokenize}|keep('image', 'tokens')",
    batch_size=args.batch_size,
    threads=1,
  )
  made["evals"] = {
    scored: dict(
      type="zero_shot",
      data=dict(name="folder", split=scored, data_dir=f"{folder}/labelled"),
      pp=f"{PIXELS}|onehot()|keep('image', 'labels')",
      batch_size=10,
      seqhw=GRIDS,
      names=[photos.names[k] for k in classes],
      candidates=[photos.names[k] for k in candidates],
      templates="name",
    )
    for scored, (classes, candidates) in scores(split).items()
  }
  return made


def run(photos: Photos, split: Split, kind: str, args: argparse.Namespace) -> None:
  """Trains, or goes on, where that is not done."""
  folder = args.out / f"{kind}{split.number}"
  if not done(folder):
    captioned = captions(photos, split, kind)
    write_photos(photos, split, captioned, folder)
    write_start(photos, captioned, args, folder / "start.npz")
    train.train(settings(photos, split, folder, args), folder / "run")


# --- results ---


def done(folder: pathlib.Path) -> bool:
  """Whether a run has all its results."""
  names = {json.loads(f.read_text())["split"] for f in (folder / "run").glob("eval*.json")}
  return names >= set(SCORED)


def measure_start(photos: Photos, split: Split, kind: str, decay: float) -> list[dict[str, Any]]:
  """Rows of a run before its first step."""
  kernel, bias = projection(photos, captions(photos, split, kind), decay)
  texts = photos.texts @ kernel + bias
  return [
    dict(model=f"{KINDS[kind]}: before training", split=split.number, scored=scored, seqhw=seqhw)
    | dict(top1=float(right(photos.pooled[seqhw], texts, classes, candidates).mean()))
    for scored, (classes, candidates) in scores(split).items()
    for seqhw in GRIDS
  ]


def measured(out: pathlib.Path, kind: str, number: int) -> list[dict[str, Any]]:
  """Rows of a run; none where it is not done."""
  rows = []
  for file in (out / f"{kind}{number}" / "run").glob("eval*.json"):
    made = json.loads(file.read_text())
    for row in made["rows"]:
      one = dict(model=KINDS[kind], split=number, scored=made["split"])
      rows.append(one | dict(seqhw=row["seqhw"], top1=row["top1"]))
  return rows


def table(rows: Sequence[Mapping[str, Any]], pixels: int = 240) -> list[dict[str, Any]]:
  """A row for each model, what is scored and size: percent over all splits, with Wilson's 95 % interval."""
  order = dict.fromkeys(row["model"] for row in rows)
  made = []
  for scored, said in SCORED.items():
    for model in order:
      for seqhw in GRIDS:
        key = (model, scored, seqhw)
        some = [r for r in rows if (r["model"], r["scored"], r["seqhw"]) == key]
        if not some:
          continue
        n = HELD_OUT * len(some)
        hits = round(sum(r["top1"] for r in some) * HELD_OUT)
        low, high = intervals.wilson(hits, n)
        each = " ".join(f"{100 * r['top1']:.0f}" for r in some)
        made.append(
          dict(scored=said, model=model, patch=pixels // seqhw, top1=f"{100 * hits / n:.1f}")
          | dict(low=f"{100 * low:.1f}", high=f"{100 * high:.1f}", n=n, each=each)
        )
  return made


def main() -> None:
  """Runs what is not done, measures, and prints."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("zip", type=pathlib.Path)
  parser.add_argument("--image", required=True, help="a ViT with its classifier, flexified")
  parser.add_argument("--text", required=True, help="folder of all-MiniLM-L6-v2")
  parser.add_argument("--out", type=pathlib.Path, required=True)
  every = ",".join(f"{kind}{number}" for kind in KINDS for number in range(3))
  parser.add_argument("--only", default=every, help="kinds and splits, with commas (default: all)")
  parser.add_argument("--epochs", type=float, default=5.0, help="of the 900 photos")
  parser.add_argument("--batch_size", type=int, default=128)
  parser.add_argument(
    "--decay", type=float, default=1.0, help="of the ridge that training begins with"
  )
  parser.add_argument("--tables", action="store_true", help="train nothing")
  parser.add_argument("--csv", type=pathlib.Path, help="a file to write the rows to")
  args = parser.parse_args()
  args.out = args.out.resolve()
  photos = open_photos(args)
  names = [(name[:-1], int(name[-1])) for name in args.only.split(",")]
  numbers = sorted({number for _, number in names})
  if not args.tables:
    for kind, number in names:
      run(photos, split_of(number), kind, args)
  rows = []
  for measure in (measure_classifier, measure_ridges):
    rows += [row for number in numbers for row in measure(photos, split_of(number))]
  for kind in KINDS:
    for number in numbers:
      rows += measure_start(photos, split_of(number), kind, args.decay)
    rows += [row for number in numbers for row in measured(args.out, kind, number)]
  made = table(rows)
  for row in made:
    print(*row.values(), sep=" | ")
  if args.csv:
    results.write_csv(args.csv, made)


if __name__ == "__main__":
  cli.tool(main)
