"""Every command and code block of README.md and docs/ is run, at toy size, in a folder that holds what they name.

A document's blocks run in order in one folder, Python blocks in one namespace. ``ADAPTED`` says what is changed before
a block runs and why, ``NOT_RUN`` what is only looked at, ``PROVIDED`` which files are made here when a command names
one that no command before it has made. What none of these covers is run as it stands, so it fails if it is wrong.
A command that several documents have is run in the first.
"""

import io
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import click
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from diffit.cli import cli, run
from diffit.cli.studio import studio
from diffit.cli.train import train
from diffit.configs import get_preset
from diffit.configs.schema import Config
from diffit.metrics.classifier import HEADER, Classifier
from diffit.models import build
from diffit.models.attention import relative_position_index
from diffit.models.latent import LatentDiffiT
from diffit.weights import save_network
from diffit.weights.file import save_tensors
from helpers import write_archive, write_vae

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NETWORK = "network-snapshot-000200.safetensors"
SHELLS = ("", "bash", "sh", "shell", "console")

ADAPTED = [  # (pattern, replacement), in this order
    # Several processes: tests/e2e starts the launcher; here the same command runs in one.
    (r"torchrun(?: --\S+)* (?=train\.py)", "python "),
    (r"torchrun(?: --\S+)* -m diffit", "diffit"),
    # What a line leaves open.
    (r"00000-…", "00000-mine"),
    (r"diffit train …", "diffit train --data datasets/mine.zip --outdir runs/mine"),
    (r"metrics calc …", f"metrics calc --network {NETWORK} --ref datasets/mine.zip --metrics fid50k_full"),
    (r"--network …", f"--network {NETWORK}"),
    # Few photographs, and small: as large as the images of the networks that are made here.
    (r"(examples/photos\.py.*)", r"\1 --crops 4"),
    (r"(data convert .*--resolution) (?:\d\dx\d\d|\d\d)(?![\dx])", r"\1 16x16"),
    (r"(metrics calc .*--ref) datasets/\S+", r"\1 datasets/mine.zip"),
    # There is no network to fetch Inception's weights: features of random filters. They are no FID, so it is fd.
    (r"(diffit metrics (?:calc|ref|copies).*)", r"\1 --detector filters.safetensors"),
    (r"(diffit metrics copies)", r"\1 --count 16"),
    (r"(train(?:\.py)? .*--metrics[ =])fid\d+k\w*", r"\1fd16_full:filters.safetensors"),
    (r"(--metrics[ =])(?:fid|adm)\d+k\w*", r"\1fd16_full"),
    (r"(--metrics[ =])([a-z]+)\d+k", r"\g<1>\g<2>16"),
    (r"--metric fd10k_full:pixels --evaluations \S+", "--metric fd16_full:filters.safetensors --evaluations 2,3"),
    # A trained network, a GPU and days of time.
    (r"(tune-schedule .*--steps) \S+", r"\1 4 --seeds 0-7"),
    (r"--num-samples \d{3,}", "--num-samples 4"),
    (r'"cuda"', '"cpu"'),
    # The stand-in for the official file is far smaller than XL/2; tests/weights/test_adapt.py tunes such a file.
    (r" --init-from diffit_256\.safetensors", ""),
    # Only a latent model has NVIDIA's layout.
    (r"--network \S+(?= --to official)", "--network latent.safetensors"),
    # An account on the Hub.
    (r"(?m)^.*push_to_hub\(.*$", ""),
    (r'(?m)^.*from_pretrained\("owner/.*$', ""),
]
OUTPUTS = ("--dest", "--outdir", "--to", "--vae")  # options whose value need not be there before
STAND_INS = {  # names that a snippet uses for what its reader has
    "labels": torch.tensor([0, 1]),
    "null_labels": torch.tensor([3, 3]),
    "noise": torch.zeros(2, 3, 16, 16, dtype=torch.float64),
}


def photos(path: Path) -> None:
    path.mkdir(parents=True)
    y, x = np.mgrid[:90, :120]
    for i in range(24):
        wave = np.sin(x / (9 + i) + y / 31 + np.arange(3)[:, None, None] * i)
        Image.fromarray((127.5 + 120 * wave).astype(np.uint8).transpose(1, 2, 0)).save(path / f"{i:03d}.jpg")


def archive(path: Path) -> None:
    """As large as its name says, else 16×16."""
    side = next((int(size) for size in re.findall(r"256|512|64", path.name)), 32 if "cifar" in path.name else 16)
    write_archive(path, side=side)


def latents(path: Path) -> None:
    archive(source := path.with_name("images.zip"))
    diffit("data", "encode", "--source", source, "--dest", path, "--vae", "stabilityai/sd-vae-ft-ema")


def network(path: Path, preset: str = "debug") -> None:
    config = get_preset(preset)
    changes = {"model": config.model.model_dump() | {"num_classes": 3}, "data": {"class_names": ("ant", "bee", "cat")}}
    config = Config.model_validate(config.model_dump() | changes)
    save_network(path, build(config.model).state_dict(), config, kimg=200)


def latent(path: Path) -> None:
    network(path, "latent-debug")


def official(path: Path) -> None:
    """NVIDIA's layout, index buffers included, with ImageNet's classes and almost no width."""
    net = LatentDiffiT(input_size=(8, 8), hidden_size=32, depth=2, num_heads=2, num_classes=1000)
    state = net.state_dict()
    for i in range(2):
        state[f"blocks.{i}.attn.relative_position_index"] = relative_position_index((4, 4))
    save_file({key: value.contiguous() for key, value in state.items()}, path)


def filters(path: Path) -> None:
    header = {"format": "pt", HEADER: json.dumps({"channels": 3, "classes": 2})}
    save_tensors(Classifier(3, 2).state_dict(), path, header)


def cifar(path: Path) -> None:
    """As it is downloaded: a tar of batches, three images in each."""
    names = {b"label_names": [f"class{i}".encode() for i in range(10)]}
    with tarfile.open(path, "w:gz") as tar:
        for i, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "batches.meta"]):
            batch = {b"data": np.full((3, 3072), 40 * i, np.uint8) + np.arange(3, dtype=np.uint8)[:, None]}
            data = pickle.dumps(names if name == "batches.meta" else batch | {b"labels": [0, 1, i]}, protocol=2)
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def statistics(path: Path) -> None:
    archive(source := path.with_name("reference.zip"))
    diffit("metrics", "ref", "--data", source, "--dest", path, "--detector", "filters.safetensors")


PROVIDED = [  # (names, what makes them)
    (r"my-photos/?", photos),
    (r"samples/?", photos),
    (r"cifar-10-python\.tar\.gz", cifar),
    (r"\S*-latents", latents),
    (r"\S+\.zip", archive),
    (r"diffit_\S+\.safetensors", official),
    (r"latent\.safetensors", latent),
    (r"\S*network-\S+\.safetensors", network),
    (r"runs/mine", lambda path: network(path / NETWORK)),
    (r"VIRTUAL_\S+\.npz", statistics),
]


def only_a_target_of_the_makefile(words: list[str]) -> None:
    assert set(words[1:]) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)), words


def only_extras_that_exist(words: list[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for named in re.findall(r"(?:\.|\bdiffit[\w-]*)\[([\w,]+)\]", " ".join(words)):
        assert set(named.split(",")) <= set(project["optional-dependencies"]), words
    wrong = [word for word in words if re.match(r"diffit\b(?!-torch)", word)]
    assert not wrong, f"{wrong}: another project's name on the index"


NOT_RUN = {  # a tool that a command begins with -> what is looked at
    "make": only_a_target_of_the_makefile,  # each sets up .venv first
    "pip": only_extras_that_exist,
    "git": lambda words: None,  # needs the network, as do these
    "hf": lambda words: None,
    "tensorboard": lambda words: None,  # serves until it is stopped
}


def blocks() -> list[tuple[str, str, str]]:
    """``(document:line, language, text)`` of every fenced block."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text()
        for fence in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.M | re.S):
            line = text.count("\n", 0, fence.start()) + 1
            found.append((f"{document.relative_to(ROOT)}:{line}", fence[1].strip(), fence[2]))
    return found


def shell_lines(text: str) -> list[str]:
    """The commands of a block, without comments."""
    lines = re.sub(r"(?m)\s+#.*$", "", text.replace("\\\n", " ")).splitlines()
    return [" ".join(line.removeprefix("$ ").split()) for line in lines if line.strip() and not line.startswith("#")]


def first_places() -> dict[str, str]:
    """Command to the first document that has it."""
    found: dict[str, str] = {}
    for place, language, text in blocks():
        if language in SHELLS:
            for line in shell_lines(text):
                found.setdefault(line, place.rsplit(":", 1)[0])
    return found


def diffit(*words: object, command: click.Command = cli) -> None:
    with pytest.raises(SystemExit) as left:
        run(command, [str(word) for word in words])
    assert not left.value.code, f"diffit {' '.join(map(str, words))}: exit status {left.value.code}, see stderr"


def provide(words: list[str]) -> None:
    """Make the files that are named and are not there."""
    for before, word in zip(["", *words], words, strict=False):
        option, _, value = word.partition("=") if word.startswith("--") else (before, "", word)
        path = Path(value)
        maker = next((maker for names, maker in PROVIDED if re.fullmatch(names, value)), None)
        if maker is not None and option not in OUTPUTS and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            maker(path)


def perform(words: list[str]) -> None:
    """One command, once it has been adapted."""
    tool, *rest = words
    if tool in NOT_RUN:
        NOT_RUN[tool](words)
        return
    if rest[0] == "studio":  # serves until it is stopped: its options are parsed
        studio.make_context("studio", rest[1:])
        return
    provide(words)
    if "--dest" in rest and Path(rest[rest.index("--dest") + 1]).exists() and rest[0] in ("data", "export"):
        rest.append("--overwrite")  # it was provided for a command before this one
    if rest[0] == "train" or (tool == "python" and rest[0] == "train.py"):
        said = {word.partition("=")[0] for word in rest}
        if said & {"--preset", "--minutes", "--hours", "--kimg", "--duration", "--epochs"}:
            rest += ["--dry-run", "--num-blocks", "1"]  # days of work are only planned, with less to trace
        elif "--dry-run" not in said:
            rest += ["--preset", "debug", "--kimg", "0.04"]
        diffit(*rest[1:], command=train)
    elif tool == "diffit":
        diffit(*rest, *(["--steps", "2,1", "--kimg", "0.016"] if rest[0] == "distill" else []))  # of 8,4,2,1
    elif tool == "python":
        if rest[:2] == ["-m", "benchmarks.mutants"]:  # half an hour of them
            rest = [*rest[:2], "--help"]
        rest = [str(ROOT / word) if word.endswith(".py") and (ROOT / word).exists() else word for word in rest]
        place = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *rest], env=os.environ | place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        pytest.fail(f"{' '.join(words)}: no rule for {tool!r}; tag the block ```text if it is no command")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder and a Python namespace for each document."""
    found = {
        doc.relative_to(ROOT).as_posix(): (tmp_path_factory.mktemp(doc.stem), dict(STAND_INS)) for doc in DOCUMENTS
    }
    for folder, _ in found.values():
        filters(folder / "filters.safetensors")
    return found


@pytest.fixture(autouse=True)
def _hub(tmp_path_factory, monkeypatch):
    """The cache of the Hub's client, with a small autoencoder under the name of the real one."""
    cache = tmp_path_factory.getbasetemp() / "hub-of-readme"
    repository = cache / "models--stabilityai--sd-vae-ft-ema"
    if not cache.exists():
        (repository / "refs").mkdir(parents=True)
        (repository / "refs/main").write_text("0" * 40)
        write_vae(repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


@pytest.mark.parametrize(("place", "language", "text"), [pytest.param(*block, id=block[0]) for block in blocks()])
def test_the_block_runs(place, language, text, places, monkeypatch):
    document = place.rsplit(":", 1)[0]
    folder, namespace = places[document]
    monkeypatch.chdir(folder)
    if language == "python":  # after those before it, which may have been given to another worker
        for earlier, kind, code in blocks():
            if kind == "python" and earlier.startswith(f"{document}:") and earlier not in namespace:
                code = adapted(code)
                provide(["", *re.findall(r'"([^"\n]+)"', code)])
                exec(compile(code, earlier, "exec"), namespace)
                namespace[earlier] = "was run"
            if earlier == place:
                return
    if language in ("text", "json", "yaml"):  # output, trees and files
        return
    assert language in SHELLS, f"{place}: no rule for ```{language}"
    first = first_places()
    for line in shell_lines(text):
        if first[line] == place.rsplit(":", 1)[0]:
            perform(shlex.split(adapted(line)))


def adapted(text: str) -> str:
    for pattern, replacement in ADAPTED:
        text = re.sub(pattern, replacement, text)
    return text


def test_options_named_in_the_text_exist():
    known = {"--logdir", "--version", "--help"}
    known |= {"--nproc-per-node", "--signals-to-handle", "--shutdown-timeout", "--max-restarts"}  # torchrun's
    known |= {"--ntasks-per-node", "--gpus-per-task"}  # Slurm's

    def collect(command: click.Command) -> None:
        known.update(name for param in command.params for name in (*param.opts, *param.secondary_opts))
        known.update(getattr(command, "aliases", {}))
        if isinstance(command, click.Group):
            for name in command.list_commands(click.Context(command)):
                collect(command.get_command(click.Context(command), name))

    collect(cli)
    for document in DOCUMENTS:
        code = "\n".join(re.findall(r"`([^`\n]*)`", re.sub(r"(?ms)^```.*?^```$", "", document.read_text())))
        named = {name.replace("_", "-") for name in re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", code)}
        assert named <= {name.replace("_", "-") for name in known}, document.name
