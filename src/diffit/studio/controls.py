"""The controls that several tabs share: a network with its classes, and how it is sampled."""

from dataclasses import dataclass
from typing import Any, get_args

import gradio as gr

from diffit.configs.sampling import DISCRETE, Sampling, steps_text
from diffit.configs.schema import Config
from diffit.errors import UserError
from diffit.sampling.model import Model
from diffit.studio.common import PRIVATE, checked
from diffit.studio.request import RANDOM, Request, changed, class_choices, class_of, interval_of, real, seed_of, whole
from diffit.studio.shelf import Shelf
from diffit.weights import read_header

SAMPLERS: tuple[str, ...] = get_args(Sampling.model_fields["sampler"].annotation)
PRECISIONS = ["auto", "fp32", "bf16"]
CHANNELS = ["all", "3"]
EVERYWHERE = (0.0, 1e6)  # no noise level is above this


@dataclass(frozen=True)
class Chooser:
    """A network and one of its classes."""

    network: gr.Dropdown
    label: gr.Dropdown


def chooser(shelf: Shelf, title: str = "Network") -> Chooser:
    network = network_list(shelf, title)
    return Chooser(network, class_list(shelf, network))


def network_list(shelf: Shelf, title: str = "Network") -> gr.Dropdown:
    names = list(shelf.networks())
    network = gr.Dropdown(
        names, value=names[0] if names else None, label=title, allow_custom_value=True, elem_classes="network"
    )
    # A run that is training writes new snapshots.
    network.focus(lambda: gr.update(choices=list(shelf.networks())), None, network, **PRIVATE)
    return network


def class_list(shelf: Shelf, network: gr.Dropdown, title: str = "Class") -> gr.Dropdown:
    """The classes of the network that is chosen; a class that it has too stays chosen."""

    def shown(name: str | None, chosen: str | None) -> dict[str, Any]:
        config = config_of(shelf, name)
        known = config is not None and config.model.num_classes > 0
        choices = class_choices(config) if config is not None and known else [("the model has none", RANDOM)]
        update = {"choices": choices, "interactive": known}
        # Not sent again where it stays: what is chosen while this is on its way would be lost.
        return update if chosen in [value for _, value in choices] else update | {"value": RANDOM}

    label = gr.Dropdown(
        label=title, allow_custom_value=True, elem_classes="class", min_width=150, **shown(network.value, None)
    )
    network.input(checked(lambda *now: gr.update(**shown(*now))), [network, label], label, **PRIVATE)
    return label


def config_of(shelf: Shelf, name: str | None) -> Config | None:
    """The configuration in a network's file, no tensor of which is read; None where it cannot be read now."""
    source = shelf.networks().get(name or "")
    try:
        return None if source is None else read_header(source)[0]
    except UserError:
        return None


def steps_field(shelf: Shelf, network: gr.Dropdown) -> gr.Number:
    """Steps, those of the network's file where nothing else is asked for."""

    def steps(name: str | None) -> int:
        config = config_of(shelf, name)
        return Sampling().steps if config is None else config.sampling.steps

    field = gr.Number(steps(network.value), label="Steps", precision=0, min_width=110)
    network.input(checked(steps), network, field, **PRIVATE)
    return field


def solver_controls(shelf: Shelf, network: gr.Dropdown) -> list[Any]:
    """Sampler, steps, guidance and precision, filled with what the network's file says when another one is chosen.

    The components are in the order in which :func:`ask` takes their values.
    """
    config = config_of(shelf, network.value)
    sampler, steps, scale, interval, channels, precision = solver_values(config)
    with gr.Row():
        components: list[Any] = [
            gr.Dropdown(_samplers(config), value=sampler, label="Sampler", min_width=110),
            gr.Number(steps, label="Steps", precision=0, min_width=110),
            gr.Dropdown(PRECISIONS, value=precision, label="Precision", min_width=110),
        ]
    with gr.Row():
        components[2:2] = [
            gr.Number(scale, label="Guidance (1: none)", step=0.1, min_width=110, interactive=_guided(config)),
            gr.Textbox(interval, label="Guided sigmas", placeholder="all, or LOW,HIGH", min_width=110),
            gr.Dropdown(CHANNELS, value=channels, label="Guided channels", min_width=110),
        ]

    def follow(name: str) -> list[Any]:
        config = config_of(shelf, name)
        sampler, steps, scale, *rest = solver_values(config)
        return [
            gr.update(choices=_samplers(config), value=sampler),
            steps,
            gr.update(value=scale, interactive=_guided(config)),
            *rest,
        ]

    network.input(checked(follow), network, components, **PRIVATE)
    return components


def solver_values(config: Config | None, settings: dict[str, Any] | None = None, precision: str = "auto") -> list[Any]:
    """What the controls show for a network's file with these ``settings`` changed."""
    values = (Sampling() if config is None else config.sampling).model_dump() | (settings or {})
    interval = ",".join(f"{sigma:g}" for sigma in values["cfg_interval"] or ())
    channels = str(values["cfg_channels"] or "all")
    return [values["sampler"], values["steps"], values["cfg_scale"], interval, channels, precision]


def _samplers(config: Config | None) -> list[str]:
    edm = config is not None and config.diffusion.kind == "edm"
    return [name for name in SAMPLERS if not (edm and name in DISCRETE)]


def _guided(config: Config | None) -> bool:
    return config is None or config.model.num_classes > 0


def settings_of(config: Config, *solver: Any) -> dict[str, Any]:
    """What differs from the network's file. Raises :class:`UserError`."""
    sampler, steps, scale, interval, channels = solver
    own = config.sampling
    asked: dict[str, Any] = {"sampler": sampler}
    if scale is not None:
        asked["cfg_scale"] = real(scale, "guidance scale")
    if steps is not None:
        count = whole(steps, "steps")
        # The file's own spelling, such as ddim50, as long as nobody asks for another number.
        asked["steps"] = steps_text(own) if count == own.steps and sampler == own.sampler else count
    if interval or own.cfg_interval is not None:
        asked["cfg_interval"] = interval_of(interval) if interval else EVERYWHERE
    if channels != str(own.cfg_channels or "all"):
        if channels not in CHANNELS:
            raise UserError(f"guided channels {channels}: use one of {', '.join(CHANNELS)}")
        asked["cfg_channels"] = channels if channels == "all" else int(channels)
    return changed(config, **asked)


def ask(
    shelf: Shelf, network: str | None, label: str | None, first: Any, count: Any, *solver: Any
) -> tuple[Request, Model]:
    """What the controls ask for, checked, and the model with its settings. Raises :class:`UserError`."""
    *how, precision = solver
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision}: use one of {', '.join(PRECISIONS)}")
    number, steps = whole(count, "images"), None if how[1] is None else whole(how[1], "steps")
    shelf.require_few(number, steps)  # before the network is read
    model = shelf.model(network, precision)
    settings = settings_of(model.config, *how)
    request = Request(network or "", seed_of(first), number, class_of(label, model.config), settings, precision)
    model = model.with_sampling(**settings)
    shelf.require_memory(model, number)
    return request, model


def prepared(shelf: Shelf, network: str | None, images: Any, steps: Any = None) -> Model:
    """A network as its file says it is sampled, in so many ``steps``, for so many ``images``. Raises UserError."""
    number, some = whole(images, "images"), None if steps is None else whole(steps, "steps")
    shelf.require_few(number, some)
    model = shelf.model(network)
    if some is not None and some != model.config.sampling.steps:
        model = model.with_sampling(steps=some)
    shelf.require_memory(model, number)
    return model
