"""What stands before the page's server: bodies of a bounded size, and nothing fetched from elsewhere for a visitor."""

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from diffit.studio.uploads import UPLOAD_BYTES, is_address

BODY_BYTES = UPLOAD_BYTES + (1 << 20)  # an upload, and what is around it


class Gate:
    """ASGI middleware. Gradio bounds each file, but reads a body to its end, and follows addresses given as paths."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = _refusal(scope) if scope["type"] == "http" else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            code, text = refusal
            await PlainTextResponse(text, code, {"Connection": "close"})(scope, receive, send)


def _refusal(scope: Scope) -> tuple[int, str] | None:
    headers, path = Headers(scope=scope), scope["path"]
    if any(f"/{room}=" in path and is_address(path.split("=", 1)[1]) for room in ("file", "proxy")):
        return 403, "this page fetches nothing from elsewhere"
    if "transfer-encoding" in headers:
        return 411, "say how long the body is"
    if int(headers.get("content-length", 0)) > BODY_BYTES:
        return 413, f"larger than {UPLOAD_BYTES >> 20} MiB"
    return None
