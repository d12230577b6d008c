"""The documentation as a site: `make docs`. Sphinx reads README.md, docs/ and notebooks/ as they are on GitHub.

The source folder is that of the repository, so that links between the pages hold in both places. Nothing is loaded from
another host: search is Sphinx's own, and formulas are drawn by matplotlib.
"""

import html
import io
import re
from pathlib import Path

import matplotlib
from docutils import nodes
from matplotlib import mathtext
from matplotlib.font_manager import FontProperties

from flexivit_jax import __version__

ROOT = Path(__file__).resolve().parents[2]

project = "flexivit_jax"
release = version = __version__
html_title = f"{project} {release}"
html_theme = "furo"
html_copy_source = False
html_show_copyright = False
html_math_renderer = "mathtext"
html_css_files = ["formula.css"]
html_static_path = ["static"]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/README"
include_patterns = [
  "*.md",
  "docs/*.md",
  "docs/site/api/*.rst",
  "notebooks/*.py",
  "results/README.md",
  "flexivit_jax/data/label_maps/README.md",
]
source_suffix = {".md": "markdown", ".rst": "restructuredtext", ".py": "markdown"}
exclude_patterns = [".*", "**/.*", "build", "runs"]

myst_enable_extensions = ["dollarmath", "html_image"]
myst_heading_anchors = 4

# Docstrings write code in single backticks.
default_role = "code"
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of a named tuple are members already


def add_sidebar(app, docname: str, source: list[str]) -> None:
  """Gives the index of the docs a table of contents for the sidebar: the pages that its tables link, by heading."""
  if docname != root_doc:
    return
  text = source[0]
  source[0] += toctree("Start", ["First steps <../README>", "start_to_end", "troubleshooting"])
  for name, table in re.findall(r"^\*\*(.+)\*\*\n\n((?:\|.*\n?)+)", text, re.MULTILINE):
    pages = re.findall(r"\]\(([\w./]+)\.md\)", table)
    source[0] += toctree(name, pages)
  source[0] += toctree("Notebooks", ["../notebooks/*"], "glob")
  source[0] += toctree("API reference", ["site/api/public", "site/api/*"], "glob")
  source[0] += toctree("Tables", ["../results/README", "../flexivit_jax/data/label_maps/README"])


def show_notebook(app, docname: str, source: list[str]) -> None:
  """Makes Markdown of a notebook in jupytext's percent format: text cells as they are, code cells in fences."""
  if not docname.startswith("notebooks/"):
    return
  shown = []
  for kind, cell in re.findall(r"^# %%( \[markdown\])?\n(.*?)(?=^# %%|\Z)", source[0], re.M | re.S):
    text = cell.strip()
    shown += [re.sub("^# ?", "", text, flags=re.M) if kind else f"```python\n{text}\n```"]
  end = f"A script that runs as it is: `python {docname}.py`; Jupyter opens it with jupytext."
  source[0] = "\n\n".join([*shown, end]) + "\n"


def offer_code(app, docname: str, source: list[str]) -> None:
  """A link to a Python file that is no notebook is one to download it."""
  if docname.startswith("notebooks/") or app.env.doc2path(docname).suffix != ".md":
    return
  source[0] = re.sub(r"\]\((?!\w+:|[\w./]*notebooks/)([\w./]+\.py)\)", r"](path:\1)", source[0])


def toctree(caption: str, pages: list[str], *options: str) -> str:
  """A table of contents that stands in the sidebar alone."""
  lines = ["", "```{toctree}", ":hidden:", f":caption: {caption}"]
  return "\n".join([*lines, *(f":{option}:" for option in options), "", *pages, "```", ""])


def draw_formula(self, node) -> None:
  """A block of TeX as a drawing; the text of the formula is what a screen reader reads."""
  tex, drawn = " ".join(node.astext().split()), io.StringIO()
  with matplotlib.rc_context({"mathtext.fontset": "cm", "svg.hashsalt": "formula"}):
    mathtext.math_to_image(f"${tex}$", drawn, FontProperties(size=14), format="svg")
  svg = drawn.getvalue()
  svg = svg[svg.index("<svg") :].replace(
    "<svg", f'<svg role="img" aria-label="{html.escape(tex)}"', 1
  )
  self.body.append(f'<div class="formula">{svg}</div>')
  raise nodes.SkipNode


def write_front_door(app, exception) -> None:
  """index.html leads to the index of the docs."""
  if exception is None and app.builder.format == "html":
    Path(app.outdir, "index.html").write_text(
      '<!doctype html><html lang="en"><meta charset="utf-8"><title>flexivit_jax</title>'
      f'<meta http-equiv="refresh" content="0; url={root_doc}.html">'
      f'<a href="{root_doc}.html">The documentation</a></html>\n'
    )


def setup(app) -> None:
  """Called by Sphinx."""
  app.connect("source-read", add_sidebar)
  app.connect("source-read", show_notebook)
  app.connect("source-read", offer_code)
  app.connect("build-finished", write_front_door)
  app.add_html_math_renderer(
    "mathtext", inline_renderers=(draw_formula, None), block_renderers=(draw_formula, None)
  )
