"""Two nodes, each a torchrun of its own with a folder of its own for a disk, as docs/scale.md has the commands."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from helpers import command, run, write_archive

ROOT = Path(__file__).parents[2]
KIMG = 0.8
VARIABLE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
TRAIN = "--preset debug --cond --batch-gpu 4 --grid 2x2 --tick 0.04 --dump 1 --snap 0"


def documented(verb: str) -> str:
    """The command of docs/scale.md that starts ``verb`` on every node."""
    page = (ROOT / "docs/scale.md").read_text()
    (found,) = re.findall(rf"^torchrun .*(?:\\\n.*)* {verb} .*$", page, re.MULTILINE)
    return found.replace("\\\n", " ")


def start(nodes: list[Path], verb: str, arguments: str, port: int, restarts: int = 3) -> "list[subprocess.Popen[str]]":
    text = documented(verb).replace("node=8", "node=1").replace("node0:29400", f"127.0.0.1:{port}")
    text = text.replace("--max-restarts=3", f"--max-restarts={restarts}")
    text = text[: text.index(verb)] + f"{verb} {arguments}"
    words = [sys.executable, "-m", "torch.distributed.run", *text.split()[1:]]
    env = {**os.environ, **VARIABLE, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return [
        subprocess.Popen(
            words, cwd=node, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**env, "DIFFIT_CACHE": str(node / "cache")},
        )
        for node in nodes
    ]  # fmt: skip


def on(nodes: list[Path], verb: str, arguments: str, status: int = 0, restarts: int = 3) -> str:
    started = start(nodes, verb, arguments, free_port(), restarts)
    said = [process.communicate(timeout=240)[0] for process in started]
    assert [bool(process.returncode) for process in started] == [bool(status)] * 2, "\n".join(said)
    return "\n".join(said)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def nodes(tmp_path_factory) -> list[Path]:
    data = write_archive(tmp_path_factory.mktemp("data") / "pets.zip", count=40)
    folders = [tmp_path_factory.mktemp(f"node{number}") for number in range(2)]
    for folder in folders:
        shutil.copy(data, folder / "pets.zip")
    return folders


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_nodes_without_a_shared_disk_train_lose_a_process_go_on_and_sample(nodes, tmp_path):
    arguments = f"--data pets.zip --outdir runs {TRAIN} --kimg {KIMG}"
    started = start(nodes, "train", arguments, free_port())
    deadline = time.monotonic() + 240
    while not list(nodes[0].glob("runs/*/training-state-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    (worker,) = psutil.Process(started[1].pid).children()
    worker.send_signal(signal.SIGKILL)
    while "resumed" not in log(nodes[0]) and time.monotonic() < deadline:
        time.sleep(0.02)

    # As a scheduler does before a job's end: torchrun starts nothing again, and the same command goes on.
    for launcher in started:
        launcher.send_signal(signal.SIGUSR1)
    said = "\n".join(process.communicate(timeout=240)[0] for process in started)
    assert [process.returncode for process in started] == [1, 1], said
    on(nodes, "train", arguments)
    assert log(nodes[0]).count("resumed at") == 2
    assert not (nodes[1] / "runs").exists()
    (run_dir,) = (nodes[0] / "runs").iterdir()

    data = nodes[0] / "pets.zip"
    command("train", "--data", data, "--outdir", tmp_path, *TRAIN.split(), "--kimg", KIMG, processes=2)
    ours, theirs = (load_file(newest_state(path) / "model.safetensors") for path in (nodes[0] / "runs", tmp_path))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    network = max(run_dir.glob("network-snapshot-*"))
    on(nodes, "sample", f"--network {network} --outdir {tmp_path / 'samples'} --seeds 0-15 --batch 4")
    assert len(list(tmp_path.glob("samples/*.png"))) == 16


def log(node: Path) -> str:
    (file,) = node.glob("runs/*/log.txt")
    return file.read_text()


def newest_state(outdir: Path) -> Path:
    return max(outdir.glob("*/training-state-*"))


@pytest.mark.slow
def test_nodes_with_other_copies_of_the_images_are_refused_in_a_line(nodes, tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for count, folder in zip((40, 39), folders, strict=True):
        folder.mkdir()
        write_archive(folder / "pets.zip", count=count)
    said = on(folders, "train", f"--data pets.zip --outdir runs {TRAIN}", status=1, restarts=0)
    assert f"{socket.gethostname()} has other images there than process 0; copy the archive again" in said
    assert not list(tmp_path.glob("*/runs"))


ON_ITS_NODE = """
import os
import sys
from diffit.cli import main

os.chdir("node" + os.environ.get("RANK", "1"))
sys.argv[0] = "diffit"
main()
"""


@pytest.mark.slow
def test_a_run_that_another_node_has_is_named_where_process_0_would_begin_again(tmp_path):
    """After a restart process 0 is on the node that did not write."""
    for name in ("node0", "node1"):
        (tmp_path / name).mkdir()
        write_archive(tmp_path / name / "pets.zip", count=40)
    (script := tmp_path / "diffit.py").write_text(ON_ITS_NODE)
    words = [str(script), "train", "--data", "pets.zip", "--outdir", "runs", *TRAIN.split(), "--kimg"]
    assert run(*words, 0.08, folder=tmp_path).returncode == 0
    done = run(*words, 0.16, folder=tmp_path, processes=2)
    assert done.returncode == 1
    (state,) = (tmp_path / "node1").glob("runs/*/training-state-000000.080")
    where = f"{state.relative_to(tmp_path / 'node1')} on {socket.gethostname()}"
    assert (
        f"{where} is later than what process 0 has in its own runs; give an --outdir that all nodes see" in done.stderr
    )
    assert not (tmp_path / "node0" / "runs").exists()
    assert run(*words, 0.08, "--resume", "none", folder=tmp_path, processes=2).returncode == 0
    assert list(tmp_path.glob("node0/runs/*/training-state-*"))


def test_the_jobs_of_the_page_start_what_was_tried():
    page = (ROOT / "docs/scale.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    service, job = yaml.safe_load_all(text)
    words = job["spec"]["template"]["spec"]["containers"][0]["command"]
    assert f"--rdzv_endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29400" in words
    tried = documented("train").split()
    assert page.count("export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1") == 2
    env = job["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {entry["name"]: entry["value"] for entry in env} == VARIABLE
    (slurm,) = re.findall(r"^srun torchrun (?:.*\\\n)*.*&$", page, re.MULTILINE)
    for option in ("--rdzv_backend=c10d", "--max-restarts=3", "-m", "train"):
        assert option in tried
        assert option in words
        assert option in slurm.split()
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in tried
    assert "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1" in slurm.split()
