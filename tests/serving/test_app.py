"""The server's routes, without a socket."""

import asyncio

import numpy as np
import pytest
from jax import numpy as jnp

for package in ("httpx", "python_multipart", "starlette", "uvicorn"):
  pytest.importorskip(package)


async def until(condition):
  """Waits until it holds."""
  for _ in range(1000):
    if condition():
      return
    await asyncio.sleep(0.005)
  raise AssertionError("nothing happened")


def slow(server, *sizes):
  """From now on these sizes are predicted to take minutes."""
  for key in [("predict", size, n) for size in sizes for n in server.settings.batches]:
    server.times._least[key] = 1e3


async def test_an_answer_says_its_size_its_batch_and_its_time(model, serving, red):
  async with serving(model, batches=(4,)) as (_, client):
    answer = await client.post("/predict?seqhw=4&top_k=2", content=red)
    assert answer.status_code == 200
    said = answer.json()
    assert {"seqhw": 4, "batch": 4}.items() <= said.items()
    assert said["ms"] >= 0 and said["wait_ms"] >= 0
    assert said["top"] == [
      {"class": 0, "name": "red", "probability": 1.4},
      {"class": 1, "name": "green", "probability": 0.4},
    ]
    features = await client.post("/embed?seqhw=2", content=red)
    assert features.json()["embedding"] == [1.2, 0.2, 0.2]


async def test_a_form_has_several_images_which_share_a_batch(model, serving, encoded):
  colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
  form = [("image", (f"{i}.png", encoded(colour))) for i, colour in enumerate(colours)]
  async with serving(model) as (_, client):
    model.ran.clear()
    answer = await client.post("/predict?seqhw=2&top_k=1", files=form)
    assert [row["top"][0]["name"] for row in answer.json()["images"]] == ["red", "green", "blue"]
    assert model.ran == [("predict", 2, 4)]


async def test_nothing_is_answered_before_every_program_is_compiled(model, serving, red):
  model.open.clear()
  async with serving(model, ready=False) as (server, client):
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/healthz")).status_code == 200
    early = await client.post("/predict?seqhw=2", content=red)
    assert early.status_code == 503 and "Retry-After" in early.headers
    model.open.set()
    await asyncio.wait_for(server.engine.ready.wait(), 10)
    assert (await client.get("/ready")).status_code == 200
    assert {*model.ran} == {(w, s, n) for w in ("predict", "embed") for s in (2, 4) for n in (1, 4)}


async def test_a_program_that_cannot_be_compiled_fails_the_server(model, serving):
  model.broken = RuntimeError("no")
  async with serving(model, ready=False) as (server, client):
    await until(lambda: server.failure is not None)
    assert (await client.get("/healthz")).status_code == 500
    assert (await client.get("/ready")).status_code == 503


async def test_a_full_queue_is_429_with_the_time_to_come_back(model, serving, red):
  async with serving(model, queue=2, batches=(1,)) as (server, client):
    model.open.clear()
    asked = [asyncio.ensure_future(client.post("/predict?seqhw=2", content=red))]
    await asyncio.sleep(0.05)  # it is on the device
    asked += [asyncio.ensure_future(client.post("/predict?seqhw=2", content=red)) for _ in range(2)]
    await until(lambda: sum(n for _, n in server.engine.queues.lengths()) == 2)
    refused = await client.post("/predict?seqhw=2", content=red)
    assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1
    model.open.set()
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}
    text = (await client.get("/metrics")).text
    assert 'flexivit_requests_total{route="predict",status="429"} 1.0' in text


async def test_a_deadline_that_cannot_be_met_is_504_and_computes_nothing(model, serving, red):
  async with serving(model, batches=(1,)) as (server, client):
    slow(server, 2, 4)
    model.ran.clear()
    late = await client.post("/predict?seqhw=2&deadline_ms=50", content=red)
    assert late.status_code == 504 and model.ran == []


async def test_a_deadline_that_passes_in_the_queue_is_504(model, serving, red):
  async with serving(model, batches=(1,)) as (server, client):
    model.open.clear()
    first = asyncio.ensure_future(client.post("/predict?seqhw=2", content=red))
    await asyncio.sleep(0.05)
    late = asyncio.ensure_future(client.post("/predict?seqhw=2&deadline_ms=100", content=red))
    await until(lambda: sum(n for _, n in server.engine.queues.lengths()) == 1)
    await asyncio.sleep(0.1)
    model.ran.clear()
    model.open.set()
    assert (await late).status_code == 504 and (await first).status_code == 200
    assert len(model.ran) == 1


@pytest.mark.parametrize(
  "query,seqhw",
  [("", 4), ("budget=latency_ms=2.5", 2), ("budget=accuracy=0.65", 4), ("deadline_ms=500", 4)],
)
async def test_the_profile_chooses(model, serving, red, query, seqhw):
  async with serving(model, with_profile=True) as (_, client):
    answer = (await client.post(f"/predict?{query}", content=red)).json()
    assert answer["seqhw"] == seqhw


async def test_a_near_deadline_takes_a_coarser_size(model, serving, red):
  async with serving(model, with_profile=True) as (server, client):
    slow(server, 4)
    answer = (await client.post("/predict?deadline_ms=400", content=red)).json()
    assert answer["seqhw"] == 2


@pytest.mark.parametrize("floor,seqhw", [(None, 4), (0.55, 2), (0.65, 4)])
async def test_load_takes_a_coarser_size_within_the_floor(model, serving, red, floor, seqhw):
  async with serving(model, with_profile=True, floor=floor, target=0.5) as (server, client):
    slow(server, 4)
    answer = (await client.post("/predict", content=red)).json()
    assert answer["seqhw"] == seqhw
    degraded = 'flexivit_degraded_total{seqhw="2"} 1.0' in (await client.get("/metrics")).text
    assert degraded == (seqhw == 2)
    exact = (await client.post("/predict?seqhw=4", content=red)).json()
    assert exact["seqhw"] == 4  # who names a size gets it


async def test_a_client_that_hangs_up_leaves_the_queue(model, serving, red):
  async with serving(model, batches=(1,)) as (server, client):
    model.open.clear()
    first = asyncio.ensure_future(client.post("/predict?seqhw=2", content=red))
    await asyncio.sleep(0.05)
    sent, gone = False, asyncio.Event()

    async def receive():
      nonlocal sent
      if not sent:
        sent = True
        return {"type": "http.request", "body": red, "more_body": False}
      await gone.wait()
      return {"type": "http.disconnect"}

    async def send(message):
      pass

    scope = {
      "type": "http", "method": "POST", "path": "/predict", "query_string": b"seqhw=2", "headers": [],
    }  # fmt: skip
    other = asyncio.ensure_future(server.app(scope, receive, send))
    await until(lambda: sum(n for _, n in server.engine.queues.lengths()) == 1)
    gone.set()
    await other
    assert sum(n for _, n in server.engine.queues.lengths()) == 0
    model.ran.clear()
    model.open.set()
    await first
    assert len(model.ran) == 1


async def test_a_batch_that_fails_is_500_without_a_traceback_and_the_next_is_answered(
  model, serving, red, caplog
):
  async with serving(model) as (_, client):
    for broken in (RuntimeError("/secret/path"), "not finite"):
      model.broken = broken
      failed = await client.post("/predict?seqhw=2", content=red)
      assert failed.status_code == 500
      assert "secret" not in failed.text and "Traceback" not in failed.text
    model.broken = None
    assert (await client.post("/predict?seqhw=2", content=red)).status_code == 200


async def test_a_token_is_needed_for_all_but_the_probes(model, serving, red):
  async with serving(model, token="geheim") as (_, client):
    for headers in (
      {},
      {"Authorization": "Bearer x"},
      {"Authorization": "Basic geheim"},
      {"Authorization": "geheim"},
    ):
      for method, path in (("POST", "/predict?seqhw=2"), ("GET", "/sizes"), ("GET", "/metrics")):
        answer = await client.request(method, path, content=red, headers=headers)
        assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
    good = {"Authorization": "Bearer geheim"}
    assert (await client.post("/predict?seqhw=2", content=red, headers=good)).status_code == 200
    assert (
      (await client.get("/healthz")).status_code == (await client.get("/ready")).status_code == 200
    )


async def test_a_server_that_stops_answers_what_it_has_and_refuses_the_rest(model, serving, red):
  async with serving(model) as (server, client):
    model.open.clear()
    first = asyncio.ensure_future(client.post("/predict?seqhw=2", content=red))
    await asyncio.sleep(0.05)
    server.draining = True
    refused = await client.post("/predict?seqhw=2", content=red)
    assert (refused.status_code, refused.headers["Connection"]) == (503, "close")
    assert (await client.get("/ready")).status_code == 503
    assert (await client.get("/healthz")).status_code == 200
    assert server.open == 1
    model.open.set()
    assert (await first).status_code == 200 and server.open == 0


async def test_compilations_after_the_start_are_counted(model, serving, red):
  async with serving(model) as (server, client):
    await client.post("/predict?seqhw=2", content=red)
    assert "flexivit_compilations_after_ready 0.0" in (await client.get("/metrics")).text
    assert np.asarray(jnp.arange(1237) * 3 + 1)[-1]  # a shape that no other test has
    assert server.metrics.compilations_after_ready() > 0


async def test_sizes_are_listed(model, serving):
  async with serving(model, with_profile=True, floor=0.5) as (_, client):
    listed = (await client.get("/sizes")).json()
    assert listed["seqhw"] == [2, 4] and listed["batches"] == [1, 4]
    assert [row["size"] for row in listed["rows"]] == [2, 2, 4, 4]
    assert listed["accuracy_floor"] == 0.5


async def test_images_stay_upright_and_alone_as_among_others(model, serving, encoded, red):
  """One program for all: the padding of a batch, and the other images in it, change no bit."""
  async with serving(model, batches=(4,)) as (_, client):
    alone = (await client.post("/embed?seqhw=2", content=red)).json()["embedding"]
    form = [("a", ("a", encoded((9, 9, 9)))), ("b", ("b", red)), ("c", ("c", encoded((1, 2, 3))))]
    among = (await client.post("/embed?seqhw=2", files=form)).json()["images"][1]["embedding"]
    assert among == alone
