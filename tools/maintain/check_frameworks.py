"""Imports the frameworks that weights are converted to and from, and prints their versions.

    python tools/maintain/check_frameworks.py

The set-up of `make test-convert` runs it before it says that it is done: a torchvision of another build than torch is
installed without complaint and fails when timm imports it, in the middle of a conversion.
"""

from flexivit_jax import cli
from flexivit_jax.weights import optional

FRAMEWORKS = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "tensorflow")


def main() -> None:
  """Prints a line for each framework; the first that cannot be imported ends it."""
  for name in FRAMEWORKS:
    module = optional.require(name, "Converting weights")
    if name == "transformers":  # imports its models only when they are asked for
      module.ViTForImageClassification  # noqa: B018
    print(optional.version(name) or optional.version(f"{name}-cpu") or name, flush=True)


if __name__ == "__main__":
  cli.tool(main)
