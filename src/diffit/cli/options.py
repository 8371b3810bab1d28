"""Values as people type them."""

import re
from collections.abc import Callable
from typing import Any

import click


class Size(click.ParamType):
    """``32`` or ``WxH`` (``48x32``, also ``48,32``) as (H, W)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"0*([1-9]\d{0,5})(?:[xX×,]0*([1-9]\d{0,5}))?", str(value).strip())
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


class Steps(click.ParamType):
    """A number of steps, or ``ddim50``."""

    name = "N|ddimN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        text = str(value)
        if re.fullmatch(r"ddim\d+", text):
            return text
        if not re.fullmatch(r"-?\d+", text):
            self.fail(f"{value!r} is not a number of steps; write 25, or ddim25 for a whole stride", param, ctx)
        return int(text)


class Interval(click.ParamType):
    """``0.2,5`` as two numbers."""

    name = "LO,HI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            low, high = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not an interval; write 0.2,5", param, ctx)
        return low, high


def with_options(options: list[Callable[..., Any]]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def switch(*names: str, help: str, default: bool | None = None) -> Any:
    """A flag that also takes ``=True`` and ``=False``, as EDM's options do."""
    return click.option(*names, type=bool, is_flag=False, flag_value=True, default=default, metavar="[BOOL]", help=help)
