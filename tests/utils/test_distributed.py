import pytest
import torch

from diffit.errors import UserError
from diffit.utils.distributed import pick_device, processes


def test_more_processes_than_gpus_is_a_user_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="--nproc_per_node=2"):
        pick_device()


def test_a_task_of_srun_that_sees_its_own_gpu_alone_uses_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.setenv(name, "3")
    assert pick_device() == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_LOCALID", "0")  # of torchrun, which srun has started once a node
    with pytest.raises(UserError, match="--nproc_per_node=1"):
        pick_device()


def test_processes_can_be_counted_without_the_others(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("RANK", "3")
    with processes(join=False) as procs:
        assert (procs.rank, procs.count, procs.device.type) == (3, 8, "cuda")


def test_a_restart_that_would_wait_for_processes_of_before_is_refused_in_a_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name, value in {"RESTART_COUNT": "1", "USE_AGENT_STORE": "True"}.items():
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    with pytest.raises(UserError, match="set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"), processes():
        pass
