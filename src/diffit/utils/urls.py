"""URLs with a token in them: what may be recorded and shown of one, and what only this process knows."""

import re

URL = re.compile(r'https?:/+[^\s"]+')
SECRET = re.compile(r"(?<=/)[^/?#@]+@|[?#].*")  # a name and password; the query, where signed URLs have their token
_whole: dict[str, str] = {}


def public(text: str) -> str:
    """``text``, a path, URL or message, without names, passwords and queries of the URLs in it."""
    return URL.sub(lambda found: SECRET.sub("", found[0]), text)


def remember(text: str) -> str:
    """:func:`public`; :func:`whole` has the rest for whoever in this process opens such a URL."""
    _whole.update((public(url), url) for url in URL.findall(text) if public(url) != url)
    return public(text)


def whole(url: str) -> str:
    """The URL that was shown as ``url``."""
    return _whole.get(url, url)
