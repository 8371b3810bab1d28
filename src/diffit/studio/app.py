"""The page as a whole: its tabs, its looks, and how it is served."""

import logging
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: no request leaves the machine

import gradio as gr
from starlette.middleware import Middleware

from diffit.errors import UserError
from diffit.studio import compare_tab, data_tab, explore_tab, inside_tab, runs_tab, sample_tab
from diffit.studio.common import Scratch
from diffit.studio.gate import LOOPBACK, Gate
from diffit.studio.shelf import Shelf
from diffit.studio.uploads import UPLOAD_BYTES

logger = logging.getLogger(__name__)

CLEANING = (600, 3600)  # seconds: every so often, files of the page that are older than an hour go
WAITING = 200  # requests in the queue; the next is told to come again
SESSIONS = 64  # pages whose samples are kept; the least recently used one samples again

# The system's own fonts: others would be fetched. Samples are small, so that their pixels are shown as squares.
FONT = ["system-ui", "sans-serif"]
MONO = ["ui-monospace", "monospace"]
CSS = """
.gradio-container img { image-rendering: pixelated; }
#samples img, #frame img, #edited img { max-height: 70vh; object-fit: contain; }
.gradio-container .secondary-wrap input { margin-right: 28px; text-overflow: ellipsis; }
.block > label.float { position: static; width: max-content; }
.gallery .caption-label { max-width: 100%; font-size: 11px; padding: 1px 4px; }
.gallery .grid-wrap { max-height: none; overflow: visible; min-height: 0; }
footer { display: none !important; }
"""


def build(shelf: Shelf) -> gr.Blocks:
    """The page. Nothing is computed in it that :mod:`diffit.explore` or :mod:`diffit.sampling` does not compute."""
    scratch = Scratch()
    with gr.Blocks(title="diffit studio", analytics_enabled=False, delete_cache=CLEANING, fill_width=True) as page:
        gr.Markdown("# diffit studio")
        with gr.Tabs():
            with gr.Tab("Sample", id="sample"):
                sample_tab.build(page, shelf, scratch)
            with gr.Tab("Explore", id="explore"):
                explore_tab.build(shelf, scratch)
            with gr.Tab("Look inside", id="inside"):
                inside_tab.build(shelf)
            with gr.Tab("Compare", id="compare"):
                compare_tab.build(shelf)
            with gr.Tab("Runs", id="runs"):
                runs_tab.build(page, shelf)
            with gr.Tab("Data", id="data") as data:
                data_tab.build(data, shelf)
    page.queue(max_size=WAITING)
    return page


def serve(
    shelf: Shelf,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    auth: list[tuple[str, str]] | None = None,
    block: bool = True,
) -> tuple[gr.Blocks, str]:
    """Serve the page; returns it and its address, at once where it does not ``block``.

    Raises :class:`UserError` for a port that is taken.
    """
    require_free(host, port)
    if share:
        logger.warning(
            "--share: the page is on the internet, through a server of Gradio's makers; whoever has the address "
            "uses this machine%s", "" if auth else ", and nobody is asked for a password (--auth-file)",
        )  # fmt: skip
    elif host not in LOOPBACK and not auth:
        logger.warning(
            "--host %s: whoever reaches this machine can use the page (--auth-file asks for a password)", host
        )
    page = build(shelf)
    gate = Middleware(Gate, hosts=LOOPBACK if host in LOOPBACK and not share else None)
    _, address, _ = page.launch(
        server_name=host, server_port=port, share=share, auth=auth, prevent_thread_lock=True, quiet=True,
        theme=gr.themes.Default(font=FONT, font_mono=MONO), css=CSS, footer_links=[], run_history=False,
        max_file_size=UPLOAD_BYTES, ssr_mode=False, enable_monitoring=False, state_session_capacity=SESSIONS, pwa=False,
        strict_cors=True, mcp_server=False, app_kwargs={"middleware": [gate]},
    )  # fmt: skip
    if block:
        try:
            while True:
                time.sleep(3600)
        finally:
            page.close()
    return page, address


def require_free(host: str, port: int) -> None:
    """Raises :class:`UserError` where the port cannot be listened at."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--port {port}: not free on {host} ({error.strerror}); use another --port, such as {port + 1}"
            ) from None


def read_auth(path: Path) -> list[tuple[str, str]]:
    """``USER:PASSWORD`` lines of a file. Raises :class:`UserError`, which quotes no line."""
    try:
        lines = [line for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--auth-file {path}: cannot be read ({error})") from None
    return parse_auth(lines, f"--auth-file {path}: expected lines of USER:PASSWORD, and at least one")


def parse_auth(lines: Sequence[str], message: str) -> list[tuple[str, str]]:
    """Each line's ``USER:PASSWORD``. Raises :class:`UserError` with the ``message``, which quotes none of them."""
    found = [line.partition(":") for line in lines]
    if not found or not all(user and password for user, _, password in found):
        raise UserError(message)
    return [(user, password) for user, _, password in found]
