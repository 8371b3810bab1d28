"""Configurations refuse what they do not know, cannot be changed, and survive JSON."""

import json
import math

import pytest
from pydantic import ValidationError

from diffit.configs.presets import PRESETS, cifar10, debug, get_preset
from diffit.configs.sampling import Sampling
from diffit.configs.schema import Config, EDMDiffusion, ImageModel, StageSpec, Training
from diffit.diffusion.adm import Schedule
from diffit.errors import UserError

STAGE = {"blocks": 1, "width": 8, "heads": 2, "window": 4}
MODEL = {"image_size": (8, 8), "stages": (STAGE,)}
RECIPE = {"batch": 8, "kimg": 1.0, "lr": 1e-3}


def as_json(*path: str | int, **changes) -> str:
    """The debug preset as JSON, with changes at a place in it."""
    whole = debug().model_dump(mode="json")
    part = whole
    for key in path:
        part = part[key]
    part |= changes
    return json.dumps(whole)


@pytest.mark.parametrize(
    "path", [(), ("model",), ("model", "stages", 0), ("diffusion",), ("sampling",), ("training",), ("data",)], ids=str
)
def test_unknown_keys_are_refused_at_every_level_by_name_and_source(path):
    place = ".".join(map(str, [*path, "colour"]))
    with pytest.raises(UserError) as caught:
        Config.from_json(as_json(*path, colour="red"), "run/options.json")
    assert str(caught.value) == f"run/options.json: {place}: unknown key"


@pytest.mark.parametrize("path", ["preset", "model", "sampling", "training.lr", "data.path", "model.dropout"])
def test_nothing_can_be_assigned(path):
    *parents, name = path.split(".")
    target = debug()
    for parent in parents:
        target = getattr(target, parent)
    with pytest.raises(ValidationError, match="frozen"):
        setattr(target, name, getattr(target, name))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]()
    text = config.model_dump_json()
    assert Config.from_json(text, "text") == config
    assert Config.from_json(json.dumps(json.loads(text)), "text") == config


FLOATS = [
    (kind, needed, name)
    for kind, needed in ((EDMDiffusion, {}), (Sampling, {}), (Training, RECIPE), (ImageModel, MODEL))
    for name, default in kind(**needed)
    if isinstance(default, float)
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize(("kind", "needed", "name"), FLOATS, ids=[name for *_, name in FLOATS])
def test_a_number_is_refused_or_survives_json(kind, needed, name, value):
    try:
        config = kind(**needed | {name: value})
    except ValidationError:
        return
    assert kind.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("kind", "values", "said"),
    [
        (StageSpec, STAGE | {"width": 10, "heads": 4}, "width 10 does not divide into 4 heads"),
        (StageSpec, STAGE | {"blocks": 0}, "greater than or equal to 1"),
        (StageSpec, STAGE | {"window": 0}, "greater than or equal to 1"),
        (StageSpec, STAGE | {"heads": -2}, "greater than or equal to 1"),
        (ImageModel, MODEL | {"stages": ()}, "at least 1 item"),
        (ImageModel, MODEL | {"stages": (STAGE,) * 5}, "5 stages halve 8x8 pixels to nothing"),
        (ImageModel, MODEL | {"image_size": (0, 8)}, "greater than or equal to 1"),
        (ImageModel, MODEL | {"image_size": 8}, "valid tuple"),
        (ImageModel, MODEL | {"dropout": 1.0}, "less than 1"),
        (ImageModel, MODEL | {"num_classes": -1}, "greater than or equal to 0"),
        (ImageModel, MODEL | {"mlp_ratio": 0.0}, "greater than 0"),
        (ImageModel, MODEL | {"channels": 3.5}, "valid integer"),
        (ImageModel, MODEL | {"channels": "3"}, "valid integer"),
        (Sampling, {"sigma_min": 80.0, "sigma_max": 80.0}, "sigma_min 80 must be below sigma_max 80"),
        (Sampling, {"steps": 0}, "greater than or equal to 1"),
        (Sampling, {"steps": "ddim0"}, "or ddim50 and the like"),
        (Sampling, {"sampler": "dim"}, "'heun', 'euler'.* or 'ddim'"),
        (Sampling, {"S_noise": math.inf}, "finite"),
        (Sampling, {"cfg_scale": math.nan}, "finite"),
        (Training, RECIPE | {"lr": math.nan}, "finite"),
        (Training, RECIPE | {"lr": 0.0}, "greater than 0"),
        (Training, RECIPE | {"kimg": -1.0}, "greater than 0"),
        (Training, RECIPE | {"label_drop": 1.5}, "less than or equal to 1"),
        (Training, RECIPE | {"augment": math.nan}, "less than or equal to 1|greater than or equal to 0"),
        (Training, RECIPE | {"batch_gpu": 0}, "greater than or equal to 1"),
        (Training, RECIPE | {"seed": -1}, "greater than or equal to 0"),
        (Training, RECIPE | {"precision": "int4"}, "'auto', 'fp32', 'bf16' or 'fp16'"),
        (Training, RECIPE | {"mirror": 1}, "valid boolean"),
        (Training, RECIPE | {"betas": (0.9, 1.0)}, "less than 1"),  # Adam would refuse it after all the preparation
        (EDMDiffusion, {"P_std": 0.0}, "greater than 0"),
    ],
)
def test_impossible_values_are_refused(kind, values, said):
    with pytest.raises(ValidationError, match=said):
        kind(**values)


@pytest.mark.parametrize(
    ("path", "changes", "said"),
    [
        (("training",), {"lr": -0.5}, r"training\.lr: -0\.5.*greater than 0"),
        (("training",), {"lr": -0.5, "batch": 0}, r"training\.batch: 0.*; training\.lr: -0\.5"),
        (("model", "stages", 1), {"heads": 5}, r"model\.stages\.1: width 32 does not divide into 5 heads"),
        (("model",), {"family": "video"}, r"model\.family: 'video'"),
        (("sampling",), {"sampler": "ddim"}, r"sampler ddim needs a discrete schedule.*heun, euler"),
        (("sampling",), {"steps": "ddim50"}, r"steps ddim50 needs a discrete schedule"),
        (("diffusion",), {"kind": "cosine"}, r"diffusion\.kind: 'cosine'"),
    ],
)
def test_an_impossible_value_is_named_with_its_place(path, changes, said):
    with pytest.raises(UserError, match=f"source: {said}") as caught:
        Config.from_json(as_json(*path, **changes), "source")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("preset", "changes", "said"),
    [
        ("imagenet256", {"steps": 1001}, "steps 1001: the schedule has 1000 timesteps"),
        ("imagenet256", {"steps": "ddim300"}, "steps ddim300: no whole stride takes 300 of 1000"),
        ("imagenet256", {"steps": "ddim2000"}, "steps 2000: the schedule has 1000 timesteps"),
        ("imagenet256", {"cfg_interval": (3.0, 2.0)}, "cfg_interval 3,2 is empty"),
        ("cifar10", {"steps": "ddim50"}, "steps ddim50 needs a discrete schedule"),
        ("cifar10", {"sampler": "ddpm"}, "sampler ddpm needs a discrete schedule"),
        ("cifar10", {"cfg_power": 4.0}, "power-cosine scale is a function of timesteps"),
    ],
)
def test_sampling_that_does_not_suit_the_diffusion_is_refused(preset, changes, said):
    values = get_preset(preset).model_dump()
    values["sampling"] |= changes
    with pytest.raises(ValueError, match=said):
        Config.model_validate(values)


@pytest.mark.parametrize("steps", [1, 25, 1000, "ddim50", "ddim1", "ddim1000", "ddim334"])
def test_possible_steps_are_accepted(steps):
    values = get_preset("imagenet256").model_dump()
    values["sampling"]["steps"] = steps
    sampling = Config.model_validate(values).sampling
    assert len(Schedule.named("linear").respace(sampling.steps, sampling.spacing)) == int(
        str(steps).removeprefix("ddim")
    )


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match=r"source: training: Field required"):
        Config.from_json(cifar10().model_dump_json(exclude={"training"}), "source")


def test_a_square_of_stages_may_shrink_to_one_pixel():
    assert len(ImageModel(**MODEL | {"stages": (StageSpec(**STAGE),) * 4}).stages) == 4


@pytest.mark.parametrize(
    ("kimg", "batch", "steps"), [(0.07, 10, 7), (0.07, 9, 8), (200_000, 512, 390_625), (1e-9, 8, 1), (0.29, 10, 29)]
)
def test_steps_show_the_images_asked_for_and_no_more_than_a_batch_above(kimg, batch, steps):
    assert Training(batch=batch, kimg=kimg, lr=1.0).steps == steps
