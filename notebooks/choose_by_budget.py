# %% [markdown]
# # Choose the patch size by a budget
#
# The size need not be guessed: a profile says what each one gives and costs on this device, and `choose` takes
# the most accurate one that fits.
#
# Under a minute on two cores; the images come with scikit-learn.

# %%
import shlex
import tempfile
from pathlib import Path

import flexivit_jax
from flexivit_jax import cli, errors

folder = Path(tempfile.mkdtemp())


def flexivit(command: str) -> None:
  """What `flexivit ...` does in a shell."""
  print("flexivit", command)
  assert cli.main(shlex.split(command)) == 0


run = folder / "run"
flexivit(
  f"train --config configs/digits.py --workdir {run} --config.total_steps=500"
  " --config.flexi.seqhw.v='(2, 4, 8)' --config.evals.test.seqhw='(2, 4, 8)'"
)

# %% [markdown]
# `flexivit profile` measures accuracy with its interval, milliseconds, GFLOPs and memory of each size, and
# keeps the rows beside the weights.

# %%
flexivit(f"profile {run} --batch_sizes 1")

# %% [markdown]
# Limits may be milliseconds, GFLOPs, memory, images per second, or the accuracy that is enough; on the command
# line, `--budget gflops=0.005`.

# %%
for gflops in (0.005, 0.01, 1.0):
  row = flexivit_jax.choose(run, gflops=gflops)
  print(f"at most {gflops} GFLOPs: {row.size} tokens a side, {row.value:.1%}, {row.ms:.2f} ms")
  assert row.gflops <= gflops

cheap, dear = flexivit_jax.choose(run, gflops=0.005), flexivit_jax.choose(run, gflops=1.0)

# %% [markdown]
# A budget that nothing fits is an error that names what comes nearest.

# %%
try:
  flexivit_jax.choose(run, gflops=1e-6)
except errors.UserError as error:
  print(error)
  refused = str(error)

assert "The nearest is" in refused
assert dear.value >= cheap.value and dear.gflops >= cheap.gflops
