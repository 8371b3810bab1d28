"""Students of small teachers, from the command to the file that is sampled without a flag."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file
from torch.testing import assert_close

from diffit.cli import cli
from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.data.encode import encode_archive
from diffit.data.open import facts_of, open_data
from diffit.diffusion.edm import edm_sigmas
from diffit.errors import UserError
from diffit.models import build
from diffit.models.autoencoder import load_autoencoder
from diffit.sampling import load
from diffit.training import loop, run
from diffit.training.checkpoint import states
from diffit.training.distill import Order, Teacher, check_steps, distill
from diffit.training.step import learning_rate
from diffit.utils.distributed import Processes
from diffit.weights import newest_snapshot, read_header, read_network_file, save_network
from diffit.weights.file import state_hash
from helpers import command, write_archive, write_vae

ONE = Processes(0, 1, torch.device("cpu"))
SHORT = {"kimg": 0.048, "batch_gpu": 4, "grid": (2, 2), "metrics": ()}


def write_network(path, *, seed=0, **options):
    """Random weights, the last layer's too, so that its images are not all alike."""
    config = resolve("debug", {"cond": True, **options}, DataFacts(3, (16, 16), 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = build(config.model)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
    save_network(path, net.state_dict(), config)
    return path


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_archive(tmp_path_factory.mktemp("data") / "pets.zip", 24)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_network(tmp_path_factory.mktemp("teacher") / "teacher.safetensors")


def make(teacher, pets, outdir, method="progressive", steps=(2, 1), **options):
    archive = ImageArchive(pets, cond=True)
    order = Order(teacher, method, steps, {"data": str(pets), **SHORT, **options})
    return distill(order, archive, outdir, ONE)


@pytest.fixture(scope="module")
def students(teacher, pets, tmp_path_factory):
    outdir = tmp_path_factory.mktemp("progressive")
    return outdir, *make(teacher, pets, outdir, cfg_scale=1.5)


def test_progressive_distillation_makes_a_file_a_stage_from_the_student_before(students, teacher):
    outdir, outcome, files = students
    assert [file.name for file in files] == ["student-2.safetensors", "student-1.safetensors"]
    runs = sorted(path for path in outdir.iterdir() if path.is_dir())
    assert [run.name.rpartition("-progressive-")[2] for run in runs] == ["2", "1"]
    assert outcome.run_dir == runs[1]
    weights = [teacher, newest_snapshot(runs[0])]
    for file, source, steps in zip(files, weights, (2, 1), strict=True):
        config, kimg = read_header(file)
        assert kimg == 0.024  # the length is that of both runs
        spec, sampling = config.distillation, config.sampling
        assert (sampling.sampler, sampling.steps, sampling.spacing, sampling.cfg_scale) == (
            "euler",
            steps,
            "trailing",
            1,
        )
        assert (spec.method, spec.teacher, spec.cfg_scale) == ("progressive", source.name, 1.5)
        assert spec.teacher_sha256 == state_hash(load_file(source))
        assert (spec.teacher_sampling.steps, spec.teacher_sampling.sampler) == (
            2 * steps,
            "heun" if steps == 2 else "euler",
        )
        assert spec.teacher_sampling.cfg_scale == (1.5 if steps == 2 else 1)


def test_a_student_is_sampled_by_the_steps_it_was_taught_and_refuses_others(students):
    _, _, files = students
    model, levels = load(files[0], device="cpu"), []
    model.sample([0, 1], [0, 1], callback=lambda i, sigma, x, denoised: levels.append(float(sigma)))
    assert levels == edm_sigmas(2, trailing=True)[:-1].tolist()
    assert torch.equal(model.sample([5], [1]), model.sample([5], [1], steps=2, sampler="euler"))
    for settings in ({"steps": 4}, {"sampler": "heun"}, {"levels": "lambda"}, {"rho": 3.0}, {"sigma_max": 40.0}):
        with pytest.raises(UserError, match="a student that was taught 2 steps of euler: leave sampler, steps and"):
            model.with_sampling(**settings)
    with pytest.raises(UserError, match="needs the null class"):
        model.with_sampling(cfg_scale=2.0)


def test_the_first_student_begins_as_its_teacher_and_learns(students, teacher):
    outdir, _, files = students
    before, after = load_file(teacher), load_file(files[0])
    assert before.keys() - after.keys() == {"augment_embedder.weight"}  # students are trained without augmentation
    moved = [name for name in after if not torch.equal(before[name], after[name])]
    assert "head.weight" in moved
    assert all((after[name] - before[name]).abs().max() < 0.02 for name in moved)
    first = sorted(path for path in outdir.iterdir() if path.is_dir())[0]
    log = (first / "log.txt").read_text()
    assert "student   progressive, 2 steps of euler, from teacher.safetensors" in log
    assert "guided at 1.5" in log


def test_the_same_command_again_does_nothing(students, teacher, pets):
    outdir, _, files = students
    before = [file.read_bytes() for file in files]
    outcome, again = make(teacher, pets, outdir, cfg_scale=1.5)
    assert outcome.snapshot is None
    assert [file.read_bytes() for file in again] == before
    assert len([path for path in outdir.iterdir() if path.is_dir()]) == 2


def test_consistency_tuning_makes_files_for_one_and_two_evaluations(teacher, pets, tmp_path):
    outcome, files = make(
        teacher, pets, tmp_path, "consistency", metrics=("kd24_full:pixels",), metrics_ticks=1, batch=8
    )
    assert [file.name for file in files] == ["student-2.safetensors", "student-1.safetensors"]
    records = [
        json.loads(line) for line in (outcome.run_dir / "metric-kd24_full-pixels.jsonl").read_text().splitlines()
    ]
    best = min(records, key=lambda record: record["results"]["kd"])
    for file, steps in zip(files, (2, 1), strict=True):
        config, kimg = read_header(file)
        assert (config.sampling.sampler, config.sampling.steps) == ("consistency", steps)
        assert (config.distillation.method, config.distillation.cfg_scale) == ("consistency", 1)
        assert kimg == best["kimg"]  # the guard: the best by validation, not the last
    model, levels = load(files[0], device="cpu"), []
    model.sample([0], [0], callback=lambda i, sigma, x, denoised: levels.append(float(sigma)))
    assert levels == [80, model.config.sampling.sigma_mid]
    assert torch.equal(model.sample([3], [0], steps=1), load(files[1], device="cpu").sample([3], [0]))
    with pytest.raises(UserError, match="has its own; leave it out"):
        model.with_sampling(sampler="heun", steps=8)
    training = json.loads((outcome.run_dir / "training_options.json").read_text())["training"]
    assert (training["optimizer"], training["lr_decay"]) == ("radam", 0.5)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_stopped_and_resumed_equals_run_through_to_the_last_bit(teacher, pets, tmp_path, monkeypatch, method):
    whole, _ = make(teacher, pets, tmp_path / "whole", method, (1,))
    honest = loop.feed

    def breaking(*given, **named):
        images = honest(*given, **named)
        for _ in range(7):  # two microbatches a step: in the middle of the fourth
            yield next(images)
        raise UserError("ant.png is damaged")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "feed", breaking)
        with pytest.raises(UserError, match=r"everything up to 0.024 kimg is saved"):
            make(teacher, pets, tmp_path / "parts", method, (1,))
    parts, _ = make(teacher, pets, tmp_path / "parts", method, (1,))
    for kind in ("model", "ema", "optimizer"):
        expected, found = (load_file(states(outcome.run_dir)[-1] / f"{kind}.safetensors") for outcome in (whole, parts))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_two_processes_learn_what_one_learns(teacher, pets, tmp_path, method):
    words = ["--network", teacher, "--data", pets, "--method", method, "--steps", 1, "--batch-gpu", 4, "--kimg", 0.048,
             "--grid", "1x1", "--metrics", "none"]  # fmt: skip
    found = []
    for processes in (1, 2):
        command("distill", *words, "--outdir", tmp_path / str(processes), processes=processes)
        found.append(load_file(tmp_path / str(processes) / "student-1.safetensors"))
    for name, tensor in found[0].items():
        assert_close(tensor, found[1][name], rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_together_is_one_line_before_any_work(teacher, students, pets, tmp_path):
    _, _, files = students
    images = DataFacts(3, (16, 16), 3)

    def refused(match, source, method="progressive", steps=4, facts=images, **options):
        with pytest.raises(UserError, match=match) as error:
            Teacher.read(source).student(method, steps, options, facts)
        assert "\n" not in str(error.value)

    refused(
        "a model of 16×16×3, the data are 32×32×3; give data of the teacher's size",
        teacher,
        facts=DataFacts(3, (32, 32), 3),
    )
    refused("a model of 16×16×3, the data are 16×16×1", teacher, facts=DataFacts(1, (16, 16), 3))
    refused("3 classes, the data have 5; give data labelled as the teacher's", teacher, facts=DataFacts(3, (16, 16), 5))
    refused("is itself a student of 2 steps; begin with half as many", files[0])
    refused("itself a student", files[0], "consistency", 1)
    refused("consistency tuning knows no guidance", teacher, "consistency", 1, cfg_scale=2.0)
    refused("the data are latents, .* is an image-space model", teacher, facts=DataFacts(
        3, (16, 16), 3, latent_scale=0.2, latent_shape=(4, 2, 2)
    ))  # fmt: skip
    discrete = write_network(tmp_path / "cosine.safetensors", diffusion="cosine")
    refused("consistency tuning is for EDM's noise levels", discrete, "consistency", 1)
    refused("the teacher has 1000 timesteps; use at most half as many", discrete, steps=501)
    for steps in ((8, 3), (4, 4), (), (0,)):
        with pytest.raises(UserError, match="half as many steps as the one before"):
            check_steps("progressive", steps)
    for steps in ((4, 2), (1, 1), ()):
        with pytest.raises(UserError, match="takes 2 or 1; use 2,1"):
            check_steps("consistency", steps)


def test_a_student_of_consistency_tuning_teaches_nobody(teacher, pets, tmp_path):
    _, files = make(teacher, pets, tmp_path, "consistency", (1,), kimg=0.008)
    with pytest.raises(UserError, match="no trajectory to halve; give its own teacher"):
        Teacher.read(files[0]).student("progressive", 1, {}, DataFacts(3, (16, 16), 3))


def test_a_teacher_that_became_another_is_refused_and_one_that_moved_is_not(teacher, pets, tmp_path):
    source = tmp_path / "mine.safetensors"
    source.write_bytes(teacher.read_bytes())
    first, _ = make(source, pets, tmp_path / "runs", steps=(1,), kimg=0.016)
    moved = source.rename(tmp_path / "moved.safetensors")
    again, _ = make(moved, pets, tmp_path / "runs", steps=(1,), kimg=0.016)
    assert (again.run_dir, again.snapshot) == (first.run_dir, None)
    write_network(source, seed=1)
    with pytest.raises(UserError, match=r"mine.safetensors: other weights than .* for its teacher .*--resume none"):
        make(source, pets, tmp_path / "runs", steps=(1,), kimg=0.032)


@pytest.mark.parametrize("length", [{"kimg": 0.048}, {"minutes": 6.0}])
def test_stages_that_follow_one_which_went_on_are_as_long(length, teacher):
    """As where the command of a stopped distillation is given again without the length."""
    facts, settled = DataFacts(3, (16, 16), 3), {"cond": True, "grid": (2, 2)}
    begun, again = (
        Order(teacher, "progressive", (4, 2, 1), settled | said) for said in (length, {"default_minutes": 10.0})
    )
    first = begun.config(Teacher.read(teacher), 4, facts)
    assert again.config(Teacher.read(teacher), 4, facts).training.minutes == 10.0 / 3
    for order in (begun, again):
        later = order.next_stage(teacher, first).config(Teacher.read(teacher), 2, facts).training
        assert (later.minutes, later.clock_minutes) == (first.training.minutes, first.training.clock_minutes)
        assert later.minutes is not None or later.kimg == first.training.kimg


def test_a_request_to_stop_in_the_last_grid_of_a_stage_begins_no_other(teacher, pets, tmp_path, monkeypatch):
    honest = run.save_fakes

    def asked(stepper, net, path):
        honest(stepper, net, path)
        if path.name == "fakes000000.016.png":
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_fakes", asked)
        outcome, files = make(teacher, pets, tmp_path, kimg=0.032)
    assert (outcome.complete, outcome.signal, files) == (True, signal.SIGINT, [])
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 1
    outcome, files = make(teacher, pets, tmp_path, kimg=0.032)
    assert (outcome.signal, len(files)) == (None, 2)


def test_a_teacher_of_half_the_bytes_is_known_again(teacher, pets, tmp_path):
    state, config = read_network_file(teacher)
    source = tmp_path / "bf16.safetensors"
    save_network(source, {name: tensor.bfloat16() for name, tensor in state.items()}, config)
    _, (file,) = make(source, pets, tmp_path / "runs", steps=(1,), kimg=0.016)
    assert read_header(file)[0].distillation.teacher_sha256 == state_hash(load_file(source))


def test_a_discrete_schedule_is_halved_and_its_student_sampled_by_ddim(pets, tmp_path):
    source = write_network(tmp_path / "cosine.safetensors", diffusion="cosine")
    _, (file,) = make(source, pets, tmp_path / "runs", steps=(2,), kimg=0.016)
    model, timesteps = load(file, device="cpu"), []
    model.sample([0], [0], callback=lambda i, t, x, denoised: timesteps.append(int(t)))
    # The last t of the cosine schedule with tan(π/2·((t + 1)/1000 + 0.008)/1.008) up to 80, and the one half way.
    highest = int(1000 * (math.atan(80) / (math.pi / 2) * 1.008 - 0.008))
    assert timesteps == [highest - 1, highest // 2 - 1]
    assert (load(source, device="cpu").config.diffusion.prediction, model.config.diffusion.prediction) == (
        "epsilon",
        "v",
    )


@pytest.mark.slow
def test_the_student_of_a_latent_model_is_nearer_to_its_trajectories_than_its_own_two_steps(tmp_path):
    """Latents of a small VAE whose posterior is narrow, scaled to a deviation of one."""
    folder, pets = write_vae(tmp_path / "vae"), write_archive(tmp_path / "pets.zip", 96, side=32)
    vae = AutoencoderKL.from_pretrained(folder)
    with torch.no_grad():
        vae.quant_conv.weight[4:] *= 0.1
        vae.quant_conv.bias[4:] = -8
        images = ImageArchive(pets).load_all().float() / 127.5 - 1
        deviation = float(vae.encode(images).latent_dist.mean.std())
    vae.save_pretrained(folder)
    autoencoder, latents = load_autoencoder(folder, scale=1 / deviation), tmp_path / "latents"
    encode_archive(pets, latents, autoencoder, shard_size=100)
    data = open_data(latents, True, None)
    options = {"data": str(latents), "vae": str(folder), "batch": 16, "grid": (2, 2), "lr": 2e-3, "lr_rampup_kimg": 0.1}
    options |= {"ema_halflife_kimg": 0.2, "cond": True, "label_drop": 0.0, "metrics": ()}
    config = resolve("latent-debug", {**options, "prediction": "v", "kimg": 8.0}, facts_of(data))
    teacher = newest_snapshot(loop.train(config, data, tmp_path / "runs", ONE, autoencoder=autoencoder).run_dir)
    order = Order(teacher, "progressive", (2,), {**options, "lr": 1e-3, "kimg": 4.0})
    _, (student,) = distill(order, data, tmp_path / "students", ONE, autoencoder=autoencoder)

    def sampled(network, **settings):
        model = replace(load(network, device="cpu", vae=folder), autoencoder=None)
        return model.sample(range(48), torch.arange(48) % 3, **settings)

    how = {"sampler": "ddim", "spacing": "trailing"}
    fine = sampled(teacher, steps=16, **how)
    own, taught = ((x - fine).square().mean() for x in (sampled(teacher, steps=2, **how), sampled(student)))
    assert taught < 0.7 * own


def test_students_take_rate_and_mirroring_from_their_teacher_whatever_its_preset_has(tmp_path):
    path, facts = write_network(tmp_path / "teacher.safetensors", lr=4e-3, mirror=True), DataFacts(3, (16, 16), 3)
    student = Teacher.read(str(path)).student("progressive", 2, SHORT, facts)
    assert (student.training.lr, student.training.mirror) == (2e-3, True)
    assert not Teacher.read(str(path)).student("progressive", 2, SHORT | {"mirror": False}, facts).training.mirror
    save_network(tmp_path / "student.safetensors", build(student.model).state_dict(), student)
    second = Teacher.read(str(tmp_path / "student.safetensors"))
    assert second.student("progressive", 1, SHORT, facts).training.lr == 2e-3


def test_the_learning_rate_falls_to_nothing_over_the_last_share_of_the_run():
    training = get_preset("debug").training.model_copy(update={"lr_decay": 0.5, "lr": 1.0, "kimg": 0.08, "batch": 8})
    rates = [learning_rate(training, seen, 80) for seen in range(8, 88, 8)]
    assert_close(rates, [0.2, 0.4, 0.6, 0.8, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])  # ramps up over 0.04 kimg
    cut_short = [learning_rate(training, seen, 48) for seen in range(32, 72, 8)]
    assert_close(cut_short, [0.8, 2 / 3, 1 / 3, 1 / 3, 1 / 3])  # and never to nothing before the run is over


def test_the_command_line_makes_a_student_and_sample_needs_no_flag(teacher, pets, tmp_path, capsys):
    words = ["--network", teacher, "--data", pets, "--outdir", tmp_path / "runs", "--method", "progressive",
             "--steps", 1, "--kimg", 0.008, "--grid", "2x2", "--metrics", "none"]  # fmt: skip
    cli(["distill", *map(str, words)], standalone_mode=False)
    said = capsys.readouterr().out
    assert "student-1.safetensors: progressive, 1 step of euler, from teacher.safetensors" in said
    student = tmp_path / "runs" / "student-1.safetensors"
    cli(
        ["sample", "--network", str(student), "--outdir", str(tmp_path / "images"), "--seeds", "0-3"],
        standalone_mode=False,
    )
    assert len(list((tmp_path / "images").glob("*.png"))) == 4
    assert "euler, 1 steps" in capsys.readouterr().out
    cli(["info", str(student)], standalone_mode=False)
    assert "student     progressive, 1 step of euler" in capsys.readouterr().out


def test_the_pipeline_loads_a_student(students):
    pytest.importorskip("diffusers")
    from diffit.pipeline import DiffiTPipeline

    _, _, files = students
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = DiffiTPipeline.from_network(files[0])([0, 1], latents=noise, output_type="latent").images
    assert_close(found, load(files[0], device="cpu").sample(labels=[0, 1], noise=noise))


@pytest.mark.parametrize(("method", "optimizer"), [("progressive", "adam"), ("consistency", "radam")])
def test_a_student_of_what_learned_by_muon_learns_as_students_were_measured(method, optimizer):
    teacher = Teacher("net.safetensors", resolve("small16", {}), "0" * 64)
    training = teacher.student(method, 1, {}, DataFacts(3, (16, 16), images=500)).training
    assert (training.optimizer, training.conv_lr, training.lr, training.weighting) == (optimizer, 0.25, 1e-3, None)
    other = Teacher("net.safetensors", resolve("small16", {"lr": 1e-4}), "0" * 64)
    assert other.student(method, 1, {}, DataFacts(3, (16, 16), images=500)).training.lr == 5e-5
