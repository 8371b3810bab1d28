import errno
import json
import os
import sys
import time
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch

from diffit.configs.resolve import DataFacts, resolve
from diffit.errors import UserError
from diffit.training import run_dir
from diffit.training.run_dir import (
    RunLog,
    create_run,
    find_resumable,
    find_state,
    locate_state,
    same_run,
    truncate_jsonl,
    write_options,
)
from diffit.training.tracking import require_tracker
from diffit.utils.images import make_grid
from diffit.utils.locks import exclusive

FACTS = DataFacts(3, (16, 16), 3)


def config(**options):
    return resolve("debug", {"data": "/data/pets.zip", **options}, FACTS)


def test_runs_are_numbered_and_say_what_they_are(tmp_path):
    assert create_run(tmp_path, config(), 1).name == "00000-pets-debug-gpus1-batch8"
    assert create_run(tmp_path, config(batch=32, desc="try"), 2).name == "00001-pets-debug-gpus2-batch32-try"


@pytest.mark.parametrize("desc", ["a/b", "", "two\nlines", "a\\b"])
def test_a_description_that_is_no_part_of_a_name_is_refused(desc):
    with pytest.raises(UserError, match="becomes part of a folder"):
        config(desc=desc)


@pytest.mark.parametrize("free", [{"kimg": 9.0}, {"tick": 1.0}, {"snap": 3}, {"workers": 1}, {"cfg_scale": 2.0}])
def test_a_longer_or_more_talkative_run_is_the_same_run(free):
    assert same_run(config(), config(**free))


@pytest.mark.parametrize("other", [{"lr": 0.5}, {"seed": 1}, {"batch": 16}, {"base_dim": 32}, {"data": "/data/b.zip"},
                                   {"augment": 0.0}, {"cond": True}, {"precision": "bf16"}])  # fmt: skip
def test_what_changes_the_weights_makes_another_run(other):
    assert not same_run(config(), config(**other))


def test_a_run_that_another_process_has_just_begun_is_named(tmp_path, caplog):
    first = create_run(tmp_path, config(), 1)
    write_options(first, config())
    assert find_resumable(tmp_path, config()) is None
    assert not caplog.text
    with exclusive(first, ""):
        assert find_resumable(tmp_path, config()) is None
    assert f"a new run begins: {first} is another process's" in caplog.text


def with_state(run, kimg):
    state = run / f"training-state-{kimg:06d}"
    state.mkdir()
    (state / "manifest.json").write_text("{}")
    return state


def test_auto_takes_the_newest_state_of_the_newest_run_that_matches(tmp_path):
    first, second, third = (create_run(tmp_path, c, 1) for c in (config(), config(), config(lr=0.5)))
    for run, c in ((first, config()), (second, config()), (third, config(lr=0.5))):
        write_options(run, c)
        with_state(run, 9)
        newest = with_state(run, 10)
    assert find_resumable(tmp_path, config()) == second / "training-state-000010"
    assert find_resumable(tmp_path, config(lr=0.5)) == newest
    assert find_resumable(tmp_path, config(lr=0.25)) is None
    assert find_resumable(tmp_path / "absent", config()) is None


def test_auto_passes_over_runs_that_saved_nothing_or_cannot_be_read(tmp_path):
    first = create_run(tmp_path, config(), 1)
    write_options(first, config())
    state = with_state(first, 10)
    write_options(create_run(tmp_path, config(), 1), config())
    broken = create_run(tmp_path, config(), 1)
    (broken / "training_options.json").write_text("{")
    with_state(broken, 10)
    assert find_resumable(tmp_path, config()) == state


def test_resume_takes_a_run_or_a_state_and_says_what_it_was_given_else(tmp_path):
    run = create_run(tmp_path, config(), 1)
    with_state(run, 9)
    state = with_state(run, 10)
    assert locate_state(run) == locate_state(state) == state
    with pytest.raises(UserError, match="nowhere"):
        locate_state(tmp_path / "nowhere")


def test_statistics_after_the_resumed_image_are_dropped(tmp_path):
    path = tmp_path / "stats.jsonl"
    path.write_text('{"images": 8, "loss": 3}\n{"images": 16, "loss": 2}\n{"images": 24, "lo')
    truncate_jsonl(path, 8)
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == [8]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_records_of_other_things_stay_when_a_run_is_resumed(tmp_path):
    path = tmp_path / "metric-mine.jsonl"
    foreign = ['{"metric": "fd", "results": {}}', '{"metric": "fd", "images": {"name": "a.zip"}}']
    path.write_text("\n".join([*foreign, '{"images": 900}', '{"images": 100}', '{"ima']) + "\n")
    truncate_jsonl(path, 100)
    assert path.read_text().splitlines() == [*foreign, '{"images": 100}']


@pytest.mark.parametrize("name", ["log.txt", "stats.jsonl"])
def test_a_disk_that_is_full_for_records_is_a_user_error(tmp_path, name):
    records = RunLog(tmp_path, config(), 0)
    (tmp_path / name).symlink_to("/dev/full")
    with pytest.raises(UserError, match="the disk is full"):
        records.line("text") if name == "log.txt" else records.stats(8, {"loss": 1.0})
    records.close()


def test_statistics_are_flat_and_reach_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = RunLog(tmp_path, config(), 0)
    records.stats(8, {"kimg": 0.008, "loss": 2.5})
    records.close()
    assert json.loads((tmp_path / "stats.jsonl").read_text()) == {"images": 8, "kimg": 0.008, "loss": 2.5}
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(8, 2.5)]


def test_a_disk_that_is_full_for_tensorboard_is_said_in_a_line(tmp_path, monkeypatch, capsys):
    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RunLog(tmp_path, config(), 0)
    monkeypatch.setattr(RecordWriter, "write", full)

    def statistics():
        for images in range(8, 800, 8):
            log.stats(images, {"loss": 0.5})

    with pytest.raises(UserError, match="the disk is full"):
        statistics()
    assert capsys.readouterr().err == ""


def test_statistics_are_strict_json(tmp_path):
    records = RunLog(tmp_path, config(), 0)
    records.stats(8, {"kimg": 0.008, "loss": float("nan"), "grad_norm": float("inf")})
    records.close()

    def refuse(word):
        raise AssertionError(word)

    (line,) = (tmp_path / "stats.jsonl").read_text().splitlines()
    found = json.loads(line, parse_constant=refuse)
    assert found == {"images": 8, "kimg": 0.008, "loss": None, "grad_norm": None}


class Recorder(ModuleType):
    """In place of wandb: notes what it is asked."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.calls = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *given, **named: self.calls.append((name, given, named)) or (name, *given)


def test_another_tracker_gets_numbers_and_grids_and_goes_on_under_the_name_of_the_run(tmp_path, monkeypatch):
    wandb = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    records = RunLog(tmp_path, config(track="wandb"), 0)
    records.stats(8, {"kimg": 0.008, "loss": 2.5})
    make_grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).save(tmp_path / "grid.png")
    records.picture("fakes", tmp_path / "grid.png", 8)
    records.metric(tmp_path / "metric-fd.jsonl", {"metric": "fd", "images": 8, "results": {"fd": 1.5}})
    records.close()
    (started, _, how), *others, (ended, _, _) = wandb.calls
    assert (started, ended, how["resume"]) == ("init", "finish", "allow")
    assert how["id"].startswith(f"{tmp_path.name}-")
    RunLog(tmp_path, config(track="wandb"), 8).close()
    assert [named["id"] for name, _, named in wandb.calls if name == "init"] == [how["id"]] * 2
    (tmp_path / "elsewhere").mkdir()
    RunLog(tmp_path / "elsewhere", config(track="wandb"), 0).close()
    assert wandb.calls[-2][2]["id"].rpartition("-")[2] != how["id"].rpartition("-")[2]
    logged = [(given[0], named["step"]) for name, given, named in others if name == "log"]
    picture = {"fakes": ("Image", str(tmp_path / "grid.png"))}
    assert logged == [({"kimg": 0.008, "loss": 2.5}, 8), (picture, 8), ({"fd/fd": 1.5}, 8)]


def test_a_tracker_that_is_not_installed_is_said_before_any_work():
    with pytest.raises(UserError, match="--track trackio: that package is not installed; pip install trackio"):
        require_tracker("trackio")
    require_tracker(None)


def of_data(path, content):
    return resolve("debug", {"data": path}, DataFacts(3, (16, 16), 3, content=content))


def saved(outdir, options):
    run = create_run(outdir, options, 1)
    write_options(run, options)
    return with_state(run, 10)


def test_an_archive_that_moved_is_the_same_and_another_in_its_place_is_not(tmp_path):
    before = of_data("/data/pets.zip", "a" * 64)
    state = saved(tmp_path, before)
    assert find_resumable(tmp_path, of_data("/elsewhere/pets.zip", "a" * 64)) == state
    assert find_resumable(tmp_path, of_data("/elsewhere/birds.zip", "b" * 64)) is None
    with pytest.raises(UserError, match=r"other images than .* began with \(aaaaaaaaaaaa, now bbbbbbbbbbbb\)"):
        find_resumable(tmp_path, of_data("/data/pets.zip", "b" * 64))


def test_a_run_that_recorded_no_hash_goes_by_the_path(tmp_path):
    state = saved(tmp_path, of_data("/data/pets.zip", None))
    assert find_resumable(tmp_path, of_data("/data/pets.zip", "a" * 64)) == state
    assert find_resumable(tmp_path, of_data("/elsewhere/pets.zip", "a" * 64)) is None


def test_the_second_command_is_told_of_the_first_and_takes_the_run_up_when_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "verify_state", lambda state: None)
    state = saved(tmp_path, config())
    with ExitStack() as first, ExitStack() as second:
        assert find_state(config(), tmp_path, "auto", first) == state
        for resume in ("auto", str(state)):
            with pytest.raises(UserError, match=r"in use by process \d+ on .*use another --outdir"):
                find_state(config(), tmp_path, resume, second)
        first.close()
        assert find_state(config(), tmp_path, "auto", second) == state


def test_folders_of_runs_that_ended_before_their_first_save_are_removed_by_the_next(tmp_path):
    stillborn, held, young, trained, best, told, linked = (create_run(tmp_path, config(), 1) for _ in range(7))
    (linked / "network-best-fid.safetensors").symlink_to(tmp_path / "a disk that is not there now")
    with_state(trained, 1)
    (stillborn / "stats.jsonl").touch()
    (told / "stats.jsonl").write_text('{"images": 1000}\n')  # the weights were moved, and the states removed
    (best / "network-best-fid.safetensors").write_bytes(b"all that somebody has kept of a run")
    for path in (stillborn, held, young, trained, best, told, linked):
        write_options(path, config())
    long_ago = time.time() - 2 * run_dir.STARTING
    with exclusive(held, "wait"):
        for path in (stillborn, held, trained, best, told, linked):
            os.utime(path, (long_ago, long_ago))
        last = create_run(tmp_path, config(), 1)
    assert run_dir.runs(tmp_path) == [held, young, trained, best, told, linked, last]
