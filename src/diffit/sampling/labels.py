"""Classes by name or number."""

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.utils.randomness import LABEL, numpy_generator


def names_of(config: Config) -> tuple[str, ...]:
    """The names of a model's classes in order, empty where they are not known.

    A model of 1,000 classes without names is taken as one of ImageNet, whose names torchvision has.
    """
    if config.data.class_names or config.model.num_classes != 1000:
        return config.data.class_names or ()
    try:
        from torchvision.models import ResNet18_Weights
    except ImportError:
        return ()
    return tuple(ResNet18_Weights.DEFAULT.meta["categories"])


def find_class(given: str | int, config: Config, argument: str = "class") -> int:
    """The index of a class given by number or name.

    A name is taken as it stands or else, without regard to case, as the whole name or one of the synonyms between its
    commas, where that is only one class. Raises :class:`UserError`, about ``argument``, with names that are near.
    """
    count, names, text = config.model.num_classes, names_of(config), str(given)
    if not count:
        raise UserError(f"{argument} {text}: the model has no classes; leave it out")
    if isinstance(given, str) and text in names:
        return names.index(text)
    if text.isdecimal() and int(text) < count:
        return int(text)
    wanted = text.strip().casefold()
    found = [i for i, name in enumerate(names) if wanted in _spellings(name)]
    if len(found) == 1:
        return found[0]
    if found:
        meant = ", ".join(f"{i} ({names[i]})" for i in found)
        raise UserError(f"{argument} {text}: may be {meant}; give the number")
    near = difflib.get_close_matches(wanted, [spelling for name in names for spelling in _spellings(name)], n=5)
    shown = ", ".join(dict.fromkeys(near) or names[:20]) + (", …" if len(names) > (0 if near else 20) else "")
    known = f"{shown}, or 0-{count - 1}" if names else f"0-{count - 1}"
    raise UserError(f"{argument} {text}: unknown; the model knows {known}")


def _spellings(name: str) -> set[str]:
    return {part.strip().casefold() for part in [name, *name.split(",")]}


def random_labels(seeds: Sequence[int], num_classes: int) -> Tensor:
    """A class drawn uniformly for every seed, ``(len(seeds),)`` int64 on the CPU."""
    draws = [numpy_generator(seed, LABEL).integers(num_classes) for seed in seeds]
    return torch.tensor(draws, dtype=torch.int64)


def labels_of(config: Config, seeds: Sequence[int], policy: int | str = "random") -> Tensor | None:
    """A class a seed, ``(len(seeds),)``; None for an unconditional model.

    ``policy`` is the class itself, or ``random`` (drawn by the seed), or ``balanced`` (the seeds take turns).
    """
    classes = config.model.num_classes
    if not classes:
        return None
    if isinstance(policy, int):
        return torch.full((len(seeds),), policy)
    return random_labels(seeds, classes) if policy == "random" else torch.tensor(list(seeds)) % classes


def draw_labels(config: Config, real: Tensor | None, seeds: Sequence[int]) -> tuple[Tensor | None, str]:
    """A class for every seed, and in words how: as often as in the training set where its labels are at hand.

    ``real`` (N,) are those labels. A function of the seed, as the images are.
    """
    classes = config.model.num_classes
    if not classes:
        return None, "none: the model is unconditional"
    if real is None:
        return random_labels(seeds, classes), "uniform over the classes"
    return real[random_labels(seeds, len(real))], "drawn from the labels of the training set"
