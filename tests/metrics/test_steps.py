"""A metric against evaluations: what is planned, what is counted, what is not computed twice, and what is shown."""

import json
import sys

import pytest
import torch
from PIL import Image

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.configs.sampling import FittedLevels
from diffit.configs.schema import ADMDiffusion
from diffit.errors import UserError
from diffit.metrics import steps as module
from diffit.metrics.record import read_records
from diffit.metrics.steps import cheapest, plan, tabulate
from diffit.sampling import load
from diffit.sampling.cost import count_evaluations
from diffit.sampling.model import Model
from diffit.sampling.tune import with_fitted
from diffit.training.step import build_network
from diffit.weights.file import read_header, read_network_file, save_network
from helpers import write_archive


def settings(models):
    pairs = [(model.config.sampling, sum(count_evaluations(model.config))) for model in models]
    return [(sampling.sampler, sampling.steps, cost, sampling.cfg_scale) for sampling, cost in pairs]


def test_a_budget_is_met_by_the_largest_number_of_steps_within():
    model = Model(None, get_preset("cifar10"))
    assert settings(plan(model, [1, 2, 4, 35], ["heun", "unipc"])) == [
        ("heun", 1, 1, 1), ("heun", 2, 3, 1), ("heun", 18, 35, 1),
        ("unipc", 1, 1, 1), ("unipc", 2, 2, 1), ("unipc", 4, 4, 1), ("unipc", 35, 35, 1),
    ]  # fmt: skip
    assert {name for name, *_ in settings(plan(model, [2]))} == {
        "heun", "euler", "dpm++", "dpm++3m", "unipc2", "unipc", "dpm++2m-sde"
    }  # fmt: skip


def test_guidance_makes_two_evaluations_a_step_and_a_schedule_ends():
    model = Model(None, resolve("debug", {"cond": True}, DataFacts(3, (16, 16), 3)))
    assert settings(plan(model, [5], ["unipc", "heun"], [1.0, 2.0])) == [
        ("unipc", 5, 5, 1), ("heun", 3, 5, 1), ("unipc", 2, 4, 2), ("heun", 1, 2, 2),
    ]  # fmt: skip
    with pytest.raises(UserError, match="--evaluations 1: a guided step has two; allow 2 or more"):
        plan(model, [1], ["unipc"], [2.0])
    config = get_preset("latent-debug")
    latent = Model(None, config.model_copy(update={"diffusion": ADMDiffusion(timesteps=6)}))
    assert settings(plan(latent, [5, 20], ["ddim"])) == [("ddim", 5, 5, 1), ("ddim", 6, 6, 1)]
    assert {"ddim", "ddpm"} < {name for name, *_ in settings(plan(latent, [2]))}


def record(value, evaluations, seconds=1.0, name="fd", **sampling):
    how = {"sampler": "unipc", "steps": evaluations, "cfg_scale": 1.0} | sampling
    return {"metric": f"{name}1k", "results": {name: value}, "evaluations": evaluations, "network": "a.safetensors",
            "seconds_per_image": seconds, "sampling": how}  # fmt: skip


def test_the_cheapest_within_five_percent_is_marked():
    records = [record(30.0, 2), record(10.4, 8, 2.0), record(10.3, 8, 1.0, sampler="heun"), record(10.0, 35)]
    assert cheapest(records) is records[2]
    assert cheapest([record(0.952, 4, name="is"), record(1.0, 8, name="is")])["evaluations"] == 4
    assert cheapest([record(0.948, 4, name="is"), record(1.0, 8, name="is")])["evaluations"] == 8
    header, rows = tabulate(records)
    assert header[:5] == ["sampler", "steps", "evaluations", "fd", "s/image"]
    assert [bool(row[5]) for row in rows] == [False, False, True, False]
    assert rows[2][:5] == ["heun", "8", "8", "10.3", "1"]


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip", 90, side=8, channels=1)


@pytest.fixture(scope="module")
def network(pets, tmp_path_factory):
    config = resolve("debug", {"data": str(pets), "cond": True}, DataFacts(1, (8, 8), 3))
    path = tmp_path_factory.mktemp("n") / "net.safetensors"
    save_network(path, build_network(config).state_dict(), config, kimg=1)
    return path


def run(pets, network, dest, *words):
    how = ["--ref", pets, "--metric", "fd70_full:pixels", "--samplers", "heun,unipc", "--dest", dest]
    cli(["metrics", "steps", "--network", str(network), *map(str, how), *words], standalone_mode=False)


def test_it_prints_a_table_and_writes_records_and_a_plot_and_goes_on_where_it_was(
    network, pets, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("matplotlib")
    dest = tmp_path / "steps.jsonl"
    computed, evaluate = [], module.evaluate_network

    def counted(suite, model, **how):
        rows = []
        hook = model.net.register_forward_hook(lambda net, inputs, output: rows.append(len(output)))
        (result,) = evaluate(suite, model, **how)
        hook.remove()
        computed.append(sum(rows) / result["samples"])
        return [result]

    monkeypatch.setattr(module, "evaluate_network", counted)
    run(pets, network, dest, "--evaluations", "1,2")
    assert computed == [1, 1, 2]
    run(pets, network, dest, "--evaluations", "1,2,3", "--format", "md")
    assert computed == [1, 1, 2, 3, 3]  # heun in 2 steps, unipc in 3
    table = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][-5:]
    records = read_records(dest)
    assert [r["evaluations"] for r in records] == computed
    assert all(r["seconds_per_image"] > 0 for r in records)
    assert [row[2].strip() for row in table] == ["1", "3", "1", "2", "3"]
    assert sum("cheapest within 5%" in row[-1] for row in table) == 1
    assert Image.open(tmp_path / "steps.png").size == (1200, 750)
    # Other weights, seeds or guidance are other settings.
    run(pets, network, dest, "--evaluations", "1", "--seed", "5")
    assert computed[5:] == [1, 1]
    run(pets, network, dest, "--evaluations", "3", "--cfg-scale", "2")
    assert computed[7:] == [2, 2]
    # Fitted levels change the settings that use them, and no others.
    config, kimg = read_header(network)
    tuned = with_fitted(config, [FittedLevels(sampler="unipc", sigmas=(9.0, 1.0))])
    save_network(tmp_path / "net.safetensors", read_network_file(network)[0], tuned, kimg=kimg)
    run(pets, tmp_path / "net.safetensors", dest, "--evaluations", "1,2,3")
    assert computed[9:] == [2]
    cli(["metrics", "show", str(dest)], standalone_mode=False)
    assert "seconds_per_image" not in capsys.readouterr().out


def test_what_a_kill_cut_off_is_computed_again(network, pets, tmp_path):
    dest = tmp_path / "steps.jsonl"
    run(pets, network, dest, "--evaluations", "1")
    lines = dest.read_text().splitlines(keepends=True)
    dest.write_text(lines[0] + lines[1][:60])
    run(pets, network, dest, "--evaluations", "1")
    again = [json.loads(line) for line in dest.read_text().splitlines()]
    assert [r["results"] for r in again] == [json.loads(line)["results"] for line in lines]


def test_without_matplotlib_there_is_a_table_and_a_hint(network, pets, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(pets, network, tmp_path / "steps.jsonl", "--evaluations", "1")
    output = capsys.readouterr()
    assert "unipc" in output.out
    assert "a plot needs matplotlib: pip install 'diffit-torch[plot]'" in output.err
    assert not (tmp_path / "steps.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--evaluations", "0,2"], "--evaluations 0: a sample needs 1 or more"),
        (["--samplers", "ddim"], "sampler ddim needs a discrete schedule"),
        (["--cfg-scale", "0.5,-1"], "cfg_scale: -1.0 should be greater than or equal to 0"),
    ],
)
def test_mistakes_are_named_before_anything_is_written(network, pets, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(pets, network, tmp_path / "steps.jsonl", *words)
    with pytest.raises(UserError, match=r"records go into a file NAME\.jsonl"):
        run(pets, network, tmp_path / "steps.csv")
    assert not list(tmp_path.glob("*.jsonl"))


def test_networks_of_several_sizes_are_not_compared(network, pets, tmp_path):
    config = get_preset("debug")
    save_network(tmp_path / "other.safetensors", build_network(config).state_dict(), config)
    with pytest.raises(UserError, match="images of 2 sizes; compare networks of one"):
        run(pets, network, tmp_path / "a.jsonl", "--network", str(tmp_path / "other.safetensors"))


def test_a_student_is_sampled_as_its_file_says(network, monkeypatch):
    model = load(network, device="cpu")
    monkeypatch.setattr(module, "is_student", lambda config: True)
    assert plan(model, [1, 35], ["unipc"], [3.0]) == [model]
    assert torch.equal(model.sample([0]), plan(model, [8])[0].sample([0]))
