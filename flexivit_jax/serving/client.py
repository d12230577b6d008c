"""A client of `flexivit serve` to be copied; it needs nothing but Python: `Client().predict("photo.jpg", seqhw=8)`."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request


class ServerError(Exception):
  """The server refused: `status` of HTTP, and why."""

  def __init__(self, status: int, text: str):
    super().__init__(f"{status}: {text}")
    self.status = status


class Client:
  """Asks one server; a full queue (429) is asked again as often as `tries`, when the server says."""

  def __init__(self, url: str = "http://127.0.0.1:8000", token: str = "", tries: int = 3):
    self.url, self.tries = url, tries
    self.headers = {"Content-Type": "application/octet-stream"}
    if token:
      self.headers["Authorization"] = f"Bearer {token}"

  def predict(self, image: bytes | str, **query: object) -> dict:
    """The answer for an image, bytes or a path; the query is e.g. seqhw=8, deadline_ms=50."""
    return self.post("predict", image, query)

  def embed(self, image: bytes | str, **query: object) -> dict:
    """The features of an image, under "embedding"."""
    return self.post("embed", image, query)

  def post(self, route: str, image: bytes | str, query: dict) -> dict:
    """Sends one image."""
    if not isinstance(image, bytes):
      with open(image, "rb") as file:
        image = file.read()
    address = f"{self.url}/{route}?{urllib.parse.urlencode(query)}"
    request = urllib.request.Request(address, image, self.headers)
    for left in reversed(range(self.tries)):
      try:
        with urllib.request.urlopen(request, timeout=60) as answer:
          return dict(json.load(answer))
      except urllib.error.HTTPError as e:
        if e.code != 429 or not left:
          raise ServerError(e.code, e.read().decode(errors="replace")) from None
        time.sleep(float(e.headers.get("Retry-After", 1)))
    raise ValueError(f"tries={self.tries}; expected 1 or more")
