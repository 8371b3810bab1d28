"""From network and seeds to images: a sample depends on its seed and nothing else."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.configs.sampling import Sampling
from diffit.configs.schema import Config, Distillation
from diffit.diffusion.adm import predictor, schedule_of
from diffit.diffusion.edm import denoiser, edm_sigmas
from diffit.diffusion.samplers import euler, heun
from diffit.errors import UserError
from diffit.models import build
from diffit.models.image import ImageDiffiT
from diffit.sampling.labels import random_labels
from diffit.sampling.model import Model, prepare, sample
from diffit.utils.images import to_float, to_uint8
from diffit.utils.precision import resolve_precision
from diffit.utils.randomness import PerSampleNoise

CLASSES = 5


def tiny(num_classes: int = 0, **sampling) -> tuple[ImageDiffiT, Config]:
    """The debug preset with a head that is not zero."""
    config = get_preset("debug")
    config = config.model_copy(
        update={
            "model": config.model.model_copy(update={"num_classes": num_classes, "image_size": (8, 12)}),
            "sampling": Sampling(**{"steps": 2} | sampling),
        }
    )
    torch.manual_seed(0)
    net = ImageDiffiT.from_config(config.model).eval()
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return net, config


def labels_seen(net: ImageDiffiT) -> list[Tensor]:
    seen: list[Tensor] = []
    net.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[2]))
    return seen


@pytest.mark.parametrize(
    "how", [{}, {"S_churn": 2.0}, {"sampler": "euler"}, {"cfg_scale": 2.0, "sigma_max": 10.0}], ids=str
)
def test_a_sample_is_the_same_in_any_company_and_order(how):
    net, config = tiny(CLASSES, **how)
    together = sample(net, config, range(7))
    assert together.shape == (7, 3, 8, 12)
    assert together.dtype == torch.float32
    for seeds in ([3], [6, 0, 2]):
        assert_close(sample(net, config, seeds), together[seeds], rtol=1e-4, atol=1e-4)
    assert (together[1:] - together[:-1]).flatten(1).norm(dim=1).min() > 0.1


def test_no_seeds_are_no_images():
    for classes in (0, CLASSES):
        net, config = tiny(classes)
        assert sample(net, config, []).shape == (0, 3, 8, 12)


def test_ambient_randomness_is_neither_read_nor_moved():
    net, config = tiny(CLASSES, S_churn=2.0)
    torch.manual_seed(0)
    first = sample(net, config, [1, 2])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert_close(sample(net, config, [1, 2]), first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_labels_each_seed_draws_a_class_and_never_the_null_class():
    net, config = tiny(CLASSES, steps=1)
    seen = labels_seen(net)
    sample(net, config, range(200))
    assert len(seen) == 1
    assert set(seen[0].tolist()) == set(range(CLASSES))
    assert seen[0].tolist() == random_labels(range(200), CLASSES).tolist()


def test_a_class_changes_the_image_but_not_its_noise():
    net, config = tiny(CLASSES)
    starts = []
    images = [
        sample(net, config, [4], torch.tensor([label]), callback=lambda i, sigma, x, _: i or starts.append(x))
        for label in (0, 1)
    ]
    assert_close(starts[0], starts[1], rtol=0, atol=0)
    assert (images[0] != images[1]).any()


def test_guidance_evaluates_the_null_class_and_a_scale_of_one_does_not():
    net, config = tiny(CLASSES)
    seen = labels_seen(net)
    plain = sample(net, config, [0, 1], torch.tensor([3, 4]))
    assert {tuple(labels.tolist()) for labels in seen} == {(3, 4)}
    seen.clear()
    guided = sample(net, config, [0, 1], [3, 4], guidance=1.5)
    assert [tuple(labels.tolist()) for labels in seen] == [(3, 4), (CLASSES, CLASSES)] * 3
    assert (plain != guided).any()


def test_an_unconditional_network_is_called_without_labels():
    net, config = tiny(cfg_scale=3.0)
    seen = labels_seen(net)
    sample(net, config, [0])
    assert seen == [None] * 3


@pytest.mark.parametrize(("name", "solver"), [("heun", heun), ("euler", euler)])
def test_it_is_the_solver_on_the_schedule_of_the_configuration(name, solver):
    net, config = tiny(sampler=name, steps=4, sigma_min=0.01, sigma_max=20.0, rho=5.0)
    with torch.no_grad():
        noise = PerSampleNoise([8, 9])(torch.empty(2, 3, 8, 12, dtype=torch.float64))
        expected = solver(denoiser(net), noise, edm_sigmas(4, sigma_min=0.01, sigma_max=20.0, rho=5.0))
    assert_close(sample(net, config, [8, 9]), expected.float())


def test_the_state_is_float64_and_the_network_sees_float32():
    net, config = tiny()
    states, inputs = set(), set()
    net.register_forward_pre_hook(lambda _, arguments: inputs.add(arguments[0].dtype))
    sample(net, config, [0], callback=lambda i, sigma, x, denoised: states.update([x.dtype, denoised.dtype]))
    assert states == {torch.float64}
    assert inputs == {torch.float32}


def test_half_precision_is_near_full_precision():
    net, config = tiny(sigma_max=1.0)
    full, half = (sample(net, config, range(3), precision=precision) for precision in ("fp32", "bf16"))
    assert (full != half).any()
    assert_close(half, full, rtol=0, atol=0.05)


def test_a_prepared_network_is_evaluated_in_its_precision_wherever_it_is_called():
    """Its matrices are bfloat16, which no float32 state can be multiplied with."""
    net, config = tiny(CLASSES, cfg_scale=2.0)
    x, labels, sigma = torch.randn(2, 3, 8, 12), torch.tensor([0, 3]), torch.tensor(2.0)
    expected = Model(net, config).denoiser(labels)(x, sigma)
    unguided = denoiser(net, labels)(x, sigma)
    model = Model(prepare(net, "bf16"), config, precision="bf16")
    assert_close(model.denoiser(labels)(x, sigma), expected, rtol=0.05, atol=0.05)
    assert_close(denoiser(model.evaluate, labels)(x, sigma), unguided, rtol=0.05, atol=0.05)


def test_no_gradients_are_kept():
    net, config = tiny()
    assert not sample(net, config, [0]).requires_grad


def test_auto_precision_is_full_on_a_cpu():
    assert resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert resolve_precision("bf16", torch.device("cpu")) == "bf16"


def test_all_256_levels_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    floats = to_float(levels)
    assert floats.dtype == torch.float32
    assert (floats.min(), floats.max()) == (-1, 1)
    assert torch.equal(to_uint8(floats), levels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_floats_go_to_the_nearest_level(dtype):
    levels = torch.arange(256)
    shifts = torch.tensor([-0.49, 0.49], dtype=dtype)[:, None]
    assert torch.equal(to_uint8((levels + shifts) / 127.5 - 1), levels.to(torch.uint8).expand(2, -1))
    assert to_uint8(torch.tensor([-7.0, 7.0, -1.01, 1.01], dtype=dtype)).tolist() == [0, 255, 0, 255]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm++"])
def test_a_network_of_v_samples_as_the_network_of_its_noise(sampler):
    """Of a Gaussian for each class, guided: v = (ε − √(1 − ᾱ)·x)/√ᾱ, which follows from ε = √ᾱ·v + √(1 − ᾱ)·x."""
    config = resolve("debug", {"diffusion": "linear", "cond": True}, DataFacts(3, (16, 16), 3))
    alpha_bar = schedule_of(config.diffusion).alpha_bar.float()

    def noise_of(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a = alpha_bar[t.long()].reshape(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x - a.sqrt() * labels.reshape(-1, 1, 1, 1) / 8) / (a / 4 + 1 - a)

    def v_of(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a = alpha_bar[t.long()].reshape(-1, 1, 1, 1)
        return (noise_of(x, t, labels) - (1 - a).sqrt() * x) / a.sqrt()

    diffusion = config.diffusion.model_copy(update={"prediction": "v"})
    found = []
    for net, config_of_net in ((noise_of, config), (v_of, config.model_copy(update={"diffusion": diffusion}))):
        model = Model(net, config_of_net).with_sampling(sampler=sampler, steps=20, cfg_scale=1.5)
        found.append(
            model.sample(
                [0, 1, 2], [0, 1, 2], noise=torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
            )
        )
    assert_close(*found, rtol=0, atol=1e-4)


def another(num_classes: int = 0, **changes) -> Model:
    """A network of other weights for the same images."""
    net, config = tiny(num_classes)
    torch.manual_seed(7)
    torch.nn.init.normal_(net.head.weight, std=0.1)
    return Model(net, config.model_copy(update=changes))


@pytest.mark.parametrize("of_guide", [0, CLASSES])
def test_a_guide_stands_for_the_network_without_the_class(of_guide):
    """g + s·(m − g) by hand, of the denoised images; a guide of classes sees the class too."""
    model, guide = Model(*tiny(CLASSES, cfg_scale=3.0)), another(of_guide)
    labels, x, sigma = torch.tensor([2, 4]), torch.randn(2, 3, 8, 12), torch.tensor(1.5)
    ours = denoiser(model.net, labels)(x, sigma)
    theirs = denoiser(guide.net, labels if of_guide else None)(x, sigma)
    found = model.guided_by(guide).denoiser(labels)(x, sigma)
    assert_close(found, theirs + 3 * (ours - theirs))
    within = model.guided_by(guide).with_sampling(cfg_interval=(0.1, 1.0)).denoiser(labels)
    assert_close(within(x, sigma), ours)


def test_a_model_without_classes_is_guided_by_another_and_by_itself_not_at_all():
    plain = Model(*tiny())
    with pytest.raises(UserError, match="no classes to be guided to"):
        plain.with_sampling(cfg_scale=2.0)
    with pytest.raises(UserError, match="without guidance it has no effect"):
        plain.guided_by(another()).with_sampling(cfg_interval=(0.1, 1.0))
    noise = torch.randn(2, 3, 8, 12)
    unguided = plain.sample(noise=noise)
    assert_close(plain.guided_by(plain).sample(noise=noise, cfg_scale=2.0), unguided, atol=1e-4, rtol=1e-4)
    assert (plain.guided_by(another()).sample(noise=noise, cfg_scale=2.0) - unguided).abs().max() > 0.05


def test_on_a_discrete_schedule_a_guide_moves_the_noise_and_leaves_the_variances():
    configs = [resolve("latent-debug", {}), resolve("latent-debug", {"prediction": "v"})]
    torch.manual_seed(0)
    nets = [build(config.model).eval() for config in configs]
    for net in nets:
        torch.nn.init.normal_(net.final_layer.linear.weight, std=0.1)
    model, guide = (Model(net, config) for net, config in zip(nets, configs, strict=True))
    schedule, t, x = schedule_of(configs[0].diffusion), torch.tensor([300.0]), torch.randn(2, 4, 4, 4)
    ours, theirs = predictor(nets[0])(x, t), predictor(nets[1], v_on=schedule)(x, t)
    guided = model.guided_by(guide).with_sampling(cfg_scale=2.0, cfg_channels="all")._guided(None, schedule)(x, t)
    assert_close(guided[:, :4], theirs[:, :4] + 2 * (ours[:, :4] - theirs[:, :4]))
    assert torch.equal(guided[:, 4:], ours[:, 4:])


def test_a_null_class_that_was_never_trained_guides_nothing():
    net, config = tiny(CLASSES, cfg_scale=2.0)
    config = config.model_copy(update={"training": config.training.model_copy(update={"label_drop": 0.0})})
    labels = torch.tensor([0])
    for do in (lambda: Model(net, config).denoiser(labels), lambda: Model(net, config).sample([0], [0])):
        with pytest.raises(UserError, match="needs the null class, which label_drop 0 never trains"):
            do()
    assert Model(net, config).guided_by(another()).sample([0], [0], steps=1).isfinite().all()


def test_a_student_neither_guides_nor_is_guided():
    spec = Distillation(method="consistency", teacher="a.safetensors", teacher_sha256="0" * 64)
    plain, student = Model(*tiny()), another(distillation=spec)
    for model, guide in ((plain, student), (student, plain)):
        with pytest.raises(UserError, match="between two models that were not distilled"):
            model.guided_by(guide)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"model": get_preset("debug").model}, r"samples .*: \(3, 16, 16\), not \(3, 8, 12\)"),
        ({"diffusion": get_preset("imagenet256").diffusion}, "noise levels"),
        ({"model": tiny(3)[1].model}, "classes .*: 3, not 5"),
    ],
)
def test_a_guide_that_does_not_fit_is_refused(changes, what):
    with pytest.raises(UserError, match=f"the guide has other {what}"):
        Model(*tiny(CLASSES)).guided_by(another(CLASSES, **changes))
