"""Metrics of networks and of runs, as a user gets them."""

import csv
import io
import json
import re
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.errors import UserError
from diffit.metrics.evaluate import evaluate_network
from diffit.metrics.record import read_records
from diffit.metrics.suite import Suite
from diffit.sampling import load
from diffit.sampling.labels import training_labels
from diffit.training.evaluator import Evaluator
from diffit.training.loop import train
from diffit.training.step import Stepper
from diffit.utils.distributed import Processes
from diffit.weights import read_network_file, save_network, state_hash
from helpers import command, run_processes, start, wait, write_archive

ONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip", 90)


def run(pets, outdir, **options):
    archive = ImageArchive(pets, cond=True)
    config = resolve(
        "debug", {"data": str(pets), "cond": True, "batch_gpu": 4, "grid": (2, 2), **options}, DataFacts(3, (16, 16), 3)
    )
    return train(config, archive, outdir, ONE)


def curve(run_dir, name="metric-fd80_full-pixels.jsonl"):
    return [(record["images"], record["results"]) for record in read_records(run_dir / name)]


def test_a_run_leaves_records_a_report_and_its_best_weights(pets, tmp_path):
    outcome = run(pets, tmp_path, metrics=("fd80_full:pixels", "kd30:pixels"), metrics_ticks=2, kimg=0.16)
    records = read_records(outcome.run_dir / "metric-fd80_full-pixels.jsonl")
    assert [record["images"] for record in records] == [80, 160]
    assert records[0]["metric"] == "fd80_full:pixels"
    assert records[0]["labels"] == "drawn from the labels of the training set"
    assert records[0]["seeds"] == "0-79"
    assert records[0]["sampling"]["steps"] == 4
    best = min(records, key=lambda record: record["results"]["fd"])
    model = load(outcome.run_dir / "network-best-fd80_full-pixels.safetensors", device="cpu")
    # What stands in the record can be computed again from the file alone.
    suite = Suite(["fd80_full:pixels"], pets, (3, 16, 16), ONE)
    labels = ImageArchive(pets, cond=True).labels
    (again,) = evaluate_network(suite, model, real_labels=labels, batch=16)
    assert again["weights_sha256"] == best["weights_sha256"]
    assert_close(again["results"], best["results"], rtol=1e-5, atol=0)
    report = re.sub("(?s)<script>.*?</script>", "", (outcome.run_dir / "report.html").read_text())
    assert "fd80_full:pixels" in report
    assert report.count("data:image/png;base64") >= 3
    assert not re.search(r"(src|href)=\"(?!data:)", report)
    assert curve(outcome.run_dir, "metric-kd30-pixels.jsonl")[0][0] == 80


def test_stopped_and_resumed_the_records_are_those_of_a_run_through(pets, tmp_path):
    how = {"metrics": ("fd80_full:pixels",), "metrics_ticks": 1, "metrics_steps": 3}
    through = run(pets, tmp_path / "through", kimg=0.16, **how)
    run(pets, tmp_path / "parts", kimg=0.08, **how)
    parts = run(pets, tmp_path / "parts", kimg=0.16, **how)
    assert curve(parts.run_dir) == curve(through.run_dir)
    assert [images for images, _ in curve(parts.run_dir)] == [40, 80, 120, 160]


def test_metrics_that_would_take_more_than_their_share_are_left_out_but_for_the_last(pets, tmp_path, monkeypatch):
    """By a clock that a step moves by a second and a metric by ten: at a quarter of the time 30 seconds lie between."""
    now, step, evaluate = [time.monotonic()], Stepper.step, Evaluator.__call__
    for module in ("run", "stopwatch"):
        monkeypatch.setattr(f"diffit.training.{module}.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Stepper, "step", lambda *given: (now.__setitem__(0, now[0] + 1), step(*given))[1])
    monkeypatch.setattr(Evaluator, "__call__", lambda *given: (now.__setitem__(0, now[0] + 10), evaluate(*given))[1])
    how = {
        "metrics": ("fd80_full:pixels",),
        "metrics_steps": 3,
        "batch": 2,
        "batch_gpu": 2,
        "tick": 0.002,
        "metrics_budget": 0.25,
    }
    outcome = run(pets, tmp_path, kimg=0.08, **how)
    assert [images for images, _ in curve(outcome.run_dir)] == [2, 62, 80]
    now[0] += 1000  # till somebody goes on, which is no time of the run
    outcome = run(pets, tmp_path, kimg=0.15, **how)
    assert [images for images, _ in curve(outcome.run_dir)] == [2, 62, 80, 122, 150]


def test_a_metric_that_a_kill_cut_off_is_made_up_for(pets, tmp_path):
    how = {"metrics": ("fd80_full:pixels",), "metrics_ticks": 1, "metrics_steps": 3, "kimg": 0.08}
    first = run(pets, tmp_path, **how)
    path = first.run_dir / "metric-fd80_full-pixels.jsonl"
    expected, lines = curve(first.run_dir), path.read_text().splitlines(keepends=True)
    path.write_text(lines[0] + lines[1][:50])  # killed while writing the last record
    again = run(pets, tmp_path, **how)
    assert again.run_dir == first.run_dir
    assert curve(first.run_dir) == expected
    before = path.read_text()
    run(pets, tmp_path, **how)
    assert path.read_text() == before


def test_what_a_metric_lacks_is_said_before_the_run_begins(pets, tmp_path, monkeypatch):
    monkeypatch.setattr("diffit.metrics.inception.URL", "http://127.0.0.1:9/weights.pth")
    for metrics, message in (
        (("fid10k_full",), "weights of FID are not here"),
        (("fd50_full:pixels",), "50 images are too few"),
        (("fd90_full:elsewhere.pt",), r"elsewhere\.pt': no such file"),
        ((f"fd90_full:{pets}",), r"pets\.zip: would be loaded as TorchScript"),
        (("fd90_ful",), "unknown metric"),
    ):
        with pytest.raises(UserError, match=message):
            run(pets, tmp_path, metrics=metrics)
        assert not list(tmp_path.iterdir())


def test_labels_are_as_frequent_as_in_the_training_set_and_a_function_of_the_seed(pets):
    config = resolve("debug", {"cond": True}, DataFacts(3, (16, 16), 3))
    real = torch.tensor([0] * 10 + [1] * 30 + [2] * 60)
    labels, policy = training_labels(config, real, range(3000))
    assert np.abs(np.bincount(labels) / 3000 - [0.1, 0.3, 0.6]).max() < 0.03
    assert policy == "drawn from the labels of the training set"
    assert (training_labels(config, real, range(100, 200))[0] == labels[100:200]).all()
    assert np.bincount(training_labels(config, None, range(3000))[0]).min() > 900


@pytest.fixture(scope="module")
def network(pets, tmp_path_factory):
    return run(pets, tmp_path_factory.mktemp("run"), kimg=0.04).snapshot


def calc(capsys, *arguments):
    capsys.readouterr()
    cli(["metrics", "calc", *map(str, arguments)], standalone_mode=False)
    output = capsys.readouterr()
    return [json.loads(line) for line in output.out.splitlines()], output.err


def test_calc_prints_a_complete_record_a_metric(network, pets, capsys):
    records, text = calc(
        capsys, "--network", network, "--ref", pets, "--metrics", "fd100_full,kd20", "--metrics", "kd30_full",
        "--detector", "pixels", "--repeats", 2, "--steps", 2,
    )  # fmt: skip
    assert [record["metric"] for record in records] == ["fd100_full:pixels", "kd20:pixels", "kd30_full:pixels"]
    record = records[0]
    assert record["sampling"]["steps"] == 2
    assert record["repeats"]["seeds"] == ["0-99", "100-199"]
    summary = record["repeats"]["numbers"]["fd"]
    assert summary["minimum"] == min(summary["values"]) == record["results"]["fd"]
    assert record["reference"]["images"] == {"moments_pool": 90}
    assert {"network", "weights_sha256", "seeds", "labels", "precision", "detector", "versions", "processes",
            "seconds", "date", "notes"} <= record.keys()  # fmt: skip
    assert "100 samples, published figures have 50000" in text
    assert "min" in text
    assert "±" in text


def test_a_guide_is_in_the_record_and_moves_the_number(network, pets, tmp_path, capsys):
    state, config = read_network_file(network)
    guide = tmp_path / "guide.safetensors"
    save_network(guide, {name: (tensor * 1.1).bfloat16() for name, tensor in state.items()}, config)
    words = ["--network", network, "--ref", pets, "--metrics", "fd80_full:pixels", "--steps", 2]
    (plain,), _ = calc(capsys, *words)
    (guided,), _ = calc(capsys, *words, "--guide-network", guide, "--cfg-scale", 2)
    assert (guided["guide"], guided["guide_sha256"]) == (guide.name, state_hash(load_file(guide)))
    assert guided["weights_sha256"] == plain["weights_sha256"] != guided["guide_sha256"]
    assert guided["results"]["fd"] != plain["results"]["fd"]
    with pytest.raises(UserError, match="at guidance scale 1 it has no effect"):
        calc(capsys, *words, "--guide-network", guide)


def test_samples_from_disk_give_the_number_that_those_from_the_sampler_give(network, pets, tmp_path, capsys):
    cli(["sample", "--network", str(network), "--outdir", str(tmp_path), "--seeds", "0-79", "--format", "npz"],
        standalone_mode=False)  # fmt: skip
    (npz,) = tmp_path.glob("*.npz")
    # An npz as reference has no labels: both draw classes evenly.
    stats = tmp_path / "stats.npz"
    cli(["metrics", "ref", "--data", str(pets), "--dest", str(stats), "--detector", "pixels"], standalone_mode=False)
    how = ("--ref", stats, "--metrics", "fd80_full", "--detector", "pixels")
    direct, written = (calc(capsys, *what, *how)[0][0] for what in (("--network", network), ("--images", npz)))
    assert_close(direct["results"], written["results"], rtol=1e-5, atol=0)
    assert written["images"]["name"] == npz.name
    assert direct["reference"]["images"] == {"moments_pool": 90}


def test_samples_that_are_not_finite_are_an_error_and_not_a_number(network, pets):
    model = load(network, device="cpu")
    next(model.net.parameters()).fill_(float("nan"))
    suite = Suite(["fd80_full:pixels"], pets, (3, 16, 16), ONE)
    with pytest.raises(UserError, match="samples of seeds 0 to 15 are not finite"):
        evaluate_network(suite, model, batch=16)


def test_show_prints_what_calc_said_and_what_a_run_recorded(network, pets, tmp_path, capsys):
    records, _ = calc(capsys, "--images", pets, "--ref", pets, "--metrics", "fd90_full:pixels")
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cli(["metrics", "show", str(tmp_path / "records.jsonl")], standalone_mode=False)
    assert "fd90_full:pixels" in capsys.readouterr().out
    for path, message in (
        (tmp_path / "none", "no such run or file"),
        (network.parent, "no metrics in it"),
        (network, "not a text file; expected one JSON object on each line"),
    ):
        with pytest.raises(UserError, match=message):
            cli(["metrics", "show", str(path)], standalone_mode=False)


def test_show_sets_runs_next_to_each_other_with_the_settings_that_differ(network, pets, tmp_path, capsys):
    for steps in (2, 3):
        records, _ = calc(
            capsys, "--network", network, "--ref", pets, "--metrics", "fd80_full:pixels", "--steps", steps
        )
        (tmp_path / f"{steps}.jsonl").write_text(json.dumps(records[0]) + "\n")
    files = [str(tmp_path / f"{steps}.jsonl") for steps in (2, 3)]
    cli(["metrics", "show", *files, "--format", "csv"], standalone_mode=False)
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert header == ["run", "metric", "fd", "steps"]
    assert [row[0] for row in rows] == ["2.jsonl", "3.jsonl"]
    assert [row[3] for row in rows] == ["2", "3"]
    assert float(rows[1][2]) == records[0]["results"]["fd"]


@pytest.mark.parametrize("command", ["calc", "copies"])
def test_sampling_options_with_images_are_refused(pets, tmp_path, command):
    how = {"calc": ["--ref", pets, "--metrics", "fd90_full:pixels", "--steps", 4, "--cfg-scale", 2],
           "copies": ["--data", pets, "--dest", tmp_path / "copies.html"]}[command]  # fmt: skip
    said = "--steps, --cfg-scale, --vae with --images" if command == "calc" else "--vae with --images"
    with pytest.raises(UserError, match=f"{said}: they exist already"):
        cli(["metrics", command, "--images", str(pets), "--vae", "x", *map(str, how)], standalone_mode=False)


def test_what_gives_no_number_is_refused(pets, tmp_path):
    one = write_archive(tmp_path / "one.zip", 1)
    for words, message in (
        (["calc", "--images", pets, "--ref", pets, "--metrics", ","], "no metric is named"),
        (["ref", "--data", one, "--dest", tmp_path / "one.npz", "--detector", "pixels"], "1 image has no covariance"),
    ):
        with pytest.raises(UserError, match=message):
            cli(["metrics", *map(str, words)], standalone_mode=False)
    assert not (tmp_path / "one.npz").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "8"], "--gpus: start it under torchrun --nproc_per_node=N"),
        (["--num=5000"], "--num: the number is in the metric's name: --metrics fid50k_full"),
        (["--net", "a", "--data", "none.zip", "--images", "b"], "pass either --network or --images"),
    ],
)
def test_the_options_of_edm_and_stylegan_are_understood_or_answered(words, message):
    with pytest.raises(UserError, match=message):
        cli(["metrics", "calc", "--metrics", "fid5k", *words], standalone_mode=False)


def test_near_copies_are_found_and_shown(network, pets, tmp_path, capsys):
    how = ["--data", str(pets), "--detector", "pixels", "--dest", str(tmp_path / "copies.html")]
    cli(["metrics", "copies", "--images", str(pets), "--count", "40", *how], standalone_mode=False)
    said = capsys.readouterr()
    facts = json.loads(said.out.splitlines()[-1])
    assert facts["near_copies"] == 1  # the training images themselves
    assert "likeness" not in said.err
    cli(["metrics", "copies", "--network", str(network), "--count", "20", *how], standalone_mode=False)
    said = capsys.readouterr()
    facts = json.loads(said.out.splitlines()[-1])
    assert facts["near_copies"] == 0  # noise
    assert facts["farther_than_real"] == 1
    assert "Nor of likeness: 100% are farther from every training image than 99% of real images" in said.err
    page = re.sub("(?s)<script>.*?</script>", "", (tmp_path / "copies.html").read_text())
    assert page.count("data:image/png") == 20 * 4


def test_exact_copies_are_found_where_the_training_images_have_duplicates(pets, tmp_path, capsys):
    """The closest 1 % of real images are then at distance 0, and nothing is closer."""
    images = ImageArchive(pets).load_all().movedim(1, 3).numpy()
    np.savez(tmp_path / "twice.npz", arr_0=np.concatenate([images, images[:5]]))
    where = ["--data", str(tmp_path / "twice.npz"), "--detector", "pixels", "--dest", str(tmp_path / "copies.html")]
    cli(["metrics", "copies", "--images", str(tmp_path / "twice.npz"), "--count", "95", *where], standalone_mode=False)
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert facts["near_copies"] == 1
    assert facts["near_copies_among_real"] == pytest.approx(10 / 95)


TOGETHER = """
from diffit.errors import UserError
from diffit.utils.distributed import processes

with processes() as procs:
    for error in (UserError("a bad image"), ValueError("a bug")):
        try:
            with procs.together():
                if procs.rank == 1:
                    raise error
        except Exception as caught:
            print(f"<{procs.rank} {type(caught).__name__}: {caught}>")
"""


@pytest.mark.slow
def test_an_error_on_one_process_is_raised_on_all_with_its_message(tmp_path):
    said = re.findall("<(.*?)>", run_processes(TOGETHER, tmp_path))
    assert sorted(said) == [
        "0 UserError: process 1 of 2: ValueError('a bug')",
        "0 UserError: process 1 of 2: a bad image",
        "1 UserError: a bad image",
        "1 ValueError: a bug",
    ]


@pytest.mark.slow
def test_two_processes_train_and_judge_as_one_does(pets, tmp_path):
    words = ("--preset", "debug", "--cond", "--batch-gpu", 2, "--grid", "2x2", "--data", pets, "--kimg", 0.04,
             "--metrics", "fd80_full:pixels,kd30:pixels")  # fmt: skip
    curves = []
    for processes in (1, 2):
        command("train", "--outdir", tmp_path / str(processes), *words, processes=processes)
        (run_dir,) = (tmp_path / str(processes)).iterdir()
        assert read_records(run_dir / "metric-fd80_full-pixels.jsonl")[0]["processes"] == processes
        curves.append(curve(run_dir))
    assert_close(curves[1], curves[0], rtol=1e-4, atol=0)


@pytest.mark.slow
def test_killed_in_the_middle_a_run_of_digits_goes_on_with_one_curve(tmp_path):
    """SIGKILL leaves no time to save anything."""
    data = write_archive(tmp_path / "digits.zip", 300, side=8, channels=1)
    words = ["train", "--preset", "digits", "--data", data, "--outdir", tmp_path / "runs", "--kimg", "3", "--tick", "1",
             "--metrics=fd100_full:pixels", "--metrics-ticks=1", "--metrics-steps=6",
             "--grid", "1x1", "--snap", "0"]  # fmt: skip
    (process,) = start("diffit", *words, output=tmp_path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = list(tmp_path.glob("runs/*/metric-fd100_full-pixels.jsonl"))
        if found and found[0].read_text():
            break
        time.sleep(0.05)
    process.kill()
    assert wait([process]) == -signal.SIGKILL
    command(*words)
    (run_dir,) = (tmp_path / "runs").iterdir()
    points = curve(run_dir, "metric-fd100_full-pixels.jsonl")
    images = [images for images, _ in points]
    assert images == sorted(set(images))
    assert [i // 1000 for i in images] == [1, 2, 3]
    assert points[-1][1]["fd"] < points[0][1]["fd"]
