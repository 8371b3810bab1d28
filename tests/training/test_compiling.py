"""When a network is compiled without having been asked for, and what happens where that does not work."""

from functools import partialmethod
from itertools import repeat

import pytest
import torch

from diffit.configs.presets import get_preset
from diffit.configs.resolve import resolve
from diffit.configs.schema import Distillation
from diffit.training import compiling
from diffit.training.compiling import can_compile, decide_compile
from diffit.training.pictures import save_fakes
from diffit.training.plan import take_over
from diffit.training.run_dir import same_run
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes, alone
from helpers import run_processes

CPU = torch.device("cpu")
GPU = Processes(0, 1, torch.device("cuda"))


def compiles(config, procs):
    return decide_compile(config, procs).training.compile


@pytest.fixture(autouse=True)
def kept_settings():
    yield
    torch.compiler.reset()
    torch._dynamo.config.suppress_errors = False


@pytest.mark.parametrize(
    ("preset", "options", "compiled"),
    [
        ("cifar10", {"minutes": 15.0}, True),
        ("cifar10", {"minutes": 14.0}, False),
        ("small32", {}, False),
        ("cifar10", {}, True),  # 200 million images
        ("cifar10", {"kimg": 100.0}, False),
        ("imagenet256", {}, False),
        ("cifar10", {"shard": True}, False),
        ("cifar10", {"grad_ckpt": True}, False),
        ("cifar10", {"kimg": 100.0, "compile": True}, True),
        ("cifar10", {"compile": False}, False),
    ],
)
def test_a_network_is_compiled_where_it_pays_or_as_asked_for(preset, options, compiled, monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    config = resolve(preset, options)
    assert compiles(config, GPU) is compiled
    assert compiles(config, alone(CPU)) is bool(options.get("compile"))


def test_another_machine_decides_for_itself(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    config = resolve("cifar10", {})
    begun = decide_compile(config, GPU)
    assert begun.training.compile
    assert same_run(config, begun)
    assert decide_compile(take_over(config, begun), alone(CPU)).training.compile is False
    assert resolve(begun, {}).training.compile is None  # as --config does with a run's options
    assert resolve(begun, {"compile": True}).training.compile


def test_a_student_is_not_compiled_by_itself(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    config = get_preset("cifar10")
    student = config.model_copy(
        update={"distillation": Distillation(method="consistency", teacher="t.safetensors", teacher_sha256="0")}
    )
    assert compiles(config, GPU)
    assert not compiles(student, GPU)


def test_the_length_from_which_it_pays_follows_the_work_of_an_image(monkeypatch):
    """5e16 FLOPs: of ``cifar10``, whose images take 22 GFLOPs each in training, 2.27 million."""
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    assert [compiles(resolve("cifar10", {"kimg": kimg}), GPU) for kimg in (2200.0, 2340.0)] == [False, True]


def test_none_compiles_where_one_of_the_processes_cannot(monkeypatch):
    monkeypatch.setattr(compiling, "can_compile", lambda device: True)
    monkeypatch.setattr(Processes, "max", lambda procs, value: max(value, 1))  # another cannot
    assert not compiles(resolve("cifar10", {}), GPU)


def test_where_the_compiler_does_not_work_a_run_goes_on_without_it(monkeypatch, caplog):
    def broken(*args, **options):
        raise RuntimeError("no such compiler\nat all\nand a long story")

    monkeypatch.setattr(torch, "compile", broken)
    assert not compiles(resolve("cifar10", {}), GPU)
    assert "no such compiler at all" in caplog.text
    assert "story" not in caplog.text


@pytest.mark.parametrize("asked", [False, True])
def test_a_network_that_the_compiler_fails_at_is_trained_as_it_is_unless_it_was_to_be_compiled(asked, monkeypatch):
    def broken(graph, inputs):
        raise OSError("a kernel too large")

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=broken))
    config = resolve("debug", {"compile": True})
    if not asked:
        decided = config.training.model_copy(update={"chosen": ("compile",)})
        config = config.model_copy(update={"training": decided})
    stepper = Stepper(config, alone(CPU), build_network(config), "fp32")
    images = repeat((torch.zeros(8, 3, 16, 16, dtype=torch.uint8), None))
    if asked:
        with pytest.raises(RuntimeError, match="a kernel too large"):
            stepper.step(images)
    else:
        stepper.step(images)
        assert stepper.images_seen == 8


def test_microbatches_share_a_graph_of_their_size_and_grids_have_none(monkeypatch, tmp_path):
    """An average or raw weights are sampled in batches of another size, without gradients."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([x.shape for x in inputs if isinstance(x, torch.Tensor) and x.ndim == 4])
        return graph

    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend=backend))
    images = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    for batch_gpu in (4, 2):  # as where the larger one does not fit
        config = resolve("debug", {"compile": True, "batch_gpu": batch_gpu, "grid": (2, 2)})
        stepper = Stepper(config, alone(CPU), build_network(config), "fp32")
        stepper.step(repeat((images[:batch_gpu], None)))
        stepper.step(repeat((images[:batch_gpu], None)))
    for net in (stepper.net, stepper.ema):
        save_fakes(stepper, stepper.whole(net), tmp_path / "grid.png")
    stepper.step(repeat((images[:2], None)))
    assert [(4, 3, 16, 16) in shapes for shapes in graphs] == [True, False]
    assert [(2, 3, 16, 16) in shapes for shapes in graphs] == [False, True]
    assert all(module.training for module in stepper.net.modules())


BUCKETS = """
from functools import partialmethod
from itertools import repeat

import torch

from diffit.configs.resolve import resolve
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import processes

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph

torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend=backend)
with processes() as procs:
    weights = []
    for compiled in (False, True):
        options = {"batch": 2, "batch_gpu": 1, "compile": compiled, "dropout": 0.0, "lr_rampup_kimg": 0.0}
        config = resolve("cifar10", options)
        stepper = Stepper(config, procs, build_network(config), "fp32")
        stepper.step(repeat((torch.full((1, 3, 32, 32), procs.rank * 99, dtype=torch.uint8), None)))
        weights.append(stepper.optimizer.state_dict()["state"])
    print(len(graphs))
    for plain, other in zip(*(w.values() for w in weights), strict=True):
        torch.testing.assert_close(other["exp_avg"], plain["exp_avg"], rtol=1e-3, atol=1e-6)
"""


@pytest.mark.slow
def test_among_several_processes_there_is_a_graph_for_each_bucket_of_gradients(tmp_path):
    """So that one is sent while the next is computed: 61 MB of gradients in buckets of 25 MiB, the first of 1."""
    said = run_processes(BUCKETS, tmp_path)
    assert min(int(line) for line in said.split()) > 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_compiles_a_long_run(caplog):
    assert can_compile(GPU.device), caplog.text
    assert compiles(resolve("cifar10", {}), GPU)
