"""The curve beside which a run's loss is shown."""

import pytest

from diffit.configs.presets import get_preset
from diffit.configs.resolve import DataFacts, resolve
from diffit.training import usual
from diffit.training.usual import CURVES, usual_loss

FACTS = DataFacts(3, (32, 32))


def test_it_is_a_line_through_what_was_measured(monkeypatch):
    monkeypatch.setitem(CURVES, "small32", ((1.0, 0.9), (2.0, 0.7), (4.0, 0.3)))
    config = resolve("small32", {}, FACTS)
    found = [usual_loss(config, kimg, 200.0) for kimg in (0.5, 1.0, 1.5, 3.0, 4.0, 100.0)]
    assert found == [None, 0.9, pytest.approx(0.8), pytest.approx(0.5), 0.3, 0.3]


@pytest.mark.parametrize("other", [{"lr": 1e-4}, {"batch": 64}])
def test_another_recipe_has_another_curve(other, monkeypatch):
    monkeypatch.setitem(CURVES, "small32", ((1.0, 0.9), (2.0, 0.7)))
    assert usual_loss(resolve("small32", {"minutes": 3.0}, FACTS), 5.0, 20.0) is not None
    assert usual_loss(resolve("small32", other, FACTS), 5.0, 20.0) is None
    assert usual_loss(resolve("cifar10", {}, FACTS), 5.0, 20.0) is None


def test_where_the_rate_falls_no_loss_is_usual():
    config = resolve("small32", {"lr_decay": 0.4}, FACTS)
    assert [usual_loss(config, kimg, 10.0) is None for kimg in (1.0, 5.9, 6.1, 10.0)] == [False, False, True, True]
    stays = resolve("small32", {"lr_decay": 0.0}, FACTS)
    assert usual_loss(stays, 10.0, 10.0) is not None


def test_curves_fall_and_are_of_presets_that_exist():
    for name, curve in usual.CURVES.items():
        assert get_preset(name).preset == name
        kimg, losses = zip(*curve, strict=True)
        assert list(kimg) == sorted(kimg)
        assert list(losses) == sorted(losses, reverse=True)
