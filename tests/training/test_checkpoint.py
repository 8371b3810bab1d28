import json

import pytest
import torch
from torch.testing import assert_close

from diffit.errors import UserError
from diffit.training.checkpoint import (
    check_moments,
    load_state,
    optimizer_tensors,
    save_state,
    states,
    take_up,
    verify_state,
)
from diffit.utils.distributed import Processes

ONE = Processes(0, 1, torch.device("cpu"))


def trained(seed: int = 0, steps: int = 3):
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    for _ in range(steps):
        step(net, optimizer)
    return net, optimizer


def step(net, optimizer):
    net(torch.linspace(-1, 1, 6).reshape(2, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_a_restored_optimiser_takes_the_same_next_step(tmp_path):
    net, optimizer = trained()
    save_state(tmp_path / "training-state-000003", net, net, optimizer, {"images_seen": 3})
    other, other_optimizer = trained(seed=1)
    tensors, facts = load_state(tmp_path / "training-state-000003")
    take_up(tensors, other, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)), other_optimizer, ONE)
    assert facts == {"images_seen": 3}
    for _ in range(2):
        step(net, optimizer)
        step(other, other_optimizer)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_state_names_moments_after_parameters(tmp_path):
    net, optimizer = trained()
    assert {"exp_avg.0.weight", "exp_avg_sq.1.bias", "step.0.weight"} <= set(optimizer_tensors(optimizer, net))


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "remove"])
def test_a_damaged_state_is_refused_and_the_file_named(tmp_path, name, damage):
    folder = tmp_path / "training-state-000003"
    net, optimizer = trained()
    save_state(folder, net, net, optimizer, {})
    if damage == "remove":
        (folder / name).unlink()
    else:
        data = bytearray((folder / name).read_bytes())
        data[-1] ^= 1
        (folder / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        verify_state(folder)


@pytest.mark.parametrize("manifest", ["{}", "[]", "nonsense", '{"name": "a web page", "icons": []}'])
def test_a_folder_with_a_manifest_of_another_kind_is_no_state(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(UserError, match="not a training state"):
        verify_state(tmp_path)


def test_nothing_in_a_state_is_a_pickle(tmp_path):
    folder = tmp_path / "training-state-000003"
    net, optimizer = trained()
    save_state(folder, net, net, optimizer, {})
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert json.loads((folder / "manifest.json").read_text()).keys() == {
        "model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip


def test_an_interrupted_write_leaves_the_older_states_alone(tmp_path, monkeypatch):
    net, optimizer = trained()
    save_state(tmp_path / "training-state-000003", net, net, optimizer, {})
    monkeypatch.setattr(
        "diffit.training.checkpoint.json.dumps", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path / "training-state-000004", net, net, optimizer, {})
    assert [path.name for path in tmp_path.iterdir()] == ["training-state-000003"]


def test_states_come_oldest_first_and_unfinished_ones_not_at_all(tmp_path):
    for name in ("training-state-001000", "training-state-000200", ".training-state-000300.17.part"):
        (tmp_path / name).mkdir()
    assert [path.name for path in states(tmp_path)] == ["training-state-000200", "training-state-001000"]


@pytest.mark.parametrize("damage", ["nan", "inf", "shape"])
def test_moments_that_would_break_the_optimiser_are_refused(damage):
    net, optimizer = trained()
    moments = optimizer_tensors(optimizer, net)
    key = "exp_avg_sq.0.weight"
    moments[key] = moments[key][:1] if damage == "shape" else torch.full_like(moments[key], float(damage))
    with pytest.raises(UserError, match=f"the state's {key} is not finite, or of another shape"):
        check_moments(net, optimizer, moments)
