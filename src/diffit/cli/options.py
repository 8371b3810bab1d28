"""Values as people type them."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import click

from diffit.configs.fields import MAX_STEPS
from diffit.errors import UserError

LONGEST = 10_000_000  # numbers in a list: they are kept in memory


class Size(click.ParamType):
    """``32`` or ``WxH`` (``48x32``, also ``48,32``) as (H, W)."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        match = re.fullmatch(r"0*([1-9]\d{0,5})(?:[xX×,]0*([1-9]\d{0,5}))?", str(value).strip())
        if match is None:
            self.fail(f"{value!r} is not a size; write 32 or 48x32 (width x height)", param, ctx)
        return int(match[2] or match[1]), int(match[1])


class Bytes(click.ParamType):
    """``4GiB``, ``500MB`` or a number as bytes."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        match = re.fullmatch(r"(\d{1,15})\s*(?:([kmgt])(i?)b?|b)?", str(value).strip().lower())
        if match is None:
            self.fail(f"{value!r} is not a size; write 4GiB or 500MB", param, ctx)
        unit = 0 if match[2] is None else "kmgt".index(match[2]) + 1
        factor: int = (1024 if match[3] else 1000) ** unit
        return int(match[1]) * factor


class Percent(click.ParamType):
    """``5%`` or ``0.05`` as 0.05."""

    name = "SHARE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)\s*(%?)", str(value).strip())
        share = math.nan if match is None else float(match[1]) / (100 if match[2] else 1)
        if not 0 < share < 1:
            self.fail(f"{value!r} is not a share of the time; write 5% or 0.05", param, ctx)
        return share


class Numbers(click.ParamType):
    """``0-63``, ``3,7,9`` or both joined by commas, as a list."""

    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        numbers: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", part.strip())
            if match is None or int(match[2] or match[1]) < int(match[1]):
                self.fail(f"{value!r} is not a list of numbers; write 0-63 or 3,7,9", param, ctx)
            new = range(int(match[1]), int(match[2] or match[1]) + 1)
            if len(numbers) + len(new) > LONGEST:
                self.fail(f"{value!r} is more than {LONGEST:,} numbers; use several commands", param, ctx)
            numbers.extend(new)
        return numbers


class Steps(click.ParamType):
    """A number of steps, or ``ddim50``."""

    name = "N|ddimN"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | str:
        match = re.fullmatch(r"(ddim|-)?([0-9]{1,18})", text := str(value))
        if match is None:
            self.fail(f"{value!r} is not a number of steps; write 25, or ddim25 for a whole stride", param, ctx)
        if int(match[2]) > MAX_STEPS:
            self.fail(f"{value!r} is more than {MAX_STEPS:,} steps; use 1000 or fewer", param, ctx)
        return text if match[1] == "ddim" else int(text)


class Interval(click.ParamType):
    """``0.2,5`` as two numbers."""

    name = "LO,HI"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, float]:
        try:
            low, high = (float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not an interval; write 0.2,5", param, ctx)
        return low, high


class Listed(click.ParamType):
    """Values of another type joined by commas, as a list."""

    def __init__(self, of: click.ParamType) -> None:
        self.of, self.name = of, "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[Any]:
        return [self.of.convert(part.strip(), param, ctx) for part in str(value).split(",") if part.strip()]


class Images(click.ParamType):
    """A number of images as edm2 writes it: ``200Mi``, ``512Ki``, or a plain number in millions; in kimg."""

    name = "MIMG"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]*)?)(Ki|Mi)?", str(value))
        if match is None:
            self.fail(f"{value!r} is not a number of images; write 200 (millions), or 200Mi", param, ctx)
        return float(match[1]) * {"Ki": 2**10 / 1000, "Mi": 2**20 / 1000, None: 1000}[match[2]]


Options = dict[str, list[Callable[..., Any]]]
"""Title of a group -> its options."""


class GroupedCommand(click.Command):
    """Options under titles; the spellings of other projects are understood, and not listed.

    ``aliases`` maps a spelling to ours; ``refused`` maps an option that has no counterpart here to what to do instead.
    """

    def __init__(
        self,
        *args: Any,
        aliases: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.aliases, self.refused = dict(aliases or {}), dict(refused or {})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [self._ours(arg) for arg in args])

    def _ours(self, arg: str) -> str:
        name, equals, value = arg.partition("=")
        spelled = name.replace("_", "-")
        if spelled in self.refused:
            raise UserError(f"{name}: {self.refused[spelled]}")
        return self.aliases.get(spelled, name) + equals + value

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(param, "group", "Options"), []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)


def with_options(groups: Options) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a command these options, in this order."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for title, options in reversed(groups.items()):
            for option in reversed(options):
                command = option(command)
                command.__click_params__[-1].group = title  # type: ignore[attr-defined]
        return command

    return decorate


def switch(*names: str, help: str = "", hidden: bool = False) -> Any:
    """A flag that also takes ``=True`` and ``=False``, as EDM's options do."""
    return click.option(
        *names, type=bool, is_flag=False, flag_value=True, default=None, metavar="[BOOL]", help=help, hidden=hidden
    )
