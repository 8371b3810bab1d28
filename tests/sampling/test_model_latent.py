"""Sampling of latent models, and of pixels on discrete schedules, compared with the samplers called by hand."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import resolve
from diffit.configs.schema import Config
from diffit.diffusion.adm import Schedule, denoiser
from diffit.diffusion.samplers import ddim, ddpm, dpm_solver_pp, euler, heun
from diffit.models.image import ImageDiffiT
from diffit.models.latent import LatentDiffiT
from diffit.sampling.labels import choose_labels, random_labels
from diffit.sampling.model import Model, prepare, sample
from diffit.utils.randomness import PerSampleNoise

CLASSES = 5
SCHEDULE = Schedule.named("linear")


def latent(num_classes: int = CLASSES, **sampling) -> tuple[LatentDiffiT, Config]:
    """Every part has an effect on the output, which stays of order one."""
    config = get_preset("latent-debug")
    changes = {
        "model": config.model.model_copy(update={"num_classes": num_classes, "input_size": (4, 6)}),
        "sampling": config.sampling.model_copy(update={"steps": 6} | sampling),
    }
    config = config.model_copy(update=changes)
    net = LatentDiffiT.from_config(config.model).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.normal_(std=0.15, generator=generator)
    return net, config


def calls_of(net: torch.nn.Module) -> list[tuple[Tensor, ...]]:
    seen: list[tuple[Tensor, ...]] = []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments))
    return seen


def first_noise(seeds, source: PerSampleNoise | None = None) -> Tensor:
    return (source or PerSampleNoise(seeds))(torch.empty(len(seeds), 4, 4, 6, dtype=torch.float64))


HOW = [
    {"sampler": "ddpm"},
    {"sampler": "ddim"},
    {"sampler": "ddim", "eta": 1.0, "steps": 10, "spacing": "leading"},
    {"sampler": "heun", "S_churn": 2.0},
    {"sampler": "dpm++"},
    {"sampler": "ddpm", "cfg_scale": 2.0, "cfg_power": 4.0},
]


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_sample_is_the_same_in_any_company_and_order(how):
    net, config = latent(**how)
    together = sample(net, config, range(7))
    assert together.shape == (7, 4, 4, 6)
    assert together.dtype == torch.float32
    for seeds in ([3], [6, 0, 2]):
        assert_close(sample(net, config, seeds), together[seeds], rtol=1e-4, atol=1e-4)
    assert (together[1:] - together[:-1]).flatten(1).norm(dim=1).min() > 0.1


def test_the_noise_of_each_step_is_that_of_the_sample():
    net, config = latent(sampler="ddpm")
    states: list[Tensor] = []
    sample(net, config, [5, 8], callback=lambda i, t, x, x0: states.append(x))
    sources = [PerSampleNoise([seed]) for seed in (5, 8)]
    start = torch.cat([first_noise([seed], source) for seed, source in zip((5, 8), sources, strict=True)])
    assert_close(states[0], start, rtol=0, atol=0)
    walk = SCHEDULE.respace(6)
    for x, x_next, i in zip(states, states[1:], range(5, 0, -1), strict=False):
        output = net(x.float(), walk.timesteps[i].float().reshape(1), random_labels([5, 8], CLASSES)).double()
        mean, log_variance, _ = walk.p_step(output, x, torch.tensor(i))
        noise = torch.cat([first_noise([seed], source) for seed, source in zip((5, 8), sources, strict=True)])
        assert_close(x_next, mean + (log_variance / 2).exp() * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "by_hand"),
    [
        ("ddpm", lambda net, x, source: ddpm(net, x, SCHEDULE.respace(6), noise_source=source)),
        ("ddim", lambda net, x, source: ddim(net, x, SCHEDULE.respace(6))),
        ("euler", lambda net, x, source: euler(denoiser(net, SCHEDULE), x, SCHEDULE.respace(6).sigmas())),
        ("heun", lambda net, x, source: heun(denoiser(net, SCHEDULE), x, SCHEDULE.respace(6).sigmas())),
        ("dpm++", lambda net, x, source: dpm_solver_pp(denoiser(net, SCHEDULE), x, SCHEDULE.multistep_sigmas(6))),
    ],
)
def test_the_name_of_a_sampler_is_that_sampler(name, by_hand):
    net, config = latent(sampler=name)
    labels = torch.tensor([1, 4])
    source = PerSampleNoise([8, 9])
    start = first_noise([8, 9], source)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        return net(x.float(), t.float(), labels).double()

    expected = by_hand(predict, start, source)
    assert_close(sample(net, config, [8, 9], labels), expected.float(), rtol=1e-5, atol=1e-5)


def test_the_network_sees_one_original_timestep_a_step():
    net, config = latent(sampler="ddpm", steps=4)
    seen = calls_of(net)
    sample(net, config, [0, 1, 2])
    assert [t.tolist() for _, t, _ in seen] == [[999.0], [666.0], [333.0], [0.0]]
    assert {x.dtype for x, _, _ in seen} == {torch.float32}


def test_guidance_is_the_released_one():
    """e = u + s(t)·(c − u) on the first three channels, with CONTRACT's scale; the rest is conditional."""
    net, config = latent(sampler="ddim", steps=5, cfg_scale=4.4, cfg_power=4.0, cfg_channels=3)
    labels, null = torch.tensor([2, 0]), torch.tensor([CLASSES, CLASSES])
    seen = calls_of(net)
    found = sample(net, config, [3, 4], labels)
    assert [y.tolist() for _, _, y in seen][:3] == [[2, 0], [2, 0], [5, 5]], "the first step's scale is 1"
    assert len(seen) == 9

    def predict(x: Tensor, t: Tensor) -> Tensor:
        c, u = (net(x.float(), t.float(), y).double() for y in (labels, null))
        s = 1 + 3.4 * (1 - torch.cos(torch.pi * (1 - t.double() / 1000) ** 4)) / 2
        return torch.cat([u[:, :3] + s * (c[:, :3] - u[:, :3]), c[:, 3:]], dim=1)

    assert_close(found, ddim(predict, first_noise([3, 4]), SCHEDULE.respace(5)).float(), rtol=1e-4, atol=1e-4)


def test_an_interval_is_one_of_noise_levels_and_skipping_saves_evaluations():
    walk = SCHEDULE.respace(10)
    between = [walk.sigmas()[i].item() for i in (6, 3)]  # (low, high] holds the steps 3, 4 and 5
    net, config = latent(sampler="ddpm", steps=10, cfg_scale=3.0, cfg_interval=tuple(between))
    seen = calls_of(net)
    sample(net, config, [0])
    null = [t.item() for _, t, y in seen if y.tolist() == [CLASSES]]
    assert null == walk.timesteps.flip(0)[3:6].tolist()
    seen.clear()
    net, config = latent(sampler="ddpm", steps=10, cfg_scale=4.4, cfg_power=4.0, cfg_skip=1e-2)
    seen = calls_of(net)
    sample(net, config, [0])
    expected = [
        t for t in walk.timesteps.tolist() if 1.7 * (1 - torch.cos(torch.tensor(torch.pi * (1 - t / 1000) ** 4))) > 1e-2
    ]
    assert sum(y.tolist() == [CLASSES] for _, _, y in seen) == len(expected) < 10


def test_an_unconditional_model_is_called_without_labels_and_not_guided():
    net, config = latent(0, cfg_scale=4.4, cfg_power=4.0)
    seen = calls_of(net)
    sample(net, config, [0, 1])
    assert [len(arguments) for arguments in seen] == [3] * 6
    assert all(arguments[2] is None for arguments in seen)


@pytest.mark.parametrize("sampler", ["ddpm", "dpm++"])
def test_a_prepared_network_draws_the_same_in_full_and_nearly_the_same_in_half_precision(sampler):
    net, config = latent(sampler=sampler, cfg_scale=2.0)
    expected = sample(net, config, range(3))
    prepared = prepare(latent(sampler=sampler, cfg_scale=2.0)[0])
    assert_close(sample(prepared, config, range(3)), expected, rtol=1e-4, atol=1e-4)
    half = prepare(latent(sampler=sampler, cfg_scale=2.0)[0], "bf16")
    assert half.blocks[0].attn.qkv.weight.dtype == half.x_embedder.proj.weight.dtype == torch.bfloat16
    assert half.y_embedder.embedding_table.weight.dtype == torch.float32  # it is added up, not multiplied
    found = sample(half, config, range(3), precision="bf16")
    assert found.dtype == torch.float32
    assert (found != expected).any()
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "euler", "heun", "dpm++"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_pixels_on_a_discrete_schedule_stay_within_their_range(sampler, schedule):
    config = resolve("debug", {"diffusion": schedule, "sampler": sampler, "steps": 5})
    torch.manual_seed(0)
    net = ImageDiffiT.from_config(config.model).eval()
    torch.nn.init.normal_(net.head.weight, std=0.1)
    images = sample(net, config, range(3))
    assert images.shape == (3, 3, 16, 16)
    assert images.abs().max() <= 1
    assert images.std() > 0.1
    assert_close(sample(net, config, [2]), images[2:], rtol=1e-4, atol=1e-4)


# --- classes --------------------------------------------------------------------------------------------------------


def test_labels_are_one_class_or_drawn_or_in_turn():
    _, config = latent()
    seeds = [7, 3, 7, 100]
    assert choose_labels(config, seeds, 2).tolist() == [2] * 4
    assert choose_labels(config, seeds, 0).tolist() == [0] * 4
    drawn = choose_labels(config, seeds)
    assert drawn.tolist() == choose_labels(config, seeds, "random").tolist() == random_labels(seeds, CLASSES).tolist()
    assert drawn[0] == drawn[2], "a class is a function of the seed"
    assert choose_labels(config, range(12), "balanced").tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]
    counts = torch.bincount(choose_labels(config, range(5000)), minlength=CLASSES)
    assert len(counts) == CLASSES
    assert (counts - 1000).abs().max() < 4 * (1000 * 0.8) ** 0.5
    assert choose_labels(latent(0)[1], seeds) is None


def test_the_states_of_a_trajectory_are_as_loud_as_latents_are():
    net, config = latent(sampler="heun")
    (state, _), *_ = Model(net, config).trajectory([1, 2], steps=4)
    assert_close(state.flatten(1).std(1), torch.ones(2), rtol=1e-3, atol=0)
