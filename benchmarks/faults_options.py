"""Mutated command lines: whatever is typed, the answer is the work, or one line that says what is wrong.

Every command of ``diffit`` starts from words that work on tiny inputs made here. Words are then replaced, added,
dropped and repeated, with wrong types, huge numbers, empty and hostile text, missing, damaged and special files; some
run with folders that cannot be used. Each runs in a process forked from one that has the libraries loaded, in a folder
of its own, with limits on memory and time.

    python -m benchmarks.faults_options [--count N] [--seed S]

prints what was wrong, each with the words that show it, and a table. Linux only.
"""

import argparse
import io
import math
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from PIL import Image

from diffit.cli import cli
from diffit.cli import run as run_command
from diffit.configs.presets import get_preset
from diffit.models import build
from diffit.weights import save_network

SECONDS = 5.0  # of processor time, within which a command on tiny inputs has answered
PATIENCE = 120.0  # seconds by the clock, after which it hangs: other work may keep it from the processor
MEMORY = 3 << 30  # bytes of address space more than the libraries have
LONGEST = 2000  # characters on stderr

WORKING = [
    "data convert --source raw --dest new.zip --resolution 8",
    "data convert --source pets.zip --dest folder --cond",
    "data check pets.zip",
    "data check latents",
    "data encode --source pets.zip --dest new-latents --vae vae",
    "train --data pets.zip --outdir runs --preset debug --kimg 0.016 --dry-run",
    "train --data pets.zip --outdir runs --kimg 0.004 --batch 4 --dry-run --json",
    "train --data pets.zip --outdir runs --preset debug --kimg 0.004 --batch 4 --grid 1x1",
    "sample --network net.safetensors --outdir out --seeds 0-1 --steps 1",
    "sample --network net.safetensors --outdir out --num-samples 2 --steps 1 --format npz --grid 2x1",
    "export --network net.safetensors --to hub-folder --dest card",
    "export --network net.safetensors --to diffusers --dest pipeline",
    "info net.safetensors",
    "info debug --num-blocks 1",
    "metrics calc --images pets.zip --ref pets.zip --metrics kd8:pixels",
    "metrics calc --network net.safetensors --ref pets.zip --metrics kd4:pixels --steps 1",
    "metrics ref --data pets.zip --dest pets.npz --detector pixels",
    "metrics show metric-fid.jsonl",
    "metrics copies --images pets.zip --data pets.zip --dest copies.html --detector pixels --count 4",
    "metrics train-detector --data pets.zip --dest detector.safetensors --epochs 1",
]
LONG = ("compile", "kimg", "minutes", "hours", "duration")  # options that ask for as much work as they say
NUMBERS = [
    "0", "-1", "1", "2", "3", "1000000000000", "9" * 30, "9" * 5000, "-0", "0.5", "1e12", "1e400", "nan", "inf", "-inf",
    "0x10", "1_0", "٣", "1e-320",
]  # fmt: skip
SIZES = ["100000x100000", "0x0", "8x8", "0-1000000000000", "3-1", "0-1,0", ",", "0," * 20_000, "1,2", "nan,nan",
         "ddim1000000000000", "ddim0"]  # fmt: skip
TEXTS = [
    "", " ", "x", "-", "--", "é", "a b", "\x1b[31mred\x1b[0m", "a\nerror: all is well", "\udcff\udcfe", "A" * 40_000,
    "true", "[1]", "{}", "%s", "$HOME", "*", "~", "owner/name", "fid10k_full", "kd1000000000000:pixels",
    "fd8:net.safetensors", "inception:net.safetensors", "pr8_0_full:pixels", "is8", "kd8:pixels", "debug", "small16",
    "latent-debug", "imagenet256", "0", "nan", "auto", "none",
]  # fmt: skip
FILES = [
    "missing", "missing/deeper", ".", "..", "raw", "pets.zip", "latents", "vae", "net.safetensors", "pets.npz",
    "metric-fid.jsonl", "empty", "noise.zip", "noise.safetensors", "noise.npz", "noise.pt", "noise.json", "noise.yaml",
    "list.json", "null", "full", "zero", "loop", "pets.zip/inner", "name\nwith line", "\x1b[2Jname", "unreadable",
    "read-only", "read-only/new.zip", "/dev/null/x",
]  # fmt: skip
ENVIRONMENTS = [
    {"HOME": "/dev/null", "XDG_CACHE_HOME": ""},
    {"HOME": "", "XDG_CACHE_HOME": "", "DIFFIT_CACHE": ""},
    {"DIFFIT_CACHE": "/dev/null/cache"},
    {"DIFFIT_CACHE": "pets.zip"},
    {"HF_HOME": "/dev/null/hub", "TORCH_HOME": "/dev/null/torch"},
    {"TMPDIR": "/missing"},
    {"WORLD_SIZE": "x"},
    {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"},
]


@dataclass(frozen=True)
class Outcome:
    words: list[str]
    environment: dict[str, str]
    status: int
    """Exit status, or minus the signal that ended it."""
    stdout: str
    stderr: str
    seconds: float
    peak: int
    """Bytes of memory, those of the libraries included."""

    @property
    def kind(self) -> str:
        known = sorted(
            {" ".join(line.split()[: 2 if line.split()[0] in ("data", "metrics") else 1]) for line in WORKING}
        )
        return next((name for name in known if self.words[: len(name.split())] == name.split()), "other")

    @property
    def fault(self) -> str | None:
        """What is wrong with the answer."""
        told = [line for line in self.stderr.splitlines() if not line.startswith("warning: ")]
        one_line = len(told) == 1 and told[0].startswith("error: ") and self.status in (1, 2)
        if self.seconds > SECONDS:
            return "slow"
        if "Traceback (most recent" in self.stderr or not (0 <= self.status < 128):
            return "traceback"
        if self.status and not one_line and not (self.status == 1 and self.stdout and not told):  # what `check` finds
            return "not one line"
        if self.status and len(self.stderr) > LONGEST:
            return "long"
        if any(not (c.isprintable() or c == "\n") for c in self.stdout + self.stderr):
            return "terminal"
        return None


def make_inputs(folder: Path) -> None:
    """Everything that a name in WORKING or FILES stands for."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    labels = []
    with zipfile.ZipFile(folder / "pets.zip", "w") as archive:
        for i in range(12):
            encoded = io.BytesIO()
            Image.fromarray(rng.integers(256, size=(16, 16, 3), dtype=np.uint8)).save(encoded, "PNG")
            archive.writestr(name := f"00000/img{i:08d}.png", encoded.getvalue())
            labels.append([name, i % 3])
            path = folder / "raw" / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded.getvalue())
        archive.writestr("dataset.json", '{"labels": ' + str(labels).replace("'", '"') + "}")
    config = get_preset("debug")
    config = config.model_copy(
        update={"model": config.model.model_copy(update={"num_classes": 3, "image_size": (16, 16)})}
    )
    torch.manual_seed(0)
    save_network(folder / "net.safetensors", build(config.model).state_dict(), config, kimg=1)
    write_vae(folder / "vae")
    np.savez(folder / "pets.npz", arr_0=rng.integers(256, size=(4, 16, 16, 3), dtype=np.uint8))
    (folder / "metric-fid.jsonl").write_text('{"metric": "fid10k", "results": {"fid": 3.0}, "images": 4}\n')
    (folder / "empty").touch()
    for suffix in ("zip", "safetensors", "npz", "pt", "json", "yaml"):
        (folder / f"noise.{suffix}").write_bytes(rng.bytes(200))
    (folder / "list.json").write_text("[1, 2]")
    for device in ("null", "full", "zero"):
        (folder / device).symlink_to(f"/dev/{device}")
    (folder / "loop").symlink_to("loop")
    (folder / "name\nwith line").write_text("x")
    status, _, error = execute(
        ["data", "encode", "--source", "pets.zip", "--dest", "latents", "--vae", "vae"], folder, {}
    )[:3]
    assert status == 0, error


def write_vae(path: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(path)


def options_of(words: list[str]) -> dict[str, list[str]]:
    """Option -> values of its kind, of the command that ``words`` begin with."""
    command: click.Command = cli
    for word in words:
        found = command.get_command(click.Context(cli), word) if isinstance(command, click.Group) else None
        if found is None:
            break
        command = found
    return {
        name: values_of(param.type)
        for param in command.params
        if isinstance(param, click.Option) and param.name not in LONG
        for name in param.opts
    }


def values_of(kind: click.ParamType) -> list[str]:
    if isinstance(kind, click.Choice):
        return [str(choice) for choice in kind.choices]
    if isinstance(kind, click.types.BoolParamType):
        return ["true", "no", "1", "x"]
    if isinstance(kind, click.Path):
        return FILES
    return TEXTS + FILES if isinstance(kind, click.types.StringParamType) else NUMBERS + SIZES


def mutate(rng: random.Random) -> list[str]:
    """Words that work, changed in one or two places."""
    words = rng.choice(WORKING).split()
    options = options_of(words)
    for _ in range(rng.choice([1, 1, 1, 2])):
        anything = rng.choice(rng.choice([NUMBERS, SIZES, TEXTS, FILES]))
        change = rng.randrange(12)
        if change < 5:
            i = rng.randrange(min(2, len(words) - 1), len(words))
            suitable = options.get(words[i - 1], FILES)
            if words[i - 1].removeprefix("--") in LONG:
                continue
            words[i] = anything if rng.random() < 0.2 else rng.choice(suitable)
        elif change < 10:
            name, suitable = rng.choice(list(options.items()))
            value = anything if rng.random() < 0.2 else rng.choice(suitable)
            words += [f"{name}={value}"] if rng.random() < 0.5 else [name, value]
        elif change == 10 and len(words) > 1:
            del words[rng.randrange(len(words))]
        else:
            words.insert(rng.randrange(len(words) + 1), rng.choice([anything, "--nope", "--help", *words]))
    return words


def outcomes(count: int, seed: int = 0) -> Iterator[Outcome]:
    """What ``count`` mutated command lines do."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before its client reads it
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401  # before the forks: it takes seconds
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    import diffit.pipeline
    import diffit.sampling
    import diffit.training  # noqa: F401

    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        inputs, place = Path(name) / "inputs", Path(name) / "place"
        make_inputs(inputs)
        for _ in range(count):
            words = mutate(rng)
            environment = rng.choice(ENVIRONMENTS) if rng.random() < 0.1 else {}
            shutil.copytree(inputs, place, symlinks=True)
            (place / "unreadable").touch(mode=0)  # not for an administrator, nor is the other
            (place / "read-only").mkdir(mode=0o555)
            yield Outcome(words, environment, *execute(words, place, environment))
            shutil.rmtree(place)


def execute(words: list[str], folder: Path, environment: dict[str, str]) -> tuple[int, str, str, float, int]:
    """Status, output, seconds and bytes of a command in a fork of this process."""
    texts = [folder.parent / "stdout", folder.parent / "stderr"]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _become(words, folder, environment, texts)
    end = time.monotonic() + PATIENCE
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done or time.monotonic() > end:
            break
        time.sleep(0.005)
    seconds = usage.ru_utime + usage.ru_stime
    if not done:
        os.killpg(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        seconds = PATIENCE
    stdout, stderr = (path.read_text(encoding="utf-8", errors="replace") for path in texts)
    return os.waitstatus_to_exitcode(status), stdout, stderr, seconds, usage.ru_maxrss << 10


def _become(words: list[str], folder: Path, environment: dict[str, str], texts: list[Path]) -> None:
    """In the child: run the command, and end."""
    status = 99
    try:
        os.setsid()
        for number, path in enumerate(texts, start=1):
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, number)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY,) * 2)
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(SECONDS) + 1,) * 2)
        os.chdir(folder)
        os.environ |= {"DIFFIT_CACHE": str(folder / "cache"), **environment}
        sys.argv = ["diffit", *words]
        run_command(cli, words)
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else bool(error.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(count: int, seed: int = 0) -> list[tuple[str, int, int, int, int]]:
    """(command, tried, one-line errors, tracebacks and other faults, longer than 5 s), and each fault on stderr."""
    rows: dict[str, list[int]] = {}
    for outcome in outcomes(count, seed):
        row = rows.setdefault(outcome.kind, [0, 0, 0, 0])
        row[0] += 1
        row[1] += bool(outcome.status) and outcome.fault is None
        row[2] += outcome.fault not in (None, "slow")
        row[3] += outcome.fault == "slow"
        if outcome.fault is not None:
            report(outcome)
    return [(kind, *row) for kind, row in sorted(rows.items())]  # type: ignore[misc]


def report(outcome: Outcome) -> None:
    """A fault, and the words that show it again."""
    words = " ".join(shlex.quote(word[:80]) for word in outcome.words).encode("unicode_escape").decode()
    last = (outcome.stderr.strip().splitlines() or ["(nothing on stderr)"])[-1][:300].encode("unicode_escape").decode()
    extra = "".join(f"{key}={value} " for key, value in outcome.environment.items())
    print(
        f"{outcome.fault}: {extra}diffit {words}\n    status {outcome.status}, {outcome.seconds:.1f} s: {last}",
        file=sys.stderr,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{'command':<24}{'tried':>8}{'one line':>10}{'faults':>8}{'over 5 s':>10}")
    for kind, *numbers in run(arguments.count, arguments.seed):
        print(f"{kind:<24}{numbers[0]:>8}{numbers[1]:>10}{numbers[2]:>8}{numbers[3]:>10}")


if __name__ == "__main__":
    main()
