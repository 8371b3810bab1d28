"""Values as people type them."""

import re
from typing import Any

import click


class Size(click.ParamType):
    """``32`` or ``WxH`` (``48x32``) as (H, W)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"0*([1-9]\d*)(?:[xX×]0*([1-9]\d*))?", value) if isinstance(value, str) else None
        if match is None:
            self.fail(f"{value!r} is not a size; write 32 or 48x32 (width x height)", param, ctx)
        return int(match[2] or match[1]), int(match[1])


class Numbers(click.ParamType):
    """``0-63``, ``3,7,9`` or both joined by commas, as a list."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            if match is None or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"{value!r} is not a list of numbers; write 0-63 or 3,7,9", param, ctx)
            numbers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
        return numbers


def switch(*names: str, help: str, default: bool | None = None) -> Any:
    """A flag that also takes ``=True`` and ``=False``, as EDM's options do."""
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=default, metavar="[BOOL]", help=help)
