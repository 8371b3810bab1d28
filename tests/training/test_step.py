"""The step as such; whole runs are in tests/e2e."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffit.configs.resolve import DataFacts, resolve
from diffit.data.archive import ImageArchive
from diffit.models.autoencoder import load_autoencoder
from diffit.training.batches import feed, microbatches
from diffit.training.checkpoint import optimizer_tensors
from diffit.training.guard import ENOUGH
from diffit.training.step import Stepper, build_network, clean_samples, drop_labels
from diffit.utils.distributed import Processes, alone
from helpers import write_archive, write_vae

CPU = torch.device("cpu")
ONE = Processes(0, 1, CPU)


def make(tmp_path, precision="fp32", **options):
    archive = ImageArchive(write_archive(tmp_path / "a.zip"), cond=True)
    config = resolve("debug", {"cond": True, **options}, DataFacts(3, (16, 16), 3))
    stepper = Stepper(config, ONE, build_network(config), precision)
    order = microbatches(len(archive), 0, 0, config.training.batch, stepper.batch_gpu, 0, 1)
    return stepper, feed(archive, order, CPU, resident=archive.load_all(), workers=0)


def weights(stepper):
    return {name: tensor.clone() for name, tensor in stepper.net.state_dict().items()}


def test_building_a_network_leaves_gpus_and_ambient_randomness_alone(monkeypatch):
    def touched(*_):
        raise AssertionError("a GPU was touched")

    for name in ("device_count", "manual_seed_all", "get_rng_state"):
        monkeypatch.setattr(torch.cuda, name, touched)
    before = torch.get_rng_state()
    build_network(resolve("debug", {}))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_dropped_label_is_the_null_class(tmp_path, probability):
    stepper, images = make(tmp_path, label_drop=probability)
    pictures, labels = next(images)
    seen = []
    stepper.net.y_embedder.register_forward_hook(lambda module, inputs, output: seen.extend(inputs[0].tolist()))
    stepper.microbatch_loss(pictures, labels, 0)
    assert seen == ([3] * len(labels) if probability else labels.tolist())


def test_mirror_flips_about_half_of_the_images_and_touches_no_other():
    images = torch.randint(256, (400, 1, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(0)
    images, out = (
        clean_samples(images, generator, mirror=mirror, autoencoder=None, scale=None) for mirror in (False, True)
    )
    flipped = [i for i in range(400) if (out[i].numpy() == np.fliplr(images[i, 0].numpy())).all()]
    assert 160 < len(flipped) < 240
    kept = [i for i in range(400) if i not in flipped]
    assert torch.equal(out[kept], images[kept])


def test_mirror_reaches_the_step(tmp_path):
    losses = []
    for mirror in (False, True):
        stepper, images = make(tmp_path, mirror=mirror, augment=0.0)
        losses.append(stepper.microbatch_loss(*next(images), 0))
    assert not torch.equal(*losses)


def test_accumulated_microbatches_give_the_mean_gradient_of_all(tmp_path):
    stepper, images = make(tmp_path, batch_gpu=2, augment=0.0, dropout=0.0)
    seen = []
    stepper.optimizer.step = lambda *a, **k: seen.extend(p.grad.clone() for p in stepper.net.parameters())  # type: ignore[method-assign]
    stepper.step(images)

    again, images = make(tmp_path, batch_gpu=2, augment=0.0, dropout=0.0)
    total = sum(again.microbatch_loss(*next(images), m).sum() for m in range(4)) / 8
    expected = torch.autograd.grad(total, list(again.net.parameters()))
    for gradient, reference in zip(seen, expected, strict=True):
        assert_close(gradient, reference, rtol=1e-4, atol=1e-7)


def test_a_microbatch_is_a_function_of_seed_images_seen_and_number(tmp_path):
    stepper, images = make(tmp_path, batch_gpu=4)
    batch = next(images)
    stepper.net.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    torch.manual_seed(123)
    first = stepper.microbatch_loss(*batch, 0)
    torch.manual_seed(456)
    assert torch.equal(first, stepper.microbatch_loss(*batch, 0))
    assert not torch.equal(first, stepper.microbatch_loss(*batch, 1))
    stepper.images_seen += 8
    assert not torch.equal(first, stepper.microbatch_loss(*batch, 0))


def test_learning_rate_ramps_up_linearly_and_stays(tmp_path):
    stepper, images = make(tmp_path, lr=0.01, lr_rampup_kimg=0.032)
    rates = []
    for _ in range(6):
        stepper.step(images)
        rates.append(stepper.optimizer.param_groups[0]["lr"])
    assert_close(rates, [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])


def test_convolutions_learn_at_a_rate_of_their_own(tmp_path):
    """Adam's first step moves a weight by the learning rate, whatever its gradient."""
    stepper, images = make(tmp_path, lr=0.01, lr_rampup_kimg=0.0, conv_lr=0.25)
    before = {name: parameter.detach().clone() for name, parameter in stepper.net.named_parameters()}
    stepper.step(images)
    for name, parameter in stepper.net.named_parameters():
        moved = float((parameter.detach() - before[name]).abs().max())
        if moved > 1e-4:  # not those whose gradient begins at 0
            assert_close(moved, 0.0025 if parameter.ndim == 4 else 0.01, rtol=1e-3, atol=0)


def snapshot(stepper):
    """Copies of all that a step may move but the place in the data."""
    found = {f"net.{name}": tensor for name, tensor in stepper.net.state_dict().items()}
    found |= {f"ema.{name}": tensor for name, tensor in stepper.ema.state_dict().items()}
    found |= optimizer_tensors(stepper.optimizer, stepper.net)
    return {name: tensor.clone() for name, tensor in found.items()}


@pytest.mark.parametrize(("precision", "optimizer"), [("fp32", "adam"), ("bf16", "adam"), ("fp32", "muon")])
@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e30, 100.0])
def test_a_step_with_a_gradient_not_finite_or_far_larger_than_before_changes_nothing_and_is_counted(
    tmp_path, precision, optimizer, factor
):
    stepper, images = make(tmp_path, precision, optimizer=optimizer)
    for _ in range(ENOUGH):
        stepper.step(images)
    before = snapshot(stepper)
    poison = [p.register_hook(lambda gradient: gradient * factor) for p in stepper.net.parameters()]
    stepper.step(images)
    after = snapshot(stepper)
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert int(stepper.meter.skipped) == int(stepper.meter.skipped_in_a_row) == 1
    for handle in poison:
        handle.remove()
    stepper.step(images)
    assert int(stepper.meter.skipped_in_a_row) == 0
    assert not torch.equal(snapshot(stepper)["net.head.weight"], before["net.head.weight"])


def test_a_spike_is_taken_where_it_is_to_be_ignored(tmp_path):
    stepper, images = make(tmp_path, on_spike="ignore")
    for _ in range(ENOUGH):
        stepper.step(images)
    before = weights(stepper)
    for parameter in stepper.net.parameters():
        parameter.register_hook(lambda gradient: gradient * 100)
    stepper.step(images)
    assert int(stepper.meter.skipped) == 0
    assert not torch.equal(stepper.net.head.weight, before["head.weight"])


def test_guards_change_no_bit_of_a_healthy_run(tmp_path):
    found = []
    for options in ({"on_spike": "ignore"}, {"grad_clip": 1e3}):
        stepper, images = make(tmp_path, **options)
        for _ in range(2 * ENOUGH):
            stepper.step(images)
        found.append(snapshot(stepper))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_a_gradient_is_scaled_down_to_the_norm_that_is_asked_for(tmp_path):
    stepper, images = make(tmp_path, grad_clip=1e-3)
    seen = []
    stepper.optimizer.step = lambda *a, **k: seen.extend(p.grad.clone() for p in stepper.net.parameters())  # type: ignore[method-assign]
    stepper.step(images)
    assert_close(float(torch.cat([gradient.flatten() for gradient in seen]).norm()), 1e-3, rtol=1e-3, atol=0)


def test_average_follows_the_weights_as_the_half_life_says(tmp_path):
    stepper, images = make(tmp_path, ema_halflife_kimg=0.008, ema_rampup_ratio=1.0)
    start = weights(stepper)["tokenizer.weight"]
    stepper.step(images)
    first = weights(stepper)["tokenizer.weight"]
    stepper.step(images)
    second = weights(stepper)["tokenizer.weight"]
    expected = (start / 2 + first / 2) / 2 + second / 2  # a batch of 8 is one half-life
    assert_close(stepper.ema.tokenizer.weight, expected)


def test_labels_are_dropped_to_the_null_class_as_often_as_asked():
    labels = torch.arange(5).repeat(4000)
    dropped = drop_labels(labels, 5, 0.3, torch.Generator().manual_seed(0))
    gone = dropped != labels
    assert (dropped[gone] == 5).all()
    assert_close(gone.double().mean().item(), 0.3, rtol=0, atol=4 * (0.3 * 0.7 / 20000) ** 0.5)


def test_loss_falls_on_a_small_archive(tmp_path):
    stepper, images = make(tmp_path, batch=32, lr=1e-2, lr_rampup_kimg=0.0, augment=0.0, dropout=0.0)
    losses = []
    for step in range(1, 81):
        stepper.step(images)
        if step % 20 == 0:
            losses.append(stepper.meter.read(alone("cpu"))["loss"])
    assert losses[-1] < 0.85 * losses[0]


def test_mean_loss_by_noise_level_covers_all_images(tmp_path):
    stepper, images = make(tmp_path, batch=64)
    for _ in range(4):
        stepper.step(images)
    counts = stepper.meter.sums[1].clone()
    scalars = stepper.meter.read(alone("cpu"))
    bins = [value for name, value in scalars.items() if name.startswith("loss_sigma_")]
    assert counts.sum() == 256
    assert len(bins) == 5
    assert_close(sum(float(c) * b for c, b in zip(counts, bins, strict=True)) / 256, scalars["loss"])


def test_cached_and_live_latents_are_the_same_draws_mirrored_by_the_same_coin(tmp_path):
    pytest.importorskip("diffusers")
    vae = load_autoencoder(write_vae(tmp_path / "vae"), scale=0.5)
    images = torch.randint(0, 256, (16, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain, mirrored = (torch.stack(vae.encode(given), 1) for given in (images, images.flip(3)))
    cached = torch.cat([plain, mirrored], dim=1)  # (B, 4, C, h, w)
    for mirror in (False, True):
        generator = torch.Generator().manual_seed(1)
        coin = torch.rand(16, generator=generator) < 0.5 if mirror else torch.zeros(16, dtype=torch.bool)
        noise = torch.randn(16, 4, 4, 4, generator=generator)
        mean, std = torch.where(coin[:, None, None, None, None], mirrored, plain).unbind(1)
        for data, autoencoder in ((cached, None), (images, vae)):
            generator = torch.Generator().manual_seed(1)
            drawn = clean_samples(data, generator, mirror=mirror, autoencoder=autoencoder, scale=0.5)
            assert_close(drawn, (mean + std * noise) * 0.5, rtol=1e-4, atol=1e-5)
        assert 0 < coin.sum() < 16 or not mirror
    assert (plain - mirrored).abs().mean() > 0.01, "these images are their own mirror images"


def test_a_run_goes_on_with_the_weights_that_it_had_and_its_statistics_are_of_the_loss_itself(tmp_path):
    stepper, images = make(tmp_path, weighting="uncertainty", batch_gpu=4)
    stepper.net.head.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        stepper.step(images)
    assert not torch.equal(stepper.weighting.means, torch.ones_like(stepper.weighting.means))
    stepper.save(tmp_path / "state")
    again, _ = make(tmp_path, weighting="uncertainty", batch_gpu=4)
    again.restore(tmp_path / "state")
    assert torch.equal(again.weighting.means, stepper.weighting.means)
    plain, _ = make(tmp_path, batch_gpu=4)
    plain.restore(tmp_path / "state")
    batch = next(images)
    weighted, loss = again.microbatch_loss(*batch, 0), plain.microbatch_loss(*batch, 0)
    assert not torch.equal(weighted, loss)
    assert torch.equal(again.meter.last_loss, loss.mean())
