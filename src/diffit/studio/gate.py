"""What stands before the page's server: bodies of a bounded size, and nothing fetched from elsewhere for a visitor."""

import re
from collections.abc import Set

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from diffit.studio.uploads import UPLOAD_BYTES

FETCHED = re.compile(r"/(?:file|proxy)[=/]\s*https?:", re.IGNORECASE)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]", "::1"})
BODY_BYTES = UPLOAD_BYTES + (1 << 20)  # an upload, and what is around it


class Gate:
    """ASGI middleware. Gradio bounds each file, but reads a body to its end, and follows addresses given as paths.

    ``hosts`` are the names under which the page may be opened, None is any: another site's name that is made to mean
    this machine (DNS rebinding) would else have its scripts read the page.
    """

    def __init__(self, app: ASGIApp, hosts: Set[str] | None = None) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope, self.hosts) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            code, text = refusal
            await PlainTextResponse(text, code, {"Connection": "close"})(scope, receive, send)


def _refusal(scope: Scope, hosts: Set[str] | None) -> tuple[int, str] | None:
    headers, path = Headers(scope=scope), scope["path"]
    if hosts is not None and re.sub(r":\d+$", "", headers.get("host", "")) not in hosts:
        return 403, "open the page at the address that it listens at"
    if FETCHED.search(path):
        return 403, "this page fetches nothing from elsewhere"
    if "transfer-encoding" in headers:
        return 411, "say how long the body is"
    if int(headers.get("content-length", 0)) > BODY_BYTES:
        return 413, f"larger than {UPLOAD_BYTES >> 20} MiB"
    return None
