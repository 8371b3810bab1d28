"""Whole runs of the debug preset, and the same through the command line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from functools import partialmethod

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.sampling import Model
from diffit.training import loop
from diffit.training.checkpoint import states
from diffit.training.loop import train
from diffit.training.pictures import save_fakes
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes
from diffit.weights.file import load_network, save_network
from helpers import command, start, wait, write_archive

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip", 24)


def run(pets, outdir, *, resume="auto", val=None, **options):
    archive = ImageArchive(pets, cond=True)
    config = resolve(
        "debug", {"data": str(pets), "cond": True, "batch_gpu": 4, "grid": (2, 2), **options}, DataFacts(3, (16, 16), 3)
    )
    return train(config, archive, outdir, ONE, resume=resume, val=val)


def tensors(run_dir):
    """Of the newest state."""
    return {kind: load_file(states(run_dir)[-1] / f"{kind}.safetensors") for kind in ("model", "ema", "optimizer")}


def assert_identical(a, b):
    for kind in a:
        assert a[kind].keys() == b[kind].keys()
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), f"{kind} {name}"


def test_a_run_leaves_what_the_documentation_says(pets, tmp_path):
    outcome = run(pets, tmp_path, snap=2, dump=2, kimg=0.16)
    names = {path.name for path in outcome.run_dir.iterdir()}
    assert outcome.run_dir.name == "00000-pets-debug-gpus1-batch8"
    assert {"training_options.json", "log.txt", "stats.jsonl", "reals.png", "fakes_init.png", "fakes000000.160.png",
            "network-snapshot-000000.160.safetensors", "training-state-000000.160"} <= names  # fmt: skip
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert not any(name.startswith(".") for name in names)
    lines = [json.loads(line) for line in (outcome.run_dir / "stats.jsonl").read_text().splitlines()]
    assert [line["kimg"] for line in lines] == [0.04, 0.08, 0.12, 0.16]
    assert all(isinstance(value, int | float) for line in lines for value in line.values())
    grids = [Image.open(outcome.run_dir / f"{name}.png") for name in ("reals", "fakes_init", "fakes000000.160")]
    assert {grid.height for grid in grids} == {2 * 66 - 2}
    assert len({grid.width for grid in grids}) == 1
    assert grids[0].width > 2 * 66 - 2  # the names of the classes stand before the rows
    with Image.open(outcome.run_dir / "progress.gif") as gif:
        assert (gif.n_frames, gif.size) == (3, grids[0].size)  # the beginning, and every 0.08 kimg


def test_a_row_of_a_grid_is_of_one_class_real_and_sampled(pets, tmp_path):
    run_dir = run(pets, tmp_path, kimg=0.008, grid=(3, 2), seed=1).run_dir
    archive = ImageArchive(pets, cond=True)
    reals = np.asarray(Image.open(run_dir / "reals.png"))[:, 2 - 66 * 3 :]
    for row, label in enumerate((0, 1)):  # of three classes the first two, as far as two rows reach
        of_class = {archive[i].numpy().tobytes() for i in range(len(archive)) if int(archive.labels[i]) == label}
        for column in range(3):
            cell = reals[row * 66 : row * 66 + 64 : 4, column * 66 : column * 66 + 64 : 4]
            assert cell.transpose(2, 0, 1).tobytes() in of_class


def test_stopped_and_resumed_equals_run_through_to_the_last_bit(pets, tmp_path):
    ramp = {"lr_rampup_kimg": 0.04, "tick": 0.04}  # they would be in proportion to a shorter run
    through = run(pets, tmp_path / "through", kimg=0.16, **ramp)
    first = run(pets, tmp_path / "parts", kimg=0.064, **ramp)
    second = run(pets, tmp_path / "parts", kimg=0.16, **ramp)
    assert second.run_dir == first.run_dir
    assert second.images_seen == 160
    assert_identical(tensors(through.run_dir), tensors(second.run_dir))
    a, b = (load_network(outcome.snapshot)[0].state_dict() for outcome in (through, second))
    assert all(torch.equal(a[name], b[name]) for name in a)
    curves = [
        [
            (json.loads(line)["images"], json.loads(line)["loss"])
            for line in (d / "stats.jsonl").read_text().splitlines()
        ]
        for d in (through.run_dir, second.run_dir)
    ]
    assert [point for point in curves[1] if point in curves[0]] == [
        point for point in curves[1] if point[0] not in (64, 80)
    ]


def test_the_same_command_after_the_end_does_nothing_and_a_new_run_can_be_asked_for(pets, tmp_path):
    first = run(pets, tmp_path, kimg=0.04)
    again = run(pets, tmp_path, kimg=0.04)
    assert again.run_dir == first.run_dir
    assert again.snapshot is None
    assert run(pets, tmp_path, kimg=0.04, resume="none").run_dir.name.startswith("00001")


def test_a_state_that_was_copied_away_goes_on_in_a_new_run(pets, tmp_path):
    ramp = {"lr_rampup_kimg": 0.04}
    first = run(pets, tmp_path / "runs", kimg=0.04, **ramp)
    name = "training-state-000000.040"
    copy = shutil.copytree(first.run_dir / name, tmp_path / "copy" / name)
    second = run(pets, tmp_path / "runs", kimg=0.08, resume=str(copy), **ramp)
    assert second.run_dir.name.startswith("00001")
    assert [path.name for path in copy.parent.iterdir()] == [name]
    assert_identical(tensors(second.run_dir), tensors(run(pets, tmp_path / "through", kimg=0.08, **ramp).run_dir))


def test_a_damaged_state_is_put_aside_for_the_one_before_and_the_run_ends_as_if_nothing_had_been(
    pets, tmp_path, caplog
):
    whole = run(pets, tmp_path / "whole", kimg=0.12, dump=1)
    run_dir = run(pets, tmp_path / "hurt", kimg=0.08, dump=1).run_dir
    newest = states(run_dir)[-1]
    with (newest / "ema.safetensors").open("r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"x")
    again = run(pets, tmp_path / "hurt", kimg=0.12, dump=1)
    assert again.run_dir == run_dir
    assert (run_dir / f"damaged-{newest.name}").is_dir()
    (said,) = (record.getMessage() for record in caplog.records if "is missing or damaged" in record.getMessage())
    assert "ema.safetensors is missing or damaged" in said
    assert_identical(tensors(again.run_dir), tensors(whole.run_dir))
    for state in states(run_dir):
        (state / "state.json").unlink()
    with pytest.raises(UserError, match="every state is damaged; --resume none begins again"):
        run(pets, tmp_path / "hurt", kimg=0.2)


def test_data_that_fail_in_the_middle_cost_nothing(pets, tmp_path, monkeypatch):
    """The images that are there are trained on, the state is saved, and the same command goes on with mended data."""
    whole = run(pets, tmp_path / "whole", kimg=0.08)
    honest = loop.feed

    def breaking(*given, **named):
        images = honest(*given, **named)
        for _ in range(9):  # two microbatches a step: in the middle of the fifth
            yield next(images)
        raise UserError("pets.zip: ant.png is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "feed", breaking)
        with pytest.raises(
            UserError, match=r"ant.png is damaged; everything up to 0.032 kimg is saved in .*goes on from"
        ):
            run(pets, tmp_path / "broken", kimg=0.08)
    assert_identical(tensors(run(pets, tmp_path / "broken", kimg=0.08).run_dir), tensors(whole.run_dir))


def test_images_that_cannot_be_read_are_left_out_if_that_is_asked_for(pets, tmp_path, caplog):
    with zipfile.ZipFile(pets) as whole, zipfile.ZipFile(tmp_path / "hurt.zip", "w") as hurt:
        for name in whole.namelist():
            hurt.writestr(name, whole.read(name)[: 60 if name.endswith("05.png") else None])
    words = ["train", "--data", tmp_path / "hurt.zip", "--outdir", tmp_path / "runs", *ARGUMENTS, "--kimg", "0.04"]
    with pytest.raises(UserError, match=r"img00000005\.png"):
        cli(list(map(str, words)), standalone_mode=False)
    cli([*map(str, words), "--on-error", "skip"], standalone_mode=False)
    assert "img00000005.png" in caplog.text
    assert "left out, the 1. so far" in caplog.text


def test_after_too_many_spikes_a_run_goes_back_and_on_behind_them(pets, tmp_path, monkeypatch):
    honest = Stepper.microbatch_loss

    def spiking(self, *given):
        return honest(self, *given) * (1e6 if 240 <= self.images_seen < 264 else 1)

    monkeypatch.setattr(Stepper, "microbatch_loss", spiking)
    with pytest.raises(UserError, match="3 steps in a row were skipped"):
        run(pets, tmp_path / "a", kimg=0.4, max_skipped=3, dump=1)
    outcome = run(pets, tmp_path / "b", kimg=0.4, max_skipped=3, dump=1, on_spike="rollback")
    log = (outcome.run_dir / "log.txt").read_text()
    assert "3 steps skipped: back to training-state-000000.200" in log  # 240 has the weights of then
    assert outcome.images_seen == 400


def test_a_branch_that_was_left_can_be_returned_to(pets, tmp_path):
    run_dir = run(pets, tmp_path, kimg=0.08, dump=1).run_dir
    first, second = states(run_dir)
    run(pets, tmp_path, kimg=0.12, dump=1, resume=str(first))
    (left,) = run_dir.glob(f"retired-{second.name}")
    outcome = run(pets, tmp_path, kimg=0.16, dump=1, resume=str(left))
    assert (outcome.run_dir, outcome.images_seen) == (run_dir, 160)
    losses = [json.loads(line)["images"] for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert losses == [40, 80, 120, 160]


def test_a_grid_that_is_cut_short_leaves_the_network_in_training(tmp_path, monkeypatch):
    """Another step may follow, and it must have its dropout."""
    config = resolve("debug", {"cond": True, "grid": (2, 2)}, DataFacts(3, (16, 16), 3))
    stepper = Stepper(config, ONE, build_network(config), "fp32")

    def cut(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "sample", cut)
    with pytest.raises(KeyboardInterrupt):
        save_fakes(stepper, stepper.net, tmp_path / "grid.png")
    assert stepper.net.training
    assert not (tmp_path / "grid.png").exists()


@pytest.mark.slow
def test_a_run_outlives_the_program_that_reads_what_it_prints(pets, tmp_path):
    words = [sys.executable, "-m", "diffit", "train", "--outdir", tmp_path / "r", "--data", pets, *ARGUMENTS]
    words += ["--kimg", "0.4", "--tick", "0.04"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    process.stdout.readline()
    process.stdout.close()
    process.wait(120)
    (run_dir,) = (tmp_path / "r").iterdir()
    assert json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])["images"] == 400
    assert "done at 0.4 kimg" in (run_dir / "log.txt").read_text()


def test_a_signal_in_the_last_step_leaves_what_the_same_command_makes(pets, tmp_path, monkeypatch):
    honest = Stepper.step

    def signalled(self, feed):
        honest(self, feed)
        if self.images_seen == 40:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", signalled)
        cut = run(pets, tmp_path, kimg=0.04)
    assert (cut.complete, cut.signal, cut.images_seen) == (False, signal.SIGTERM, 40)
    assert not (cut.run_dir / "fakes000000.040.png").exists()
    made = run(pets, tmp_path, kimg=0.04)
    assert (made.complete, made.run_dir) == (True, cut.run_dir)
    assert (cut.run_dir / "fakes000000.040.png").exists()


SUSPENDED = """
import sys
from diffit.cli import cli
from diffit.training import plan, stopwatch
plan.MEASURED_SECONDS, stopwatch.STOPPED = 1.0, 3.0
cli(sys.argv[1:])
"""


@pytest.mark.slow
def test_time_in_which_a_run_is_suspended_is_not_its_own(pets, tmp_path):
    """As by Ctrl-Z: of fifteen seconds, with sixteen more in which it is suspended before its first step."""
    words = ["train", "--preset", "debug", "--data", pets, "--outdir", tmp_path, "--minutes", 0.25, "--grid", "2x2"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SUSPENDED, *map(str, words)], stdout=subprocess.DEVNULL, env=environment
    )
    while not list(tmp_path.glob("*/reals.png")) and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(16)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(120) == 0
    (stats,) = tmp_path.glob("*/stats.jsonl")
    steps = [json.loads(line)["steps"] for line in stats.read_text().splitlines()]
    assert steps[-1] > 5  # it would have been over with the first


def test_what_a_finished_run_says_of_going_on_is_by_its_own_minutes(pets, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("diffit.training.plan.measure", lambda config, *rest: (config, 100.0))
    words = ["train", "--data", str(pets), "--outdir", str(tmp_path / "runs"), "--grid", "2x2"]
    monkeypatch.setattr(sys, "argv", ["diffit", *words])
    honest = Stepper.step

    def signalled(self, feed):
        honest(self, feed)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", signalled)
        with pytest.raises(SystemExit, match="143"):
            cli([*words, "--minutes", "0.2"], standalone_mode=False)
    capsys.readouterr()
    cli(words, standalone_mode=False)
    said = capsys.readouterr().out
    assert "0.2 minutes in all" in said
    assert "--minutes 0.6" in said.splitlines()[-1]


def test_an_error_that_nobody_foresaw_leaves_what_was_learnt_until_then(pets, tmp_path, monkeypatch):
    honest = Stepper.step

    def fails(self, feed):
        if self.images_seen == 40:
            raise KeyError("a bug")
        honest(self, feed)

    monkeypatch.setattr(Stepper, "step", fails)
    with pytest.raises(KeyError, match="a bug"):
        run(pets, tmp_path, kimg=0.08)
    (state,) = tmp_path.glob("*/training-state-*")
    assert state.name.endswith("000000.040")


def test_a_longer_run_goes_on_with_the_ramp_that_it_began_with(pets, tmp_path):
    """Also where the longer one has the preset's own length."""
    first = run(pets, tmp_path, kimg=0.064, lr_rampup_kimg=0.02)
    second = run(pets, tmp_path)
    assert (second.run_dir, second.images_seen) == (first.run_dir, 160)
    ramps = [
        json.loads((outcome.run_dir / "training_options.json").read_text())["training"]["lr_rampup_kimg"]
        for outcome in (first, second)
    ]
    assert ramps == [0.02, 0.02]


def test_going_on_puts_nothing_aside_whatever_the_rounding_of_names(pets, tmp_path):
    """16 images are 0.016 kimg, and 0.02 in a name of two decimals."""
    first = run(pets, tmp_path, kimg=0.016, batch=16, tick=0.016, snap=1)
    assert states(first.run_dir)[-1].name == "training-state-000000.02"
    second = run(pets, tmp_path, kimg=0.08, batch=16, tick=0.016, snap=1)
    assert (second.run_dir, second.images_seen) == (first.run_dir, 80)
    assert not list(first.run_dir.glob("retired*"))
    assert (first.run_dir / "network-snapshot-000000.02.safetensors").exists()


def test_going_back_to_an_older_state_retires_the_later_ones(pets, tmp_path):
    run(pets, tmp_path, kimg=0.16, dump=1, snap=1)
    (run_dir,) = tmp_path.iterdir()
    older, newer = states(run_dir)
    second = run(pets, tmp_path, kimg=0.16, dump=1, snap=1, resume=str(older))
    assert second.run_dir == run_dir
    assert (run_dir / f"retired-{newer.name}").is_dir()
    assert states(run_dir) == [older, newer]
    assert (run_dir / "retired-network-snapshot-000000.160.safetensors").is_file()
    assert_identical(tensors(run_dir), {k: load_file(run_dir / f"retired-{newer.name}" / f"{k}.safetensors")
                                        for k in ("model", "ema", "optimizer")})  # fmt: skip


def test_a_run_that_was_killed_before_its_last_snapshot_makes_it(pets, tmp_path):
    first = run(pets, tmp_path, kimg=0.04)
    before = first.snapshot.read_bytes()
    first.snapshot.unlink()
    second = run(pets, tmp_path, kimg=0.04)
    assert second.snapshot == first.snapshot
    assert len(second.snapshot.read_bytes()) == len(before)


def test_a_changed_option_is_named_with_the_way_to_go_on(pets, tmp_path, caplog):
    run(pets, tmp_path, kimg=0.04)
    run(pets, tmp_path, kimg=0.04, lr=5e-4)
    (warning,) = (record.getMessage() for record in caplog.records if "a new run begins" in record.getMessage())
    assert "differs in lr 0.0005 (the run has 0.001); to go on with it nevertheless: --resume" in warning


def test_two_newest_states_are_kept(pets, tmp_path):
    outcome = run(pets, tmp_path, kimg=0.16, tick=0.04, snap=0, dump=1)
    assert sorted(p.name for p in outcome.run_dir.glob("training-state-*")) == [
        "training-state-000000.120",
        "training-state-000000.160",
    ]


def test_held_out_loss_is_reported_and_the_same_for_the_same_weights(pets, tmp_path):
    val = ImageArchive(write_archive(tmp_path / "val.zip", 10), cond=True)
    outcomes = [run(pets, tmp_path / name, kimg=0.04, val=val) for name in "ab"]
    losses = [json.loads((o.run_dir / "stats.jsonl").read_text().splitlines()[-1])["val_loss"] for o in outcomes]
    assert losses[0] == losses[1] > 0


def test_a_run_can_begin_with_the_weights_of_a_file(pets, tmp_path):
    source = run(pets, tmp_path / "a", kimg=0.04)
    begun = run(pets, tmp_path / "b", kimg=0.008, lr=1e-12, lr_rampup_kimg=0.0, init_from=str(source.snapshot))
    expected, found = (load_network(outcome.snapshot)[0].state_dict() for outcome in (source, begun))
    for name in expected:
        assert_close(found[name], expected[name], rtol=0, atol=1e-10)
    other = {"base_dim": 32, "hidden_dim": 64, "num_heads": 4}
    with pytest.raises(UserError, match="it is another network"):
        run(pets, tmp_path / "c", kimg=0.04, init_from=str(source.snapshot), **other)


def test_gradients_that_stay_non_finite_end_the_run_with_the_good_weights_saved(pets, tmp_path):
    source = run(pets, tmp_path / "a", kimg=0.04)
    state, config = load_network(source.snapshot)[0].state_dict(), load_network(source.snapshot)[1]
    state["head.bias"] = torch.full_like(state["head.bias"], float("nan"))
    save_network(tmp_path / "bad.safetensors", state, config)
    with pytest.raises(UserError, match=r"3 steps in a row were skipped.*--lr"):
        run(pets, tmp_path / "b", kimg=10.0, init_from=str(tmp_path / "bad.safetensors"), max_skipped=3)
    (run_dir,) = (tmp_path / "b").iterdir()
    saved = tensors(run_dir)["model"]
    assert torch.equal(saved["tokenizer.weight"], state["tokenizer.weight"])
    assert [path.name for path in states(run_dir)] == ["training-state-000000.024"]  # after the third, and not later


def test_gradient_checkpointing_and_compilation_change_rounding_only(pets, tmp_path):
    losses = []
    for options in ({}, {"grad_ckpt": True}):
        outcome = run(pets, tmp_path / str(options), kimg=0.08, **options)
        losses.append([json.loads(line)["loss"] for line in (outcome.run_dir / "stats.jsonl").read_text().splitlines()])
    assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_a_compiled_run_has_the_same_losses(pets, tmp_path, monkeypatch):
    """By the graphs of forward and backward pass; C++ of them takes minutes, and of TMSA is in tests/models."""
    graphs = partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", graphs)
    losses = []
    for options in ({}, {"compile": True}):
        # Without dropout: the compiler draws its masks from a stream of its own.
        outcome = run(pets, tmp_path / str(options), kimg=0.04, dropout=0.0, **options)
        losses.append(json.loads((outcome.run_dir / "stats.jsonl").read_text().splitlines()[-1])["loss"])
    assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


ARGUMENTS = ["--preset", "debug", "--cond", "--batch-gpu", "2", "--grid", "2x2"]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["paper", "muon"])  # the second weighs noise levels by what all processes have seen
def test_two_processes_learn_what_one_does(recipe, pets, tmp_path):
    for processes in (1, 2):
        command(
            "train",
            "--outdir",
            tmp_path / str(processes),
            "--data",
            pets,
            *ARGUMENTS,
            "--recipe",
            recipe,
            "--kimg",
            0.08,
            processes=processes,
        )
    runs = [next((tmp_path / str(processes)).iterdir()) for processes in (1, 2)]
    assert runs[1].name == "00000-pets-debug-gpus2-batch8"
    one, two = ([json.loads(line) for line in (r / "stats.jsonl").read_text().splitlines()] for r in runs)
    for name in ("images", "loss", "grad_norm"):
        assert_close([line[name] for line in two], [line[name] for line in one], rtol=1e-5, atol=0)
    # And one process can take up what two have left.
    command("train", "--outdir", tmp_path / "2", "--data", pets, *ARGUMENTS, "--recipe", recipe, "--kimg", 0.16)
    assert [path.name for path in (tmp_path / "2").iterdir()] == [runs[1].name]
    assert json.loads((runs[1] / "stats.jsonl").read_text().splitlines()[-1])["images"] == 160


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_everything_and_the_same_command_goes_on(pets, tmp_path, number):
    words = ["train", "--outdir", tmp_path / "r", "--data", pets, *ARGUMENTS, "--kimg", "50", "--tick", "0.04"]
    (process,) = start("diffit", *words, output=tmp_path)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("r/*/stats.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, number)
    assert wait([process], timeout=60) == 128 + number
    assert "run the same command again" in (tmp_path / "stdout").read_text()
    (run_dir,) = (tmp_path / "r").iterdir()
    seen = json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])["images"]
    words[words.index("50")] = str((seen + 80) / 1000)
    resumed = command(*words)
    assert f"resumed at {seen / 1000:g} kimg" in resumed.stdout
    assert json.loads((run_dir / "stats.jsonl").read_text().splitlines()[-1])["images"] == seen + 80
