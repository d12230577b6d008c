"""`make docs`: the pages of docs/ and the reference of the code as a site that needs no network."""

import html.parser
import subprocess
import urllib.parse
from pathlib import Path

import pytest

import flexivit_jax

pytestmark = pytest.mark.full

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
  """The built site. Its environment has no optional package, so autodoc could import none."""
  python, folder = REPOSITORY / ".venv-docs" / "bin" / "python", tmp_path_factory.mktemp("site")
  if not python.exists():
    pytest.skip("sphinx is not installed; `make .venv-docs/.installed` does it")
  command = [
    python,
    "-m",
    "sphinx",
    "-q",
    "-W",
    "--keep-going",
    "-c",
    "docs/site",
    "-d",
    folder / "cache",
  ]
  done = subprocess.run(
    [*command, ".", folder / "out"], cwd=REPOSITORY, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr
  return folder / "out"


class Page(html.parser.HTMLParser):
  """What a page loads, what it links, and the names that can be linked in it."""

  def __init__(self, path: Path):
    super().__init__()
    self.loads, self.links, self.names = [], [], set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    values = dict(attrs)
    self.names.add(values.get("id"))
    if tag == "a":
      self.links.append(values.get("href", ""))
    elif tag in ("script", "img", "iframe", "source"):
      self.loads.append(values.get("src", ""))
    elif tag == "link":
      self.loads.append(values.get("href", ""))


@pytest.fixture(scope="module")
def pages(site) -> dict[Path, Page]:
  return {path: Page(path) for path in site.rglob("*.html")}


def test_nothing_is_loaded_from_another_host(site, pages):
  loaded = {address for page in pages.values() for address in page.loads}
  assert len(loaded) > 10
  assert not [a for a in loaded if urllib.parse.urlsplit(a).netloc]
  for path in site.rglob("*.css"):
    text = path.read_text()
    assert "@import" not in text and "url(http" not in text and "url(//" not in text, path.name


def test_every_link_between_pages_leads_to_a_name_that_is_there(pages):
  dead = []
  for path, page in pages.items():
    for link in page.links:
      address = urllib.parse.urlsplit(link)
      target = (
        (path.parent / urllib.parse.unquote(address.path)).resolve() if address.path else path
      )
      if address.scheme or address.netloc:
        continue
      found = pages.get(target)
      name = urllib.parse.unquote(address.fragment)
      if not target.is_file() or (found and name and name not in found.names):
        dead.append((path.name, link))
  assert not dead


def test_the_sidebar_has_every_page_of_the_docs(site, pages):
  index = site / "docs" / "README.html"
  linked = {(index.parent / link.partition("#")[0]).resolve() for link in pages[index].links}
  built = {site / "docs" / f"{page.stem}.html" for page in (REPOSITORY / "docs").glob("*.md")}
  assert built <= linked | {index}
  assert {path for path in pages if "api" in path.parts} <= linked


def test_the_public_names_are_in_the_reference_and_in_the_search(site):
  text = (site / "docs" / "site" / "api" / "public.html").read_text()
  assert all(f"{name}</span></span>" in text for name in flexivit_jax.__all__)
  index = (site / "searchindex.js").read_text()
  assert all(word in index for word in ("pi_resize", "flexifi", "cascad"))


def test_the_search_finds_a_word_in_a_browser_without_a_network(site, browser):
  context = browser.new_context()
  context.set_offline(True)
  page, said = context.new_page(), []
  page.on("pageerror", lambda error: said.append(str(error)))
  page.goto((site / "docs" / "README.html").as_uri())
  page.fill("input[name=q]", "cascade")
  page.keyboard.press("Enter")
  page.wait_for_selector("#search-results li a")
  page.wait_for_function("document.querySelector('#search-results').textContent.includes('found')")
  found = page.locator("#search-results li a").all_inner_texts()
  context.close()
  assert any("cascade" in text.lower() or "coarse" in text.lower() for text in found), found
  assert {*said} <= {
    "Failed to fetch"
  }  # excerpts, which a page from the disk may not read; the titles are there
