import configparser
import re
import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import metadata, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flexivit_jax


@pytest.fixture
def setup_cfg(repository: Path) -> configparser.ConfigParser:
  parser = configparser.ConfigParser()
  parser.read(repository / "setup.cfg")
  return parser


def lines(text: str) -> list[str]:
  return [line for line in text.strip().splitlines() if line]


def test_every_folder_is_packaged(setup_cfg, repository):
  root = repository / "flexivit_jax"
  folders = {path.parent for path in root.rglob("*.py")}
  found = {".".join(folder.relative_to(repository).parts) for folder in folders}
  assert found | {"flexivit_jax.configs"} == set(lines(setup_cfg["options"]["packages"]))


def test_every_data_file_is_packaged(setup_cfg, repository):
  root = repository / "flexivit_jax"
  data = {p for p in root.rglob("*") if p.is_file() and p.suffix not in {".py", ".pyc"}}
  packaged = {
    path
    for package, patterns in setup_cfg["options.package_data"].items()
    for pattern in patterns.split()
    for path in repository.joinpath(*package.split(".")).glob(pattern)
  }
  assert data == packaged


def pinned(file: Path) -> list[Requirement]:
  """The pins of a requirements file, those of the files that it includes first."""
  pins = []
  for line in lines(file.read_text()):
    if line.startswith("-r "):
      pins += pinned(file.parent / line.removeprefix("-r "))
    elif not line.startswith("#"):
      pins.append(Requirement(line))
  return pins


def test_every_dependency_is_pinned_at_a_version_it_admits(setup_cfg, repository):
  wanted = setup_cfg["options"]["install_requires"] + setup_cfg["options.extras_require"]["dev"]
  pins = pinned(repository / "requirements.txt")
  for requirement in map(Requirement, lines(wanted)):
    name = canonical(requirement.name)
    found = [next(iter(pin.specifier)).version for pin in pins if canonical(pin.name) == name]
    assert found, f"{name} is not in requirements.txt"
    assert all(pin in requirement.specifier for pin in found), (requirement, found)


@pytest.mark.parametrize(
  ("file", "module"),
  [
    ("requirements-core.txt", "jax"),
    ("requirements.txt", "pytest"),
    ("requirements-serve.txt", "uvicorn"),
    ("requirements-browser.txt", "playwright"),
    ("requirements-docs.txt", "furo"),
  ],
)
def test_what_is_pinned_needs_nothing_else(repository, file, module):
  """They are installed with --no-deps."""
  pytest.importorskip(module)
  pins = {canonical(pin.name) for pin in pinned(repository / file) if _for_here(pin)}
  todo, seen = [(name, ()) for name in pins], set()
  while todo:
    name, extras = todo.pop()
    if (name, extras) in seen:
      continue
    seen.add((name, extras))
    for needed in map(Requirement, metadata(name).get_all("Requires-Dist", [])):
      if _for_here(needed, *extras):
        assert canonical(needed.name) in pins, f"{name} needs {needed.name}: add it to {file}"
        todo.append((canonical(needed.name), tuple(needed.extras)))


def test_the_core_is_the_package_without_tfds(setup_cfg, repository):
  wanted = {Requirement(line).name for line in lines(setup_cfg["options"]["install_requires"])}
  core = {canonical(pin.name) for pin in pinned(repository / "requirements-core.txt")}
  assert {canonical(name) for name in wanted} - core == {"tensorflow-datasets"}


def _for_here(requirement: Requirement, *extras: str) -> bool:
  """Whether a requirement holds for this Python and system."""
  marker = requirement.marker
  return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


ACCELERATORS = ("cuda", "cuda12", "cuda13", "tpu")


def test_every_documented_accelerator_is_an_extra_of_ours_and_of_jax(setup_cfg, repository):
  readme = (repository / "README.md").read_text()
  documented = set(re.findall(r"\bJAX=(\w+)|\.\[(\w+)\]", readme))
  names = {name for pair in documented for name in pair if name}
  assert names == set(ACCELERATORS)
  extras = setup_cfg["options.extras_require"]
  for name in names:
    assert extras[name].strip() == f"jax[{name}]"
    assert name in metadata("jax").get_all("Provides-Extra")


@pytest.mark.slow
@pytest.mark.parametrize("name", ACCELERATORS[1:])  # `cuda` is the one of these that jax takes
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_pip_finds_each_accelerator_for_each_python(repository, tmp_path, python, name):
  """Looks only up the versions of what an extra needs: a dry run of pip fetches several GB of CUDA wheels."""
  pins = [
    pin
    for pin in pinned(repository / "requirements.txt")
    if pin.name == "jax" and pin.marker.evaluate({"python_version": python})
  ]
  target = [f"--python-version={python}", "--only-binary=:all:"]
  todo, checked = [Requirement(f"jax[{name}]{pins[0].specifier}")], set()
  while todo:
    needed = todo.pop()
    checked.add(canonical(needed.name))
    listed = _pip("index", "versions", *target, needed.name)
    versions = re.search("Available versions: (.*)", listed)[1].split(", ")
    assert list(needed.specifier.filter(versions)), (needed, versions)
    if needed.extras:  # jax and its plugins, which are small
      wanted = f"{needed.name}{needed.specifier}"
      _pip("download", "--no-deps", "--quiet", *target, f"--dest={tmp_path}", wanted)
      todo += _needs(tmp_path, needed, python)
  last = {"tpu": "libtpu", "cuda13": "nvidia-cublas"}.get(name, "nvidia-cublas-cu12")
  assert {"jaxlib", last} <= checked


def _pip(*arguments: str) -> str:
  """What pip prints; skips where it reaches no index."""
  pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
  done = subprocess.run([*pip, *arguments], capture_output=True, text=True, check=False)
  if re.search("connection|retries|resolve host|name resolution", done.stderr, re.I):
    pytest.skip("no package index can be reached")
  assert done.returncode == 0, (arguments, done.stderr)
  return done.stdout


def _needs(folder: Path, of: Requirement, python: str) -> list[Requirement]:
  """What the downloaded wheel of a requirement needs, with its extras, on this Python."""
  [wheel] = folder.glob(f"{canonical(of.name).replace('-', '_')}-*.whl")
  with zipfile.ZipFile(wheel) as file:
    [path] = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
    about = message_from_bytes(file.read(path))
  assert of.extras <= set(about.get_all("Provides-Extra")), f"{wheel.name} has not {of.extras}"
  where = {"python_version": python, "python_full_version": f"{python}.0"}
  found = map(Requirement, about.get_all("Requires-Dist"))
  return [
    needed
    for needed in found
    if needed.marker is None
    or any(needed.marker.evaluate({**where, "extra": extra}) for extra in of.extras)
  ]


def canonical(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


def test_the_version_is_written_once(setup_cfg):
  assert setup_cfg["metadata"]["version"] == "attr: flexivit_jax.__version__"
  assert flexivit_jax.__version__ == version("flexivit_jax")


def test_the_extras_that_the_docs_name_are_there(setup_cfg, repository):
  pages = [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]
  text = "".join(page.read_text() for page in pages if page.name != "CHANGELOG.md")
  named = set(re.findall(r"the extra `(\w+)`|flexivit_jax\[(\w+)\]", text))
  assert {"serve", "text", "docs"} <= {name for pair in named for name in pair}
  assert {name for pair in named for name in pair if name} <= set(
    setup_cfg["options.extras_require"]
  )


def test_make_faults_runs_every_test_that_the_reliability_page_names(repository):
  page, rest = (repository / "docs" / "reliability.md").read_text().split("## What users do")
  named = set(re.findall(r"[\w/]*test_\w+\.py", page))
  assert len(named) > 15
  assert '-m "faults and' in (repository / "Makefile").read_text()
  for name in re.findall(r"[\w/]*test_\w+\.py", rest):
    assert (repository / "tests" / name).is_file(), name
  for name in named:
    text = (repository / "tests" / name).read_text()
    assert "\npytestmark = pytest.mark.faults\n" in text, f"{name} lacks the mark `faults`"


def tree_of(text: str) -> dict[str, list[str]]:
  """The first ```text block that begins with a folder: {folder: the names that its lines begin with}."""
  block = re.search(r"```text\n(\w+/\n.*?)```", text, re.DOTALL)[1]
  tree = {}
  for line in block.splitlines():
    if not line.startswith(" "):
      folder = line.split()[0]
      tree[folder] = []
    else:
      tree[folder] += re.match(r" +((?:\w+(?:\.\w+|/)(?: |$))+)", line)[1].split()
  return tree


def test_the_tree_in_the_readme_is_what_ls_shows(repository):
  tree = tree_of((repository / "README.md").read_text())
  assert all((repository / folder).is_dir() for folder in tree)
  for folder in ("flexivit_jax", "configs", "tools", "docs"):
    there = {p.name + "/" * p.is_dir() for p in (repository / folder).iterdir()}
    there = {name for name in there if name != "__pycache__/" and not name.startswith(".")}
    assert sorted(tree[f"{folder}/"]) == sorted(there), folder


def test_the_index_of_the_docs_links_every_page_once(repository):
  links = re.findall(r"\]\((\w+\.md)\)", (repository / "docs" / "README.md").read_text())
  pages = {page.name for page in (repository / "docs").glob("*.md")}
  assert sorted(links) == sorted(pages - {"README.md"})


def test_the_import_order_on_the_page_is_the_one_that_is_checked(setup_cfg, repository):
  page = (repository / "docs" / "architecture.md").read_text()
  shown = re.search(r"```text\n(__main__\n.*?)```", page, re.DOTALL)[1]
  assert lines(shown) == lines(setup_cfg["importlinter:contract:layers"]["layers"])


def test_every_file_that_the_docs_name_exists(repository):
  pages = [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]
  # These two tell of the past.
  pages = [page for page in pages if page.name not in ("CHANGELOG.md", "log.md")]
  roots = [repository, repository / "flexivit_jax", repository / "tests"]
  missing = {
    (page.name, name)
    for page in pages
    for name in re.findall(r"[\w.]+(?:/[\w.]+)+\.(?:py|toml|csv|sh)\b", page.read_text())
    if not name.startswith("big_vision/") and not any((root / name).is_file() for root in roots)
  }
  assert not missing


def test_the_files_of_each_task_have_what_is_changed_in_them(repository):
  page = (repository / "docs" / "architecture.md").read_text()
  tasks = re.findall(
    r"^\| (.+?) \| (.+?) \| (.+?) \|$", page.split("## Which files to open")[1], re.M
  )
  assert len(tasks) > 10
  for task, files, changes in tasks[1:]:  # the first is the header
    named = re.findall(r"`(\S+)`", files)
    assert len(named) <= 3, task
    named += re.findall(r"`(\S+/\S+\.\w+)`", changes)
    roots = [repository, repository / "flexivit_jax"]
    text = "".join((r / name).read_text() for r in roots for name in named if (r / name).is_file())
    for name in re.findall(r"`([\w.]+)`", changes):
      assert re.search(rf"\b{name.split('.')[-1]}\b", text), (task, name)
