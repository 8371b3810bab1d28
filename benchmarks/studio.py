"""Eight people at the page at once: every answer against the library's for its seed, and the memory before and after.

    python -m benchmarks.studio --network runs/demo [--clients 8] [--requests 50]

Each client asks for one image after the other through the page's own interface; every tenth request is cancelled on its
way, and must free its place. Prints one JSON line.
"""

import json
import threading
import time
from pathlib import Path

import click
import numpy as np
import psutil
from gradio_client import Client
from PIL import Image

from diffit.sampling import load
from diffit.studio import Shelf
from diffit.studio.app import serve
from diffit.studio.common import grid_picture

PORT = 7871
MIB = 2**20


def ask(client: Client, network: str, seed: int, steps: int) -> tuple[object, ...]:
    return (network, str(seed % 10), seed, 1, "heun", steps, 1.0, "", "all", "fp32")


@click.command()
@click.option("--network", required=True, help="Snapshot or run of the digits.")
@click.option("--clients", default=8, show_default=True)
@click.option("--requests", default=50, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--port", default=PORT, show_default=True)
def main(network: str, clients: int, requests: int, steps: int, port: int) -> None:
    """Prints clients, requests, right, cancelled, seconds, and the server's memory after each quarter."""
    shelf = Shelf((network,))
    name = next(iter(shelf.networks()))
    page, address = serve(shelf, port=port, block=False)
    model, process = load(network, device=shelf.device, precision="fp32"), psutil.Process()
    lock, right, wrong, cancelled = threading.Lock(), [], [], []
    memory: list[float] = []

    def visit(number: int) -> None:
        client = Client(address, verbose=False)
        for i in range(requests):
            seed = 1000 * number + i
            if i % 10 == 9:
                job = client.submit(*ask(client, name, seed, 1000), api_name="/sample")
                while not job.outputs() and not job.done():
                    time.sleep(0.02)
                job.cancel()
                cancelled.append(seed)
                continue
            picture = client.predict(*ask(client, name, seed, steps), api_name="/sample")[0]
            path = picture if isinstance(picture, str) else picture["path"]
            with lock:
                expected = np.asarray(grid_picture(model.sample([seed], seed % 10, steps=steps)))
                (right if np.array_equal(np.asarray(Image.open(path).convert("RGB")), expected) else wrong).append(seed)
                if (len(right) + len(wrong)) % max(clients * requests // 4, 1) == 1:
                    memory.append(round(process.memory_info().rss / MIB))
            Path(path).unlink(missing_ok=True)

    began = time.monotonic()
    threads = [threading.Thread(target=visit, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.append(round(process.memory_info().rss / MIB))
    page.close()
    print(
        json.dumps(
            {
                "clients": clients, "requests_each": requests, "right": len(right), "wrong": len(wrong),
                "cancelled": len(cancelled), "seconds": round(time.monotonic() - began, 1), "memory_mib": memory,
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
