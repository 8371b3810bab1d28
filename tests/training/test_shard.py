"""Training with ``--shard``: the same losses and states as without, in a part of the memory."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.errors import UserError
from diffit.models.cost import count_parameters, estimate
from helpers import command, run_processes, write_archive

STEPS, SPIKE = 20, 18
# Batches of four microbatches: two processes accumulate gradients over two rounds.
CONFIGS = {
    "image": resolve("debug", {"cond": True, "batch_gpu": 2, "grad_clip": 0.5}, DataFacts(3, (16, 16), 3)),
    "muon": resolve("debug", {"cond": True, "recipe": "muon", "batch_gpu": 2}, DataFacts(3, (16, 16), 3)),
    "latent": resolve(
        "latent-debug",
        {"cond": True, "batch_gpu": 2, "grad_ckpt": True, "mirror": True, "optimizer": "muon"},
        DataFacts(3, (32, 32), 3, latent_scale=0.5, latent_shape=(4, 4, 4)),
    ),
}
TRAIN = f"""
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from diffit.configs.schema import Config
from diffit.training.checkpoint import optimizer_tensors
from diffit.training.shard import part
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone, processes

torch.set_num_threads(1)

def stepper_of(config, procs, shard):
    training = config.training.model_copy(update={{"shard": shard}})
    config = config.model_copy(update={{"training": training}})
    return Stepper(config, procs, build_network(config), "fp32")

def feed(stepper):
    "Microbatch m of a step is the same whoever computes it."
    batch, procs = stepper.config.training.batch, stepper.procs
    while True:
        generator = torch.Generator().manual_seed(stepper.images_seen)
        if stepper.config.autoencoder is None:
            data = torch.randint(0, 256, (batch, 3, 16, 16), generator=generator, dtype=torch.uint8)
        else:
            data = torch.rand(batch, 4, 4, 4, 4, generator=generator)
        for m in range(procs.rank, batch // stepper.batch_gpu, procs.count):
            chosen = slice(m * stepper.batch_gpu, (m + 1) * stepper.batch_gpu)
            yield data[chosen], torch.arange(batch)[chosen] % 3

def train(stepper):
    "The loss of each step. One microbatch of the fourth has no finite gradient, those of a later one are a spike."
    honest, losses, images = stepper.microbatch_loss, [], feed(stepper)

    def microbatch_loss(data, labels, m):
        step = stepper.images_seen // stepper.config.training.batch
        return honest(data, labels, m) * (float("nan") if (step, m) == (3, 1) else 1e4 if step == {SPIKE} else 1.0)

    stepper.microbatch_loss = microbatch_loss
    for _ in range({STEPS}):
        stepper.step(images)
        losses.append(stepper.meter.read(stepper.procs)["loss"])
    return losses

def bytes_held(stepper):
    moments = optimizer_tensors(stepper.optimizer, stepper.net).values()
    tensors = [*stepper.net.parameters(), *stepper.ema.parameters(), *moments]
    return sum(part(tensor).nbytes for tensor in tensors if tensor.ndim)

def save(stepper, folder):
    stepper.save(folder) if stepper.procs.is_first else stepper.lend()
"""
PROCESSES = """
import os
os.chdir(Path(__file__).parent)
with processes() as procs:
    for name in ("image", "muon", "latent"):
        config, found = Config.from_json(Path(f"{name}.json").read_text(), name), {}
        for shard in (False, True):
            stepper = stepper_of(config, procs, shard)
            kind = f"{name}-{'shard' if shard else 'ddp'}"
            found[kind] = train(stepper)
            save(stepper, Path(kind))
        found["bytes"], found["skipped"] = bytes_held(stepper), int(stepper.meter.skipped)
        found["left whole"] = [key for key, value in stepper.net.named_parameters() if part(value) is value]
        taken = stepper_of(config, procs, True)
        taken.restore(Path(f"{name}-one") if procs.is_first else Path("of another node"))
        save(taken, Path(f"{name}-again"))
        alike = taken.whole(taken.ema)
        if procs.is_first:
            alike = {key: value.contiguous() for key, value in alike.state_dict().items()}
            save_file(alike, f"{name}-ema.safetensors")
        Path(f"{name}-{procs.rank}.txt").write_text(json.dumps(found))
"""


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    groups = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
    return {f"{name} {key}": value for name, group in groups.items() for key, value in group.items()}


def assert_identical(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert torch.equal(value, other[key]), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder with the state of one process, the losses, and the functions that it was trained with."""
    folder, defined = tmp_path_factory.mktemp("alone"), {}
    exec(TRAIN, defined)
    losses = {}
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(config.model_dump_json())
        stepper = defined["stepper_of"](config, defined["alone"]("cpu"), True)
        losses[name] = defined["train"](stepper)
        stepper.save(folder / f"{name}-one")
        losses[f"{name} bytes"] = defined["bytes_held"](stepper)
    return folder, losses, defined


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_sharded_training_is_that_of_whole_weights_in_a_part_of_the_memory(alone, count):
    run_processes(TRAIN + PROCESSES, alone[0], count)
    for name in CONFIGS:
        assert_sharded_alike(name, alone, count)


def assert_sharded_alike(name, alone, count):
    folder, losses, defined = alone
    first, *others = (json.loads((folder / f"{name}-{rank}.txt").read_text()) for rank in range(count))
    for kind in ("ddp", "shard"):
        assert all(other[f"{name}-{kind}"] == first[f"{name}-{kind}"] for other in others)
        expected = torch.tensor(losses[name]).nan_to_num()
        assert_close(torch.tensor(first[f"{name}-{kind}"]).nan_to_num(), expected, rtol=1e-5, atol=0)
    assert first["skipped"] == 2
    assert first["left whole"] == []
    # Rows are dealt out whole: 3 rows make 2 and 1 on two processes.
    whole = losses[f"{name} bytes"]
    assert sum(rank["bytes"] for rank in (first, *others)) == whole
    assert max(rank["bytes"] for rank in (first, *others)) < 1.15 * whole / count

    # A state of one process, taken up in parts and saved again; one of parts, taken up by one process.
    one = tensors_of(folder / f"{name}-one")
    assert_identical(tensors_of(folder / f"{name}-again"), one)
    ema = load_file(folder / f"{name}-ema.safetensors")
    assert_identical(ema, load_file(folder / f"{name}-one/ema.safetensors"))
    stepper = defined["stepper_of"](CONFIGS[name], defined["alone"]("cpu"), False)
    stepper.restore(folder / f"{name}-shard")
    stepper.save(folder / f"{name}-back")
    assert_identical(tensors_of(folder / f"{name}-back"), tensors_of(folder / f"{name}-shard"))


@pytest.mark.slow
def test_a_sharded_run_writes_what_a_run_writes_and_goes_on_with_another_number_of_processes(tmp_path):
    data = write_archive(tmp_path / "pets.zip", count=40)
    words = ["train", "--preset", "debug", "--data", data, "--val", data, "--outdir", tmp_path / "runs", "--cond"]
    words += ["--grid", "2x2", "--batch-gpu", 4, "--tick", 0.016, "--snap", 1, "--dump", 1]
    words += ["--metrics", "kid8_full:pixels", "--metrics-ticks", 1]
    command(*words, "--kimg", 0.032, "--shard", processes=2)
    (run_dir,) = (tmp_path / "runs").iterdir()
    written = {path.name for path in run_dir.iterdir()}
    expected = {"fakes_init.png", "fakes000000.016.png", "fakes000000.032-raw.png", "training-state-000000.032"}
    assert expected | {"network-snapshot-000000.032.safetensors"} <= written
    assert list(run_dir.glob("network-best-*"))
    stats = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert all(line["val_loss"] > 0 for line in stats)
    command(*words, "--kimg", 0.048)
    assert list((tmp_path / "runs").iterdir()) == [run_dir]
    assert "resumed at 0.032 kimg" in (run_dir / "log.txt").read_text()


def test_a_dry_run_says_what_gpus_need_and_send_with_whole_weights_and_without():
    words = ["train", "--preset", "latent-debug", "--batch", "64", "--processes", "8"]
    text = CliRunner().invoke(cli, [*words, "--dry-run"]).output
    sent = 7 / 8 * 4 * count_parameters(get_preset("latent-debug").model) / 1e9
    assert f"{2 * sent:.3g} GB sent by each in a step\n" in text
    assert f"{3 * sent:.3g} GB sent by each in a step; for less memory than" in text
    assert "64 = 8 per GPU × 8 processes × 1 accumulated" in text
    refused = CliRunner().invoke(cli, [*words, "--data", "x", "--outdir", "y"])
    assert "is for --dry-run; torchrun --nproc_per_node=8" in str(refused.exception)


def test_shards_are_not_compiled():
    with pytest.raises(UserError, match="use one of them"):
        resolve("debug", {"shard": True, "compile": True})


def test_the_estimate_of_shards_falls_with_their_number():
    config = resolve("latent-debug", {"shard": True, "batch": 64})
    one, two, four = (estimate(config, 8, processes=count) for count in (1, 2, 4))
    assert one == estimate(resolve("latent-debug", {"batch": 64}), 8)
    assert one.state_bytes == 2 * two.state_bytes == 4 * four.state_bytes
