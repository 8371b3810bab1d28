"""The page's server as a script sees it: many at once, requests that are left, uploads, paths that are not its own."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason="the page needs gradio: extra studio")

from gradio_client import Client
from gradio_client.exceptions import AppError

from diffit.sampling import load
from diffit.studio.common import grid_picture
from diffit.studio.request import RANDOM

NETWORK = "1 kimg · 00000-a-debug-gpus1-batch8"
OWN = ("heun", 3, 1.0, "", "all", "fp32")
LONG = ("heun", 1000, 1.0, "", "all", "fp32")


@pytest.fixture(scope="module")
def client(served):
    return Client(served, verbose=False)


def working() -> int:
    return sum(thread.name == "diffit-live" for thread in threading.enumerate())


def wait_for(condition, seconds: float = 60) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.02)
    return condition()


def test_several_at_once_get_what_the_library_samples(served, shelf):
    model = load(shelf.networks()[NETWORK], device="cpu", precision="fp32")

    def visit(seed: int) -> np.ndarray:
        picture, *_ = Client(served, verbose=False).predict(NETWORK, "bee", seed, 2, *OWN, api_name="/sample")
        return np.asarray(Image.open(picture).convert("RGB"))

    with ThreadPoolExecutor() as visitors:
        for seed, found in enumerate(visitors.map(visit, range(3))):
            assert np.array_equal(found, grid_picture(model.sample([seed, seed + 1], 1, steps=3)))


def test_a_request_that_is_cancelled_frees_its_place(client):
    job = client.submit(NETWORK, RANDOM, 0, 64, *LONG, api_name="/sample")
    assert wait_for(lambda: len(job.outputs()) > 1)
    assert working() == 1
    job.cancel()
    assert wait_for(lambda: working() == 0, 10)
    assert client.predict(NETWORK, RANDOM, 0, 1, *OWN, api_name="/sample")[1].startswith("**1 image**")


def test_a_request_whose_page_is_closed_stops_at_its_next_step(served, client):
    index = next(d["id"] for d in client.config["dependencies"] if d["api_name"] == "sample")
    event = {"data": [NETWORK, RANDOM, 0, 64, *LONG], "fn_index": index, "session_hash": "left"}
    httpx.post(f"{served}gradio_api/queue/join", json=event).raise_for_status()
    with httpx.stream("GET", f"{served}gradio_api/queue/data", params={"session_hash": "left"}, timeout=60) as stream:
        assert any("process_generating" in line for line in stream.iter_lines())
    assert wait_for(lambda: working() == 0, 10)


@pytest.mark.parametrize("says_how_long", [True, False])
def test_an_upload_of_a_gigabyte_is_refused_before_it_arrives(served, says_how_long):
    sent = count()

    def body():
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        for _ in range(1024):
            next(sent)
            yield bytes(1 << 20)

    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    if says_how_long:
        headers["Content-Length"] = str(1 << 30)
    try:
        answer = httpx.post(f"{served}gradio_api/upload", content=body(), headers=headers, timeout=60)
    except httpx.TransportError:  # it hung up in the middle
        pass
    else:
        assert answer.status_code in (411, 413)
    assert next(sent) < 100
    assert httpx.get(served).status_code == 200


def test_the_server_fetches_nothing_for_a_visitor(served, client, monkeypatch):
    asked = []
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *rest, **how: asked.append(host) or resolve(host, *rest, **how)
    )
    address = "http://images.invalid/a.png"
    assert httpx.get(f"{served}gradio_api/file={address}").status_code == 403
    assert httpx.get(f"{served}gradio_api/file/{address}").status_code == 403
    assert httpx.get(f"{served}gradio_api/proxy={address}").status_code == 403
    for name, values in (
        ("upload", (NETWORK, taken(address))),
        ("inpaint", (drawn(address), 1, NETWORK, RANDOM, 0, 1)),
        ("sample", (NETWORK, taken(address), 0, 1, *OWN)),  # in the place of a class
    ):
        with pytest.raises(AppError, match="an address is no file"):
            client.predict(*values, api_name=f"/{name}")
    assert {host for host in map(str, asked) if host not in ("127.0.0.1", "localhost")} == set()


def test_the_page_answers_only_under_the_names_of_this_machine(served):
    """Else another site's name that is made to mean this machine would let that site's scripts read it."""
    port = httpx.URL(served).port
    assert httpx.get(served, headers={"host": f"localhost:{port}"}).status_code == 200
    refused = httpx.get(served, headers={"host": f"elsewhere.example:{port}"})
    assert (refused.status_code, refused.text) == (403, "open the page at the address that it listens at")


def taken(path: str) -> dict[str, object]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def drawn(path: str) -> dict[str, object]:
    return {"background": taken(path), "layers": [], "composite": None}


@pytest.mark.parametrize("path", ["/etc/hostname", "../../../../etc/hostname", "{run}/log.txt", "{here}"])
def test_no_file_is_served_or_taken_that_the_page_did_not_make(served, client, shelf, path):
    path = path.format(run=next(iter(shelf.runs().values())), here=Path(__file__))
    assert httpx.get(f"{served}gradio_api/file={path}").status_code in (400, 403, 404)
    with pytest.raises(AppError):
        client.predict(NETWORK, taken(path), api_name="/upload")
    assert httpx.get(served).status_code == 200


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("sample", ("../x", RANDOM, 0, 1, *OWN)),
        ("sample", (NETWORK, RANDOM, 0, 1, "../heun", *OWN[1:])),
        ("interpolate", ("../x", 0, RANDOM, 1, RANDOM, 4, 2)),
        ("take", (NETWORK, "../bee", 0)),
        ("compare", (RANDOM, 0, 1, NETWORK, *OWN, "../x", *OWN)),
        ("nearest", (NETWORK, RANDOM, 0, "../inception")),
        ("look", (NETWORK, RANDOM, "../0", 2)),
    ],
)
def test_a_path_in_a_field_is_one_line_and_the_server_goes_on(served, client, name, values):
    with pytest.raises(AppError) as caught:
        client.predict(*values, api_name=f"/{name}")
    assert "\n" not in str(caught.value)
    assert httpx.get(served).status_code == 200
