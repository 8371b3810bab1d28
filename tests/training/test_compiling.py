"""When a network is compiled without having been asked for, and what happens where that does not work."""

import pytest
import torch

from diffit.configs.resolve import resolve
from diffit.training import compiling
from diffit.training import step as stepping
from diffit.training.compiling import can_compile, is_compiled
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("preset", "options", "compiled"),
    [
        ("cifar10", {"minutes": 10.0}, True),
        ("cifar10", {"minutes": 9.0}, False),
        ("cifar10", {}, True),  # 200 million images
        ("cifar10", {"kimg": 100.0}, False),
        ("imagenet256", {}, True),
        ("imagenet256", {"kimg": 100.0}, False),
        ("cifar10", {"shard": True}, False),
        ("cifar10", {"grad_ckpt": True}, False),
        ("cifar10", {"kimg": 100.0, "compile": True}, True),
        ("cifar10", {"compile": False}, False),
    ],
)
def test_a_network_is_compiled_where_it_pays_or_as_asked_for(preset, options, compiled, monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    config = resolve(preset, options)
    assert is_compiled(config, GPU) is compiled
    assert config.training.compile is options.get("compile")  # another machine decides for itself
    assert is_compiled(config, torch.device("cpu")) is bool(options.get("compile"))


def test_the_length_from_which_it_pays_follows_the_work_of_an_image(monkeypatch):
    """1e17 FLOPs: of ``cifar10``, of 22 GFLOPs an image, 4.5 million; of ``imagenet256``, of 711, 140 thousand."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    for preset, kimg in {"cifar10": 4500.0, "imagenet256": 140.0}.items():
        found = [is_compiled(resolve(preset, {"kimg": share * kimg}), GPU) for share in (0.9, 1.1)]
        assert found == [False, True]


def test_where_the_compiler_does_not_work_a_run_goes_on_without_it(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("no such compiler\nat all\nand a long story")

    can_compile.cache_clear()
    monkeypatch.setattr(torch, "compile", broken)
    assert not is_compiled(resolve("cifar10", {}), GPU)
    assert "no such compiler at all" in caplog.text
    assert "story" not in caplog.text
    can_compile.cache_clear()


def test_a_step_is_that_of_the_compiled_network(monkeypatch):
    graphs = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda net, **options: graphs.append((net, options)))
    monkeypatch.setattr(stepping, "is_compiled", lambda config, device: device.type == "cpu")
    config = resolve("debug", {})
    net = build_network(config)
    Stepper(config, alone(torch.device("cpu")), net, "fp32")
    assert graphs == [(net, {"fullgraph": True})]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compiles_a_long_run(caplog):
    assert is_compiled(resolve("cifar10", {}), GPU), caplog.text
