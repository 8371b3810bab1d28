"""What a run takes on a machine: the microbatch by memory, the length by the clock, and what resuming keeps."""

import itertools
import json
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve, with_length
from diffit.data import ImageArchive
from diffit.errors import UserError
from diffit.models.cost import estimate
from diffit.training import plan as planning
from diffit.training import train
from diffit.training.plan import PROGRAM, fit_batch, measure, plan, take_over
from diffit.training.run import Pace, Run
from diffit.training.run_dir import is_later, kimg_number, prune_snapshots, same_run
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import Processes
from helpers import write_archive

ONE = Processes(0, 1, torch.device("cpu"))
FACTS = DataFacts(3, (16, 16))


def with_memory(monkeypatch, images: int, config) -> None:
    """A machine that has room for so many images at once."""
    free = estimate(config, images).training_bytes + PROGRAM
    monkeypatch.setattr(planning, "available_memory", lambda device: free)


def test_without_a_microbatch_it_is_the_largest_that_fits(monkeypatch):
    config = resolve("debug", {"batch": 48})
    for images, expected in ((48, 48), (47, 24), (23, 16), (5, 4), (1, 1)):
        with_memory(monkeypatch, images, config)
        assert fit_batch(config, ONE) == expected


def test_a_microbatch_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    config = resolve("debug", {"batch": 48, "batch_gpu": 24})
    with_memory(monkeypatch, 13, config)
    with pytest.raises(UserError, match=r"needs about .* at --batch-gpu 24, .* free: give --batch-gpu 12"):
        fit_batch(config, ONE)
    monkeypatch.setattr(planning, "available_memory", lambda device: PROGRAM)
    with pytest.raises(UserError, match=r"one image alone takes .* GiB: give --grad-ckpt"):
        fit_batch(config, ONE)


def test_a_step_that_does_not_fit_the_gpu_after_all_halves_the_microbatch(monkeypatch):
    config = resolve("debug", {"batch": 48})
    config = config.model_copy(
        update={"training": config.training.model_copy(update={"batch_gpu": 48, "chosen": ("batch_gpu",)})}
    )
    tried = []

    def rate(config, *_):
        tried.append(config.training.batch_gpu)
        if config.training.batch_gpu > 5:
            raise torch.OutOfMemoryError
        return 7.0

    monkeypatch.setattr(planning, "_rate", rate)
    fitting, images_a_second = measure(config, None, ONE, None)
    assert tried == [48, 24, 12, 6, 3]
    assert (fitting.training.batch_gpu, images_a_second) == (3, 7.0)
    asked = config.model_copy(update={"training": config.training.model_copy(update={"chosen": ()})})
    with pytest.raises(UserError, match="--batch-gpu 48: a step does not fit"):
        measure(asked, None, ONE, None)


def test_attention_on_a_gpu_keeps_no_weights_of_pairs():
    config = resolve("imagenet512", {})
    one, three = ({d: estimate(config, n, device=d).activation_bytes for d in ("cpu", "cuda")} for n in (1, 3))
    pairs = 2 * 28 * 16 * 1024**2 * 4  # images, blocks, heads, pairs, bytes
    assert (three["cpu"] - one["cpu"]) - (three["cuda"] - one["cuda"]) > 0.9 * pairs


def test_the_length_by_the_clock_is_the_rate_times_the_minutes(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    config = plan(resolve("small16", {"minutes": 10.0}, FACTS), archive, ONE)
    training = config.training
    assert training.kimg == 120.0  # more than the clock will allow, also if the machine is rid of other work
    assert training.ema_halflife_kimg == pytest.approx(1.5)  # a twentieth of what is to be expected
    assert training.lr_rampup_kimg == 0.5  # the preset's is the upper limit
    assert 20 <= 30.0 / training.tick <= 100
    assert training.batch_gpu == training.batch
    assert Stepper(config, ONE, build_network(config), "fp32").end == 30_000
    spelled = plan(resolve("small16", {"kimg": 3.0}, FACTS), archive, ONE)
    assert spelled.training.kimg == 3.0


def test_what_follows_from_the_length_by_the_clock_has_few_digits(monkeypatch, tmp_path):
    """They are in the log and in the options to copy."""
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 47.123)
    training = plan(resolve("small16", {"minutes": 7.0}, FACTS), archive, ONE).training
    assert training.kimg == pytest.approx(4 * 19.8)
    for value in (training.tick, training.ema_halflife_kimg):
        assert value == pytest.approx(float(f"{value:.4g}"), rel=1e-12)


@pytest.mark.parametrize(("rate", "grid"), [(50.0, (8, 8)), (12.0, (5, 5)), (5.0, (3, 3)), (0.1, (2, 2))])
def test_a_grid_takes_at_most_a_twentieth_of_the_minutes(rate, grid, monkeypatch, tmp_path):
    """Heun's 18 steps are 35 evaluations, of which there are three in the time of a training step."""
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: rate)
    assert plan(resolve("small16", {"minutes": 10.0}, FACTS), archive, ONE).training.grid == grid
    asked = plan(resolve("small16", {"minutes": 10.0, "grid": (7, 4)}, FACTS), archive, ONE)
    assert asked.training.grid == (7, 4)
    by_length = plan(resolve("small16", {"kimg": 3.0}, FACTS), archive, ONE)
    assert by_length.training.grid == (8, 8)


def test_a_resumed_run_keeps_what_was_not_asked_for(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 12.0)
    asked = resolve("small16", {"minutes": 10.0}, FACTS)
    assert plan(asked, archive, ONE, recorded=plan(asked, archive, ONE)).training.grid == (5, 5)
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    recorded = plan(asked, archive, ONE)
    assert same_run(asked, recorded)
    assert not same_run(resolve("small16", {"minutes": 10.0, "lr": 5e-4}, FACTS), recorded)
    monkeypatch.setattr(planning, "_rate", lambda *_: 10.0)  # on a slower machine
    again = plan(asked, archive, ONE, recorded=recorded).training
    assert again.model_dump(exclude={"chosen"}) == recorded.training.model_dump(exclude={"chosen"})
    assert set(again.chosen) == set(recorded.training.chosen)
    longer = resolve("small16", {"minutes": 60.0}, FACTS)
    assert same_run(longer, recorded)
    progress = (30_000, 600.0)
    goes_on = plan(longer, archive, ONE, recorded=recorded, progress=progress).training
    assert goes_on.kimg == pytest.approx(4 * (30 + 10 * 3000 / 1000), rel=0.01)
    assert goes_on.lr_rampup_kimg == recorded.training.lr_rampup_kimg
    assert "batch_gpu" in goes_on.chosen
    assert take_over(longer, recorded).training.lr_rampup_kimg == recorded.training.lr_rampup_kimg


def test_the_options_of_a_run_by_the_clock_leave_its_length_to_the_clock_again(monkeypatch, tmp_path):
    """As --config gives them, alone and in the command with which its report says how to go on."""
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    begun = plan(resolve("small16", {"minutes": 10.0, "tick": 0.25}, FACTS), archive, ONE)
    asked = resolve(begun, {}, FACTS)
    assert (asked.training.clock_minutes, asked.training.tick) == (10.0, 0.25)
    assert same_run(asked, begun)
    goes_on = plan(asked, archive, ONE, recorded=begun).training
    assert goes_on.model_dump(exclude={"chosen"}) == begun.training.model_dump(exclude={"chosen"})
    assert set(goes_on.chosen) == set(begun.training.chosen)
    monkeypatch.setattr(planning, "_rate", lambda *_: 25.0)
    anew = plan(asked, archive, ONE).training
    assert (anew.kimg, anew.expected_kimg(0.0)) == (60.0, 15.0)
    over = begun.training.model_copy(update={"kimg": 28.0})
    over = plan(asked, archive, ONE, recorded=begun.model_copy(update={"training": over})).training
    assert (over.kimg, over.expected_kimg(28.0)) == (28.0, 28.0)
    assert resolve(begun, {"kimg": 5.0}, FACTS).training.minutes is None
    assert resolve(begun, {"minutes": 20.0}, FACTS).training.clock_minutes == 20.0


def test_the_options_of_a_run_on_a_slow_machine_do_not_bound_one_on_a_fast_machine(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 1.0)
    slow = plan(resolve("small16", {"minutes": 10.0, "tick": 0.25}, FACTS), archive, ONE)
    assert slow.training.grid == (2, 2)
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    fast = plan(resolve(slow, {}, FACTS), archive, ONE).training
    fresh = plan(resolve("small16", {"minutes": 10.0, "tick": 0.25}, FACTS), archive, ONE).training
    assert fast.model_dump(exclude={"chosen"}) == fresh.model_dump(exclude={"chosen"})
    assert set(fast.chosen) == set(fresh.chosen)


@pytest.mark.parametrize("length", [{"minutes": 10.0}, {"kimg": 50.0}])
def test_an_average_that_was_asked_for_takes_the_place_of_a_preset_s(length, monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    asked = resolve("latent-s", length | {"ema_halflife_kimg": 5.0})
    for config in (asked, plan(asked, archive, ONE), resolve(asked, {})):
        assert (config.training.ema_decay, config.training.ema_halflife_kimg) == (None, 5.0)
    other = resolve("small16", length | {"ema_decay": 0.99}, FACTS).training
    assert other.ema_decay == 0.99


def test_fewer_minutes_than_a_run_has_taken_are_refused(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    begun = plan(resolve("small16", {"minutes": 480.0}, FACTS), archive, ONE)
    asked = resolve("small16", {"minutes": 10.0}, FACTS)
    with pytest.raises(UserError, match=r"--minutes 10: the run has taken 180 already, of 480; give more than it has"):
        plan(asked, archive, ONE, recorded=begun, progress=(540_000, 10_800.0))
    assert plan(asked, archive, ONE, recorded=begun, progress=(1000, 20.0)).training.minutes == 10.0


@pytest.mark.parametrize("length", [{"minutes": 480.0}, {"kimg": 50.0}])
def test_minutes_that_nobody_asked_for_give_way_to_a_run_s_own_length(length, monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 50.0)
    begun = plan(resolve("small16", length, FACTS), archive, ONE)
    asked = resolve("small16", {"default_minutes": 10.0}, FACTS)
    assert asked.training.clock_minutes == 10.0
    goes_on = plan(asked, archive, ONE, recorded=begun, progress=(540_000, 10_800.0)).training
    for name in ("kimg", "minutes", "clock_minutes", "tick"):
        assert getattr(goes_on, name) == getattr(begun.training, name)
    anew = plan(asked, archive, ONE)
    assert (anew.training.minutes, anew.training.clock_minutes) == (10.0, 10.0)
    assert plan(resolve(anew, {}, FACTS), archive, ONE, recorded=begun).training.minutes == begun.training.minutes
    assert resolve("small16", {"default_minutes": 10.0} | length, FACTS).training.minutes == length.get("minutes")


def test_what_was_asked_for_is_heard_where_it_is_what_the_preset_has(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    own = get_preset("cifar10").training
    options = {"ema_halflife_kimg": 7.0, "tick": 1.5, "kimg": 50.0}
    begun = plan(resolve("cifar10", options, FACTS), archive, ONE)
    silent = resolve("cifar10", {"kimg": 50.0}, FACTS)
    assert same_run(silent, begun)
    assert (take_over(silent, begun).training.tick, take_over(silent, begun).training.ema_halflife_kimg) == (1.5, 7.0)
    asked = resolve("cifar10", {"kimg": 50.0, "tick": own.tick, "ema_halflife_kimg": own.ema_halflife_kimg}, FACTS)
    assert take_over(asked, begun).training.tick == own.tick
    assert not same_run(asked, begun)  # another average


def test_what_was_edited_in_a_configuration_was_asked_for(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    plain = resolve("cifar10", {}, FACTS)
    edited = plain.model_copy(
        update={"training": plain.training.model_copy(update={"ema_halflife_kimg": 7.0, "tick": 1.0})}
    )
    assert not same_run(edited, plan(plain, archive, ONE))
    assert same_run(plain, plan(edited, archive, ONE))
    assert take_over(edited, plan(plain, archive, ONE)).training.ema_halflife_kimg == 7.0
    again = resolve(edited, {"kimg": 50.0}, FACTS).training  # as --config with the record of such a run
    assert (again.ema_halflife_kimg, again.tick, again.lr_rampup_kimg) == (7.0, 1.0, 2.5)


@pytest.mark.slow
def test_a_run_that_is_made_longer_expects_what_was_measured_for_that(monkeypatch, tmp_path, capsys):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    options = {"grid": (2, 2), "data": str(archive.path), "batch": 8}
    monkeypatch.setattr("diffit.training.plan.measure", lambda config, *rest: (config, 1000.0))
    train(resolve("debug", options | {"minutes": 0.05}, FACTS), archive, tmp_path / "runs", ONE)
    capsys.readouterr()
    longer = train(resolve("debug", options | {"minutes": 0.2}, FACTS), archive, tmp_path / "runs", ONE)
    said = capsys.readouterr().out
    (more,) = re.findall(r"0.2 minutes in all, with grids: about ([\d,]+) more images", said)
    began, took = (
        float(number) for number in re.search(r"resumed at ([\d.]+) kimg(?s:.)*done at ([\d.]+)", said).groups()
    )
    assert 1000 <= int(more.replace(",", "")) <= 12_000  # a thousand a second, less what the first part took
    assert began < took == longer.images_seen / 1000


@pytest.mark.slow
def test_a_run_of_six_seconds_ends_in_time_with_all_that_belongs_to_a_run(tmp_path, capsys):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    options = {"minutes": 0.1, "grid": (2, 2), "data": str(archive.path)}
    began = time.monotonic()
    outcome = train(resolve("debug", options, FACTS), archive, tmp_path / "runs", ONE)
    assert time.monotonic() - began < 40  # measuring takes eight seconds of it, and this machine may be busy
    kimg = json.loads((outcome.run_dir / "training_options.json").read_text())["training"]["kimg"]
    assert kimg * 1000 == outcome.images_seen
    assert outcome.snapshot is not None
    assert (
        outcome.run_dir / outcome.snapshot.name.replace("network-snapshot-", "fakes").replace(".safetensors", ".png")
    ).exists()
    again = train(resolve("debug", options, FACTS), archive, tmp_path / "runs", ONE)
    assert (again.run_dir, again.images_seen, again.snapshot) == (outcome.run_dir, outcome.images_seen, None)


def test_a_run_that_the_clock_ends_long_before_its_length_says_so(tmp_path, capsys, monkeypatch):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr("diffit.training.plan.measure", lambda config, *rest, **_: (config, 1e5))
    options = {"minutes": 0.05, "grid": (2, 2), "data": str(archive.path), "batch": 8}
    outcome = train(resolve("debug", options, FACTS), archive, tmp_path / "runs", ONE)
    said = capsys.readouterr()
    assert f"{outcome.images_seen // 8} of 37500 steps in 0.05 minutes" in said.out + said.err


def test_two_saves_never_have_the_same_number():
    published = resolve("cifar10", {})
    assert kimg_number(published, 200_192_000) == "200192"
    assert kimg_number(published, 512_000) == "000512"
    short = resolve("cifar10", {"kimg": 10.0, "batch": 24})
    names = [kimg_number(short, images) for images in range(0, 10_000, 24)]
    assert len(set(names)) == len(names)
    assert names == sorted(names)
    assert all(float(a) < float(b) for a, b in itertools.pairwise(names))


@pytest.mark.parametrize("batch", [2, 8, 16, 24, 32, 48, 64, 100, 512, 1500])
@pytest.mark.parametrize("tick", [0.01, 1.0])
def test_of_two_saves_the_later_is_known_by_its_rounded_name(batch, tick):
    config = resolve("debug", {"batch": batch, "tick": tick})
    for first, second in itertools.product(range(0, 60 * batch, batch), repeat=2):
        names = [kimg_number(config, images) for images in (first, second)]
        for name in (f"training-state-{names[1]}", f"network-snapshot-{names[1]}.safetensors"):
            assert is_later(Path(name), first) == (second > first and names[0] != names[1])


def test_the_newest_snapshots_are_kept_and_the_best(tmp_path):
    for kimg in ("000001.5", "000010.0", "000002.0"):
        (tmp_path / f"network-snapshot-{kimg}.safetensors").touch()
    (tmp_path / "network-best-fd.safetensors").touch()
    prune_snapshots(tmp_path, 0)
    assert len(list(tmp_path.iterdir())) == 4
    prune_snapshots(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "network-best-fd.safetensors", "network-snapshot-000002.0.safetensors", "network-snapshot-000010.0.safetensors",
    ]  # fmt: skip


def test_a_run_that_goes_on_keeps_its_microbatches_or_says_that_it_cannot(tmp_path, monkeypatch, caplog):
    """With less memory too: the number of a microbatch decides the noise of its images."""
    archive = ImageArchive(write_archive(tmp_path / "a.zip"))
    began = plan(resolve("debug", {"kimg": 1.0}, FACTS), archive, ONE)
    assert began.training.batch_gpu == 8
    monkeypatch.setattr(planning, "fit_batch", lambda config, procs: 2)
    again = resolve("debug", {"kimg": 2.0}, FACTS)
    assert plan(again, archive, ONE, recorded=began).training.batch_gpu == 8
    assert not caplog.records
    assert plan(again, archive, Processes(0, 4, ONE.device), recorded=began).training.batch_gpu == 2
    assert "microbatches of 8, with which the run began, do not divide among 4 processes" in caplog.text
    asked = resolve("debug", {"kimg": 2.0, "batch_gpu": 2}, FACTS)
    assert plan(asked, archive, ONE, recorded=began).training.batch_gpu == 2


@pytest.mark.slow
def test_what_falls_with_the_share_that_is_done_has_fallen_where_the_clock_ends_a_run(tmp_path, monkeypatch):
    """The rate is overrated a hundredfold; the learning rate is to fall over the whole run."""
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr("diffit.training.plan.measure", lambda config, *rest, **_: (config, 1e4))
    options = {"minutes": 0.15, "grid": (2, 2), "data": str(archive.path), "batch": 8, "tick": 0.008, "lr": 1e-3}
    config = resolve("debug", options | {"lr_rampup_kimg": 0.0}, FACTS)
    training = config.training.model_copy(update={"lr_decay": 1.0})
    outcome = train(config.model_copy(update={"training": training}), archive, tmp_path / "runs", ONE)
    stats = [json.loads(line) for line in (outcome.run_dir / "stats.jsonl").read_text().splitlines()]
    assert stats[-1]["lr"] < 0.5e-3


@pytest.mark.slow
def test_a_run_that_ends_long_before_its_minutes_says_so(tmp_path, monkeypatch, capsys):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr("diffit.training.plan.measure", lambda config, *rest, **_: (config, 0.5))
    options = {"minutes": 1.0, "grid": (2, 2), "data": str(archive.path), "batch": 8, "batch_gpu": 8}
    train(resolve("debug", options, FACTS), archive, tmp_path / "runs", ONE)
    assert "the machine was more than 4 times as fast as measured; more --minutes go on" in capsys.readouterr().out


def test_lines_of_statistics_are_seconds_apart_on_a_fast_machine(monkeypatch, tmp_path):
    archive = ImageArchive(write_archive(tmp_path / "pets.zip"))
    monkeypatch.setattr(planning, "_rate", lambda *_: 3000.0)
    assert plan(resolve("small16", {"minutes": 10.0}, FACTS), archive, ONE).training.tick == 9.0
    assert plan(resolve("small16", {"minutes": 10.0, "tick": 2.0}, FACTS), archive, ONE).training.tick == 2.0


@pytest.mark.parametrize("seen_before", [0, 5000])
def test_the_rate_of_a_run_leaves_out_the_first_step_of_each_part_and_counts_what_was_before(seen_before):
    """Ten images a second: 5,000 in 500 seconds before; in this part the first step takes a minute."""
    pace = Pace(seen_before, seen_before / 10)
    assert pace.rate(seen_before + 8, 1060.0) is None
    for step in range(1, 5):
        assert pace.rate(seen_before + 8 + 8 * step, 1060.0 + 0.8 * step) == pytest.approx(10)


def test_the_end_of_a_run_is_where_the_clock_ends_it_or_its_length(tmp_path):
    config = with_length(resolve("debug", {"minutes": 2.0, "batch": 8}, FACTS), 80.0)
    stepper = SimpleNamespace(config=config, images_seen=0, seconds=0.0, end=80_000, ema_warming_up=False)
    run = Run(stepper, tmp_path, None, None, None, log=object(), signals=None, watch=None, grid_seconds=8.0)
    stepper.images_seen, stepper.seconds = 1000, 5.0
    assert run.expected_end() == 80_000  # nothing is known yet
    stepper.images_seen, stepper.seconds = 2000, 10.0
    assert run.expected_end() == 2000 + 200 * (120 - 10 - 8 - 2)
    stepper.seconds = 119.0
    assert run.expected_end() == 2000  # the time is up
    stepper.images_seen, stepper.seconds = 79_000, 60.0
    assert run.expected_end() == 80_000
    run.log = None
    assert run.expected_end() == 0  # another process
