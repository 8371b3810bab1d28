"""Pages that one HTML file holds: pictures are data URIs, and nothing is fetched."""

import base64
import html
from collections.abc import Sequence

STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } img { max-width: 100%; image-rendering: pixelated }
svg { background: #fafafa; border: 1px solid #ddd } table { border-collapse: collapse } td, th { padding: .2em .8em;
text-align: left; border-bottom: 1px solid #ddd } pre { background: #f4f4f4; padding: 1em; overflow: auto }
.curves { display: flex; flex-wrap: wrap; gap: 1em } figure { margin: 0 } figcaption { font-size: .9em; color: #555 }"""


def page(title: str, body: Sequence[str]) -> str:
    name = html.escape(title)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{name}</title><style>{STYLE}</style>\n'
        f"<h1>{name}</h1>\n" + "\n".join(body) + "\n</html>\n"
    )


def picture(data: bytes, caption: str) -> str:
    source = base64.b64encode(data).decode()
    text = html.escape(caption)
    return f'<figure><img alt="{text}" src="data:image/png;base64,{source}"><figcaption>{text}</figcaption></figure>'
