"""The demo page of a server: what it adds to a served model."""

from flexivit_jax import errors
from flexivit_jax.demo import content
from flexivit_jax.serving.app import Settings
from flexivit_jax.serving.choice import Policy
from flexivit_jax.serving.served import Program, Served
from flexivit_jax.sizes import SeqHw, size_text

NAMES = ("a dog", "a cat", "a car", "a tree", "a person")


def with_page(
  served: Served, policy: Policy, settings: Settings, cascade: tuple[SeqHw, ...] = ()
) -> tuple[Served, Settings]:
  """Returns the model with the route /relevance, where it has a rule for that, and settings with the page.

  Args:
    served: a checkpoint.
    policy: the sizes, and the profile.
    settings: of the server.
    cascade: sizes of its cascade, where it has one.

  Raises:
    UserError: an artifact, or a model without classes.
  """
  loaded = served.loaded
  if loaded is None or "predict" not in served.what or "predict" not in settings.what:
    raise errors.UserError("--demo shows answers of a checkpoint; this is none, or has no classes.")
  said = content.about(loaded.model, served.name, served.shape, policy.sizes, policy.profile)
  said |= {"server": True, "names": [*NAMES] if served.names else None}
  said |= {"most_bytes": settings.limits.body_bytes}
  said |= {"cascade": [str(size_text(size)) for size in cascade] or None}
  settings = settings._replace(page=content.html(said))
  if not said["relevance"]:
    return served, settings

  def program(what: str, size: SeqHw, batch: int) -> Program:
    if what == "relevance":
      return content.explaining(loaded, size, batch, served.shape)
    return served.program(what, size, batch)

  what = (*served.what, "relevance")
  settings = settings._replace(what=(*settings.what, "relevance"))
  return served._replace(program=program, what=what), settings
