"""Training states: one folder of safetensors and JSON, with a manifest of SHA-256 sums, on disk whole or not at all.

Tensors are full and named after parameters, so that any number of processes can take a state up.
"""

import hashlib
import json
import logging
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from diffit.errors import UserError
from diffit.training.shard import fill, whole
from diffit.training.signals import undisturbed
from diffit.utils.distributed import Processes
from diffit.utils.files import sha256_of, whole_folder
from diffit.utils.locks import lost
from diffit.weights.file import stream_tensors

logger = logging.getLogger(__name__)

PREFIX = "training-state-"
KEEP_STATES = 2
FILES = {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}


def optimizer_tensors(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, Tensor]:
    """Its state as ``exp_avg.<parameter>`` and so on; empty before the first step."""
    return {
        f"{kind}.{name}": value
        for name, parameter in net.named_parameters()
        for kind, value in optimizer.state[parameter].items()
    }


def check_moments(net: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Raises :class:`UserError` for what would break the optimiser of ``net``."""
    parameters = dict(net.named_parameters())
    muon = {id(p) for group in optimizer.param_groups if group.get("muon") for p in group["params"]}
    momenta = {key.split(".", 1)[1] for key in tensors if key.startswith("momentum_buffer.")}
    if tensors and momenta != {name for name, parameter in parameters.items() if id(parameter) in muon}:
        raise UserError(
            "the state is of another optimiser than the run asks for; go on with the run's own options "
            "(--config RUN/training_options.json), or begin a new run with --resume none"
        )
    for key, value in tensors.items():
        kind, name = key.split(".", 1)
        shape = () if kind == "step" else parameters[name].shape
        if value.shape != shape or not value.isfinite().all():
            raise UserError(
                f"the state's {key} is not finite, or of another shape than its weight; --resume an earlier state"
            )


class StateWriter:
    """Writes training states on a thread: the caller waits for a copy of the tensors in memory, not for the disk.

    One state at a time. Whatever its writing raises is raised by the next :meth:`check`, :meth:`wait` or :meth:`save`,
    and the states before it stay.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "training-state")  # which Python waits for at its end
        self._pending: Future[None] | None = None
        self._given_up = threading.Event()
        self._buffers: dict[str, Tensor] = {}  # kept: memory that is new costs more than copying into it

    def reserve(self, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the memory for a state on the thread, once, so that the first :meth:`save` needs not wait for it.

        After the first step, which makes the moments.
        """
        if self._buffers or self._pending is not None:
            return
        groups = state_groups(net, ema, optimizer)
        wanted = [(f"{name} {key}", tensor) for name, tensors in groups.items() for key, tensor in tensors.items()]
        self._pending = self._pool.submit(self._take, wanted)

    def _take(self, wanted: list[tuple[str, Tensor]]) -> None:
        for key, tensor in wanted:
            self._buffer(key, tensor).zero_()  # the system hands memory over when it is written to

    @torch.no_grad()
    def save(
        self, folder: Path, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]
    ) -> None:
        """As :func:`save_state`; older states but the newest are removed once this one is on disk."""
        self.wait()
        groups = state_groups(net, ema, optimizer)
        copies = {
            name: {key: self._copy(f"{name} {key}", tensor) for key, tensor in tensors.items()}
            for name, tensors in groups.items()
        }
        if next(net.parameters()).is_cuda:
            torch.cuda.current_stream().synchronize()
        text = json.dumps(metadata, indent=2)
        self._given_up.clear()
        self._pending = self._pool.submit(self._write, folder, copies, text)

    def _buffer(self, key: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        return buffer

    def _copy(self, key: str, tensor: Tensor) -> Tensor:
        return self._buffer(key, tensor).copy_(whole(tensor), non_blocking=True)

    def _write(self, folder: Path, copies: dict[str, dict[str, Tensor]], text: str) -> None:
        _write_state(folder, copies, text, self._given_up)
        prune_states(folder.parent)

    def check(self) -> None:
        """Raise what the writing of the last state has raised, if it has ended."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Until the last state is on disk. Raises what its writing has raised."""
        pending = self._pending
        if pending is not None:
            try:
                pending.result()
            finally:
                if pending.done():  # and not where a Ctrl-C ended the waiting alone
                    self._pending = None

    def settle(self) -> None:
        """Wait where something else ends the run, whose error is the one to be seen."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)

    def close(self) -> None:
        """Wait before the run is another's. Ctrl-C gives the state up, so that nothing is being written either way."""
        with undisturbed(self._given_up.set):
            if self._pending is not None and not self._pending.done():
                logger.warning("a state is still being written; Ctrl-C gives it up")
            self.settle()


def save_state(
    folder: Path, net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, metadata: dict[str, Any]
) -> None:
    """``metadata`` is what JSON can hold: images seen, the loss scaler, the configuration."""
    groups = state_groups(net, ema, optimizer)
    tensors = {
        name: {key: whole(tensor).detach().cpu().contiguous() for key, tensor in group.items()}
        for name, group in groups.items()
    }
    _write_state(folder, tensors, json.dumps(metadata, indent=2))


def state_groups(net: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """The tensors of a state by its files; sharded ones must be made whole in this order, by all processes."""
    return {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": optimizer_tensors(optimizer, net)}


def _write_state(
    folder: Path, groups: dict[str, dict[str, Tensor]], metadata: str, given_up: threading.Event | None = None
) -> None:
    with whole_folder(folder) as part:
        sums = {}
        for name, tensors in groups.items():
            sums[f"{name}.safetensors"] = stream_tensors(tensors, part / f"{name}.safetensors", given_up)
        (part / "state.json").write_text(metadata)
        sums["state.json"] = hashlib.sha256(metadata.encode()).hexdigest()
        (part / "manifest.json").write_text(json.dumps(dict(sorted(sums.items())), indent=2))
        if lost.is_set():
            raise UserError(f"{folder.parent}: another process has this run now; nothing more is written")


def verify_state(folder: Path) -> None:
    """Raises :class:`UserError` unless every file of a state is as the manifest has it."""
    try:
        sums = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict) or not sums.keys() >= FILES:
        raise UserError(f"{folder}: not a training state (its manifest.json is not one of ours); give another --resume")
    for name, expected in sums.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != expected:
            raise UserError(f"{folder}: {name} is missing or damaged; remove this state to resume from an earlier one")


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors of ``model``, ``ema`` and ``optimizer``, and metadata, of a state that :func:`verify_state` passed."""
    tensors = {name: load_file(folder / f"{name}.safetensors") for name in ("model", "ema", "optimizer")}
    return tensors, json.loads((folder / "state.json").read_text())


@torch.no_grad()
def take_up(
    tensors: dict[str, dict[str, Tensor]] | None,
    net: nn.Module,
    ema: nn.Module,
    optimizer: torch.optim.Optimizer,
    procs: Processes,
) -> None:
    """Put the tensors of a state in their places. All processes call this together; only the first one has them.

    A node may not see the first one's disk.
    """
    parameters = dict(net.named_parameters())
    moments = None if tensors is None else [(key, value.dtype) for key, value in tensors["optimizer"].items()]
    targets = {"model": net.state_dict(), "ema": ema.state_dict(), "optimizer": dict[str, Tensor]()}
    for key, dtype in procs.broadcast(moments):
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        # The fused kernel reads parameter and moments in step through memory: strides must agree (channels_last).
        like = torch.empty((), device=parameter.device) if kind == "step" else parameter
        moment = torch.empty_like(like, dtype=dtype, requires_grad=False)
        optimizer.state[parameter][kind] = targets["optimizer"][key] = moment
    for group, found in targets.items():
        for key, target in found.items():
            values = torch.empty(target.shape, dtype=target.dtype) if tensors is None else tensors[group][key]
            values = values.to(target.device, target.dtype)
            if procs.count > 1:
                dist.broadcast(values, src=0)
            fill(target, values)


def states(run_dir: Path) -> list[Path]:
    """The training states of a run, oldest first. Unfinished ones have other names."""
    found = [path for path in run_dir.glob(f"{PREFIX}*") if re.fullmatch(rf"{PREFIX}\d+(\.\d+)?", path.name)]
    return sorted(found, key=lambda path: float(path.name.removeprefix(PREFIX)))


def read_progress(folder: Path) -> tuple[int, float]:
    """Images seen and seconds taken, of a state; no tensor is read."""
    try:
        metadata = json.loads((folder / "state.json").read_text())
        return int(metadata["images_seen"]), float(metadata.get("seconds", 0.0))
    except (OSError, ValueError, KeyError, TypeError):  # `load_state` will say what is wrong with it
        return 0, 0.0


def prune_states(run_dir: Path) -> None:
    """Remove all but the newest states."""
    for old in states(run_dir)[:-KEEP_STATES]:
        for item in old.iterdir():
            item.unlink()
        old.rmdir()
