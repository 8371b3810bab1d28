"""Names of files: their natural order, what makes them safe, and their encoding."""

import re
from bisect import insort
from collections import Counter
from collections.abc import Sequence

import numpy as np

from diffit.data.zips import LARGE
from diffit.errors import UserError

_DIGITS = re.compile(r"\d+")
HIDDEN = re.compile(r"(?:^|/)(?:\.|__MACOSX(?:/|$))")
_SAFE = re.compile(r"[^\\/:\0.][^\\/:\0]*(?:/[^\\/:\0.][^\\/:\0]*)*")  # most names, as they are
# Without any of these, a text of names has no name that is hidden or unsafe; with one, each is looked at.
_ODD = "\\", ":", "\0", "//", "/.", "\n.", "\n/", "/\n", "\n\n", "__MACOSX"
_MARKS = np.array([1 if chr(code).isdigit() else 2 if chr(code) == "/" else 0 for code in range(128)], np.uint8)
FEW = 50  # names of another shape that are put into the order of a million one by one
# Kana, kanji and what goes with them, none of them next to a Latin letter.
_JAPANESE = re.compile(r"(?:(?<![A-Za-z])[\u3000-\u30ff\u4e00-\u9fff\uff01-\uff5e](?![A-Za-z])|[\x00-\x7f])*")


def natural_key(name: str) -> tuple[str, str]:
    """Sort key: ``img2`` before ``img10``, folder by folder."""
    # Names have no NUL, so that what ends a folder and what begins a number come before all that a name may hold.
    return _DIGITS.sub(_number, name.replace("/", "\0\0")), name  # the name itself decides between img1 and img01


def _number(digits: re.Match[str]) -> str:
    """By length, then as text, rather than by ``int``: Python refuses to parse very long numbers."""
    text = digits[0].lstrip("0")
    return f"\0\1{chr(len(text))}{text}"


def natural_sorted(names: Sequence[str]) -> list[str]:
    """By :func:`natural_key`, which for a million names as ``diffit data convert`` gives them is the order of text.

    It is where all digits and slashes stand at the same places.
    """
    if len(names) < LARGE or not all(map(str.isascii, names)):
        return sorted(names, key=natural_key)
    [(length, _)] = Counter(map(len, names)).most_common(1)
    usual = [name for name in names if len(name) == length]
    marks = _MARKS[np.frombuffer("".join(usual).encode(), np.uint8)].reshape(-1, length)
    alike = (marks == marks[0]).all(axis=1)
    others = [name for name in names if len(name) != length]
    others += [usual[row] for row in np.flatnonzero(~alike).tolist()]
    if len(others) > FEW:
        return sorted(names, key=natural_key)
    ordered = sorted(usual if alike.all() else [usual[row] for row in np.flatnonzero(alike).tolist()])
    for name in others:
        insort(ordered, name, key=natural_key)
    return ordered


def name_some(names: Sequence[str], limit: int = 3) -> str:
    """``a, b, c and 7 more``."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def safe_name(raw: str, where: str) -> str:
    """Normalise a stored file name to ``a/b.png``; names that point outside their archive are a UserError."""
    if _SAFE.fullmatch(raw):
        return raw
    name = raw.replace("\\", "/")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\0" in name or re.match(r"[A-Za-z]:", name) or not parts:
        raise UserError(f"{where} holds the unsafe path {raw!r}, which points outside it: remove or rename that entry")
    return "/".join(parts)


def are_plain(names: Sequence[str]) -> bool:
    """Whether every name is what :func:`safe_name` makes of it and none is hidden, asked of all at once."""
    text = "\n".join(["", *names, ""])
    return text.count("\n") == len(names) + 1 and not any(odd in text for odd in _ODD)


def readable(raw: Sequence[bytes], fallback: str) -> list[str]:
    """Names whose encoding no one noted down, as text: UTF-8, Japanese Windows, or else ``fallback``."""
    for encoding in ("utf-8", "cp932"):
        try:
            texts = [name.decode(encoding) for name in raw]
        except UnicodeDecodeError:
            continue
        # Western names can pass for Japanese, but then their letters stand next to kanji.
        if encoding == "utf-8" or all(_JAPANESE.fullmatch(text) for text in texts):
            return texts
    return [name.decode(fallback, "backslashreplace") for name in raw]


def visible_sorted(names: Sequence[str]) -> list[str]:
    """Those that are not hidden, each once, in natural order."""
    names = list(dict.fromkeys(names))
    return natural_sorted(names if are_plain(names) else [name for name in names if not HIDDEN.search(name)])
