"""What a person asks for in the page, checked; and the same as a command line and as Python."""

import math
import shlex
from dataclasses import dataclass, field
from typing import Any

from diffit.configs.sampling import steps_text
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.sampling.labels import class_title, find_class, sampled_classes

RANDOM = "random, from the seed"
SPELLED = {"cfg_scale": "cfg-scale", "cfg_interval": "cfg-interval", "cfg_channels": "cfg-channels"}
LARGEST_SEED = 2**53 - 1  # what a browser counts up to exactly


@dataclass(frozen=True)
class Request:
    """A network by its name in the page, seeds in a row, a class (None: random, from the seed), changed settings."""

    network: str
    first_seed: int
    count: int
    label: str | int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"

    @property
    def seeds(self) -> range:
        return range(self.first_seed, self.first_seed + self.count)

    def command(self, source: str, vae: str | None = None) -> str:
        """The ``diffit sample`` that makes the same images of the network ``source``."""
        last = self.first_seed + self.count - 1
        words = ["diffit", "sample", "--network", source, "--outdir", "samples"]
        words += [] if vae is None else ["--vae", vae]
        words += ["--seeds", str(self.first_seed) if self.count == 1 else f"{self.first_seed}-{last}"]
        if self.label is not None:
            words += ["--class", str(self.label)]
        for name, value in self.settings.items():
            text = f"{value[0]:g},{value[1]:g}" if isinstance(value, tuple) else str(value)
            words += [f"--{SPELLED.get(name, name)}", text]
        if self.precision != "auto":
            words += ["--precision", self.precision]
        return shlex.join(words)

    def python(self, source: str, vae: str | None = None) -> str:
        """The same as Python: the images are ``(count, C, H, W)`` in [−1, 1]."""
        precision = "" if self.precision == "auto" else f", precision={self.precision!r}"
        decoded = "" if vae is None else f", vae={vae!r}"
        how = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        label = "" if self.label is None else f", {self.label!r}"
        return (
            "import diffit\n\n"
            f"model = diffit.load({source!r}{precision}{decoded})\n"
            f"images = model.sample(range({self.first_seed}, {self.first_seed + self.count}){label}{how})"
        )


def whole(value: Any, name: str) -> int:
    """A whole number of a field of the page. Raises :class:`UserError`."""
    if not isinstance(value, int | float) or not abs(value) <= LARGEST_SEED or value != int(value):  # nan is neither
        raise UserError(f"{name} {value}: use a whole number")
    return int(value)


def real(value: Any, name: str) -> float:
    """A finite number of a field of the page. Raises :class:`UserError`."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name} {value}: use a number")
    return float(value)


def interval_of(text: Any) -> tuple[float, float]:
    """Two noise levels, spelled LOW,HIGH. Raises :class:`UserError`."""
    try:
        low, high = (float(part) for part in str(text).split(","))
    except ValueError:
        raise UserError(f"guided sigmas {text}: use two numbers, such as 0.3,5, or nothing for all") from None
    return real(low, "guided sigma"), real(high, "guided sigma")


def seed_of(value: Any) -> int:
    seed = whole(value, "seed")
    if seed < 0:
        raise UserError(f"seed {seed}: use a whole number from 0 on")
    return seed


def class_choices(config: Config) -> list[tuple[str, str]]:
    """(what the list shows, what :func:`class_of` understands): by name, with the number to search by."""
    titles = [(label, class_title(config, label)) for label in sampled_classes(config)]
    plain = {label: title in (str(label), f"class {label}") for label, title in titles}
    shown = [(title if plain[label] else f"{title} ({label})", str(label)) for label, title in titles]
    return [(RANDOM, RANDOM), *shown]


def class_of(value: str | None, config: Config) -> int | None:
    """The class that a field means: a choice of the list, a number, or a name; None is random, from the seed."""
    if value in (None, "", RANDOM) or not config.model.num_classes:
        return None
    return find_class(str(value), config)


def changed(config: Config, **asked: Any) -> dict[str, Any]:
    """Those of the settings asked for that are not what the network's file says anyway."""
    own = config.sampling
    settings = {name: value for name, value in asked.items() if value is not None and value != getattr(own, name)}
    if "steps" in settings and str(settings["steps"]) == steps_text(own):
        del settings["steps"]
    if "steps" in settings and own.fitted:  # else the steps alone would choose the sampler that they were fitted for
        settings.setdefault("sampler", asked["sampler"])
    return settings
