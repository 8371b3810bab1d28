"""Eight people at the page at once: every answer against the library's for its seed, and the memory meanwhile.

    python -m benchmarks.studio --network runs/demo [--clients 8] [--requests 50]

Each client asks for one image after the other through the page's own interface; every tenth request is cancelled on its
way, and must free its place. Prints one JSON line.
"""

import json
import statistics
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import psutil
from gradio_client import Client
from PIL import Image

from diffit.sampling import Model, load
from diffit.studio import Shelf
from diffit.studio.app import serve
from diffit.studio.common import grid_picture

CANCELLED = 10  # every so many-th request
LONG = 1000  # steps of a request that is cancelled
MIB = 2**20


class Visitors:
    """What they ask for, and what came of it."""

    def __init__(self, address: str, name: str, model: Model, steps: int) -> None:
        self.address, self.name, self.model, self.steps = address, name, model, steps
        self.came_of = Counter[str]()
        self.seconds, self.memory = list[float](), list[int]()
        self.lock = threading.Lock()

    def visit(self, number: int, requests: int) -> None:
        client = Client(self.address, verbose=False)
        for i in range(requests):
            seed = 1000 * number + i
            outcome = self.cancel(client, seed) if i % CANCELLED == CANCELLED - 1 else self.answer(client, seed)
            with self.lock:
                self.came_of[outcome] += 1
                if number == 0 and i % max(requests // 5, 1) == 0:
                    self.memory.append(round(psutil.Process().memory_info().rss / MIB))

    def fields(self, seed: int, steps: int) -> tuple[Any, ...]:
        return (self.name, str(seed % 10), seed, 1, "heun", steps, 1.0, "", "all", "fp32")

    def answer(self, client: Client, seed: int) -> str:
        began = time.monotonic()
        path = client.predict(*self.fields(seed, self.steps), api_name="/sample")[0]
        self.seconds.append(time.monotonic() - began)
        found = np.asarray(Image.open(path).convert("RGB"))
        Path(path).unlink()
        expected = grid_picture(self.model.sample([seed], seed % 10, steps=self.steps, guidance=1.0))
        return "right" if np.array_equal(found, np.asarray(expected)) else "wrong"

    def cancel(self, client: Client, seed: int) -> str:
        job = client.submit(*self.fields(seed, LONG), api_name="/sample")
        while not job.outputs() and not job.done():
            time.sleep(0.02)
        job.cancel()
        return "cancelled"


@click.command()
@click.option("--network", required=True, help="Snapshot or run of the digits.")
@click.option("--clients", default=8, show_default=True)
@click.option("--requests", default=50, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--port", default=7871, show_default=True)
def main(network: str, clients: int, requests: int, steps: int, port: int) -> None:
    """Prints what came of the requests, how long they took, the memory of server and clients, and what still runs."""
    shelf = Shelf((network,))
    page, address = serve(shelf, port=port, block=False)
    model = load(network, device=shelf.device, precision="fp32")
    visitors, began = Visitors(address, next(iter(shelf.networks())), model, steps), time.monotonic()
    with ThreadPoolExecutor(clients) as threads:
        list(threads.map(visitors.visit, range(clients), [requests] * clients))
    seconds = time.monotonic() - began
    time.sleep(2)  # for the last one that was cancelled to come to its next step
    still_sampling = sum(thread.name == "diffit-live" for thread in threading.enumerate())
    page.close()
    answers = {
        "median": round(statistics.median(visitors.seconds), 2), "slowest": round(max(visitors.seconds), 2),
    }  # fmt: skip
    found = {
        "clients": clients, "requests_each": requests, **visitors.came_of, "seconds": round(seconds, 1),
        "seconds_of_an_answer": answers, "memory_mib": visitors.memory, "still_sampling": still_sampling,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
