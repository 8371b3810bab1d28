"""States written on a thread: the same bytes, of the moment they were asked for, and whole whatever happens."""

import errno
import hashlib
import os
import signal
import sys
import threading
import traceback
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.training import checkpoint
from diffit.training.checkpoint import StateWriter, save_state, states, verify_state
from diffit.training.loop import train
from diffit.utils.distributed import Processes
from diffit.utils.files import sweep
from diffit.utils.locks import lost
from diffit.weights.file import stream_tensors
from helpers import run_processes, write_archive

ONE = Processes(0, 1, torch.device("cpu"))
FACTS = {"images_seen": 3}


def trained(memory_format=torch.contiguous_format):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 2, 1)).to(memory_format=memory_format)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net(torch.randn(2, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    return net, optimizer


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def gate(monkeypatch):
    """Holds the writing back until it is set."""
    event, honest = threading.Event(), checkpoint.stream_tensors
    monkeypatch.setattr(checkpoint, "stream_tensors", lambda *given: event.wait(30) and honest(*given))
    yield event
    event.set()


def test_streamed_tensors_are_the_bytes_that_safetensors_writes(tmp_path):
    tensors = {"b": torch.randn(3, 4), "a": torch.randn(5), "ü": torch.tensor(2.0)}
    total = stream_tensors(tensors, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == save(tensors)
    assert total == hashlib.sha256(save(tensors)).hexdigest()
    mixed = tensors | {
        "n": torch.arange(3),
        "h": torch.randn(3).bfloat16(),
        "x": torch.zeros(0, 2),
        "f": torch.tensor([True]),
    }
    stream_tensors(mixed, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == save(mixed)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_state_from_the_thread_is_the_state_to_the_last_byte(tmp_path, memory_format):
    net, optimizer = trained(memory_format)
    save_state(tmp_path / "here" / "training-state-000003", net, net, optimizer, FACTS)
    writer = StateWriter()
    writer.save(tmp_path / "there" / "training-state-000003", net, net, optimizer, FACTS)
    writer.wait()
    assert content(tmp_path / "there/training-state-000003") == content(tmp_path / "here/training-state-000003")
    verify_state(tmp_path / "there/training-state-000003")


def test_memory_that_was_taken_beforehand_is_what_the_state_is_copied_to(tmp_path):
    net, optimizer = trained()
    writer = StateWriter()
    writer.reserve(net, net, optimizer)
    writer.wait()
    before = {key: buffer.data_ptr() for key, buffer in writer._buffers.items()}
    writer.save(tmp_path / "training-state-000001", net, net, optimizer, FACTS)
    writer.reserve(net, net, optimizer)  # once is enough
    writer.wait()
    assert {key: buffer.data_ptr() for key, buffer in writer._buffers.items()} == before
    assert len(before) == 4 + 4 + 4 * 3  # weights, average, and of the optimiser three kinds
    save_state(tmp_path / "training-state-000002", net, net, optimizer, FACTS)
    assert content(tmp_path / "training-state-000001") == content(tmp_path / "training-state-000002")


def test_a_state_is_that_of_the_moment_and_appears_when_it_is_whole(tmp_path, gate):
    net, optimizer = trained()
    gate.set()
    save_state(tmp_path / "expected", net, net, optimizer, FACTS)
    gate.clear()
    writer, folder = StateWriter(), tmp_path / "training-state-000003"
    writer.save(folder, net, net, optimizer, FACTS)
    with torch.no_grad():
        next(net.parameters()).zero_()
    writer.check()
    assert states(tmp_path) == []
    gate.set()
    writer.wait()
    assert content(folder) == content(tmp_path / "expected")


def test_the_next_state_waits_for_the_last_and_older_ones_go_when_it_is_there(tmp_path, gate):
    net, optimizer = trained()
    gate.set()
    writer = StateWriter()
    for number in range(1, 4):
        writer.save(tmp_path / f"training-state-00000{number}", net, net, optimizer, FACTS)
        if number == 2:  # which the third waits for
            gate.clear()
            threading.Timer(0.2, gate.set).start()
    writer.wait()
    assert [path.name for path in states(tmp_path)] == ["training-state-000002", "training-state-000003"]
    gate.clear()
    writer.save(tmp_path / "training-state-000004", net, net, optimizer, FACTS)
    assert [path.name for path in states(tmp_path)] == ["training-state-000002", "training-state-000003"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_is_told_at_the_next_check_and_the_older_states_stay(tmp_path, monkeypatch):
    net, optimizer = trained()
    writer = StateWriter()
    writer.save(tmp_path / "training-state-000001", net, net, optimizer, FACTS)
    writer.wait()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "stream_tensors", full)
        writer.save(tmp_path / "training-state-000002", net, net, optimizer, FACTS)
        for _ in range(300):
            if writer._pending.done():
                break
            threading.Event().wait(0.01)
        with pytest.raises(UserError, match="training-state-000002: the disk is full"):
            writer.check()
    assert [path.name for path in tmp_path.iterdir()] == ["training-state-000001"]
    writer.save(tmp_path / "training-state-000003", net, net, optimizer, FACTS)
    writer.wait()
    assert [path.name for path in states(tmp_path)] == ["training-state-000001", "training-state-000003"]


@pytest.mark.parametrize(("number", "kept"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_nothing_is_written_once_a_run_is_free_and_only_a_person_gives_a_state_up(
    tmp_path, gate, number, kept, monkeypatch
):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    net, optimizer = trained()
    writer, folder = StateWriter(), tmp_path / "training-state-000001"
    writer.save(folder, net, net, optimizer, FACTS)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which it is not in a shell's background
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        writer.wait()
    signal.signal(signal.SIGINT, before)
    pending = writer._pending
    assert not pending.done()
    threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
    threading.Timer(0.6, gate.set).start()
    writer.close()
    assert pending.done()
    assert list(tmp_path.iterdir()) == [folder] * kept
    writer.save(folder, net, net, optimizer, FACTS)  # of a run that goes on
    writer.wait()
    verify_state(folder)


def test_a_disk_that_takes_a_part_of_a_write_gets_the_rest(tmp_path, monkeypatch):
    class Slow:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            return self.file.write(data[: max(len(data) // 2, 1)])

    honest, tensors = Path.open, {"a": torch.randn(999)}
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, *given, **named: Slow(honest(path, *given, **named)))
        total = stream_tensors(tensors, tmp_path / "a")
    assert hashlib.sha256((tmp_path / "a").read_bytes()).hexdigest() == total
    assert (tmp_path / "a").read_bytes() == save(tensors)


def test_nothing_is_put_in_place_once_another_process_has_the_run(tmp_path, gate):
    net, optimizer = trained()
    writer = StateWriter()
    writer.save(tmp_path / "training-state-000001", net, net, optimizer, FACTS)
    lost.set()
    try:
        gate.set()
        with pytest.raises(UserError, match="another process has this run now"):
            writer.wait()
    finally:
        lost.clear()
    assert list(tmp_path.iterdir()) == []


CALLS = {
    "open",
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.listdir",
    "os.scandir",
    "shutil.rmtree",
}


def killed_at(folder: Path, call: int, net: torch.nn.Module, optimizer: torch.optim.Optimizer) -> bool:
    """Save a second state in a process that dies at that of the writer's calls to the file system; whether it came."""
    child = os.fork()
    if not child:
        left = [call]

        def count(event: str, given: tuple) -> None:
            if event in CALLS and threading.current_thread() is not threading.main_thread():
                left[0] -= 1
                if left[0] < 0:
                    os.kill(os.getpid(), 9)

        try:
            writer = StateWriter()
            sys.addaudithook(count)
            writer.save(folder / "training-state-000003", net, net, optimizer, FACTS)
            writer.wait()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return os.WIFSIGNALED(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_kill_at_any_call_of_the_writer_leaves_whole_states_and_what_the_next_start_sweeps(tmp_path):
    net, optimizer = trained()
    call, seen = 0, set()
    while True:
        folder = tmp_path / str(call)
        for number in (1, 2):
            save_state(folder / f"training-state-00000{number}", net, net, optimizer, FACTS)
        alive = not killed_at(folder, call, net, optimizer)
        sweep(folder)
        names = [path.name for path in sorted(folder.iterdir())]
        assert all(name.startswith("training-state-") for name in names)
        for state in states(folder)[-2:]:
            verify_state(state)
        seen.add(tuple(int(name[-1]) for name in names))
        if alive:
            break
        call += 1
    assert call > 15
    assert seen == {(1, 2), (1, 2, 3), (2, 3)}


def run(data, outdir, **options):
    config = resolve(
        "debug", {"data": str(data), "cond": True, "batch_gpu": 8, "grid": (2, 2), "tick": 0.016, "dump": 1, **options},
        DataFacts(3, (16, 16), 3),
    )  # fmt: skip
    return train(config, ImageArchive(data, cond=True), outdir, ONE)


def test_a_disk_that_fills_up_ends_the_run_within_a_step_and_it_goes_on_from_the_older_state(tmp_path, monkeypatch):
    data = write_archive(tmp_path / "pets.zip")
    whole = run(data, tmp_path / "whole", kimg=0.096)
    honest, calls, steps = checkpoint.stream_tensors, [], []

    def fills_up(tensors, path, *given):
        calls.append(path)
        return full() if len(calls) > 3 else honest(tensors, path, *given)  # three files a state

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "stream_tensors", fills_up)
        waits = checkpoint.StateWriter.check

        def check(writer):
            steps.append(writer._pending is not None and len(calls) > 3)
            if writer._pending is not None:
                writer._pending.exception()  # as if a step took as long as the writing
            waits(writer)

        patch.setattr(checkpoint.StateWriter, "check", check)
        with pytest.raises(UserError, match="the disk is full"):
            run(data, tmp_path / "full", kimg=0.096)
    assert steps.count(True) <= 1
    (run_dir,) = (tmp_path / "full").iterdir()
    assert [path.name for path in states(run_dir)] == ["training-state-000000.016"]
    again = run(data, tmp_path / "full", kimg=0.096)
    assert again.run_dir == run_dir
    for name in ("model", "ema", "optimizer"):
        file = f"{name}.safetensors"
        assert (states(run_dir)[-1] / file).read_bytes() == (states(whole.run_dir)[-1] / file).read_bytes()


APART = """
from pathlib import Path
import torch
from diffit.configs.resolve import DataFacts, resolve
from diffit.errors import UserError
from diffit.training.step import Stepper, build_network
from diffit.utils.distributed import alone, processes
config = resolve("debug", {"batch_gpu": 4}, DataFacts(3, (16, 16)))
state, images = Path("training-state-000001"), torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
with processes() as procs:
    if procs.is_first:
        first = Stepper(config, alone("cpu"), build_network(config), "fp32")
        first.step(iter([(images, None)] * 9))
        first.save(state)
    second = Stepper(config, procs, build_network(config), "fp32")
    second.restore(state if procs.is_first else Path("of another node"))
    second.save(Path(f"again{procs.rank}"))
    assert second.images_seen == config.training.batch
    try:
        second.restore(Path("nowhere"))
    except Exception as error:
        print(f"<{type(error).__name__}>")
"""


@pytest.mark.slow
def test_a_state_that_only_the_first_process_can_read_is_taken_up_by_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = run_processes(APART, tmp_path)
    for name in ("model", "ema", "optimizer"):
        first, *others = (
            (tmp_path / folder / f"{name}.safetensors").read_bytes()
            for folder in ("training-state-000001", "again0", "again1")
        )
        assert others == [first, first]
    assert said.count("Error>") == 2
