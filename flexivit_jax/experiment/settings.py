"""The keys of a config: their types, their defaults, what they mean."""

import dataclasses

from flexivit_jax.config import Section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """The top-level keys of a config. A section is the keyword arguments of the function that it configures.

  Attributes:
    name: of the run, in reports; default: its folder's.
    seed: of everything random.
    input: training data: `data` (arguments of `data.make_source`), and those of `data.train_batches`.
    model: `name` (default "flexivit") and the fields of that model; num_classes defaults to the data's, dtype to
      "bfloat16" on accelerators and "float32" on a CPU. `like`: a file (or what else `weights.load` takes) whose model
      has all fields that are not given here, but for num_classes, dtype and the like, which a run chooses for itself.
    optim: arguments of `optim.make`.
    objective: `name` (default "supervised") and its arguments; `teachers` is `{name: arguments of load_teacher}`.
    flexi: `{argument: section}`: what is drawn for each step; `seqhw` (or `grid_hw`, `patch_hw`, `stride`) and `depth`
      are arguments of the model, a section is e.g. {"v": values, "p": weights}; all its keys: `patch_schedule.parse`.
    evals: `{name: section}`; a section is `type` (default "classification"), `data`, `pp`, `batch_size`, `seqhw`,
      and one of every_steps, every_epochs, ... (default: at the end only); `stride` and `depth` for flexible axes other
      than the patch size; of a "distance" or "teacher" also `teacher`, of a "fewshot" or "knn" also `train_data` and
      the arguments of `data.few_shots` (without `shots` a "knn" takes all images) and of the evaluator. The one named
      "test", else the first in the alphabet, makes RUN/eval.json; another makes RUN/eval_NAME.json.
    checkpoint: `keep` (newest checkpoints to keep; None: all), and one of every_steps, ... (default: every epoch);
      `best`, a metric as "test/top1" (mean over the sizes) or "test/top1@8", whose best checkpoint is kept in RUN/best;
      `best_mode`, "max" or "min" (default: what is better of such a metric).
    total_steps: of the run; or give total_epochs, total_examples or total_flops.
    total_epochs: see `total_steps`.
    total_examples: see `total_steps`.
    total_flops: see `total_steps`; as many steps as the schedule of sizes is expected to make of it.
    accumulate: number of microbatches whose gradients are computed one after the other; "auto": at each size the fewest
      with which its step fits into memory, the same result but for rounding.
    token_budget: arguments of `token_budget.make`; steps at coarse sizes then take several batches. An epoch is so many
      steps as are expected to see each image once. Not with teachers.
    memory_gib: of each device, for accumulate="auto"; default: nine tenths of what the device has.
    init: weights to start from, arguments of `load_init`.
    teacher_cache: folder, also in a bucket, where the teachers' logits are kept, step by step: another run with the
      same data, seed and teachers reads them there, bit-equal, and runs no teacher. As large as steps x batch_size x
      classes x 4 bytes, or with objective.top_k, x top_k x 8 bytes.
    tower_cache: folder where the embeddings of a locked image tower are kept, by example and size: another epoch or run
      with the same images and tower reads them there, bit-equal. As large as examples x sizes x length x 4 bytes.
    init_head_bias: fills the head's bias at the start.
    log_every: steps between reads of the losses from the device.
    early_stopping: evaluations without improvement after which the run ends; or arguments of `monitor.early_stopping`.
      Schedules stay those of the whole run. An evaluation that this or `checkpoint.best` goes by, and that does not say
      how often it runs, runs as often as checkpoints are saved.
    hang_after: seconds in which nothing goes on, no step, program or evaluation, after which the run says where it
      stands still and ends; None: never.
    skip_above: norm of a gradient, before clipping, above which a step changes nothing; also where it or the loss is
      not finite. The schedule of the learning rate waits meanwhile. None: such a step is made, or ends the run.
    skip_limit: skipped steps in a row after which the run ends.
    mesh: `data` and `fsdp`, see `sharding.make_mesh`; default: copies of the parameters on all devices, the batch
      divided. `divide_teachers` (default True): theirs are divided along "fsdp", too. `gather_dtype="bfloat16"`
      sends the divided parameters of blocks in half as many bytes. Neither changes a result.
    wandb: arguments of `wandb_run.open_run`: metrics go to Weights & Biases, too. {} takes its own defaults. None: no.
  """

  name: str = ""
  seed: int = 0
  input: Section
  model: Section
  optim: Section
  objective: Section | None = None
  flexi: Section | None = None
  evals: Section | None = None
  checkpoint: Section | None = None
  total_steps: int | None = None
  total_epochs: float | None = None
  total_examples: float | None = None
  total_flops: float | None = None
  accumulate: int | str = 1
  memory_gib: float | None = None
  token_budget: Section | None = None
  init: Section | None = None
  teacher_cache: str | None = None
  tower_cache: str | None = None
  init_head_bias: float | None = None
  log_every: int = 50
  early_stopping: int | Section | None = None
  hang_after: float | None = 1800.0
  skip_above: float | None = None
  skip_limit: int = 10
  mesh: Section | None = None
  wandb: Section | None = None
