"""Network files: ours, and NVIDIA's official one. Nothing is ever unpickled."""

from diffit.weights.file import (
    load_into,
    load_network,
    locate,
    newest_snapshot,
    read_header,
    read_network_file,
    save_network,
    snapshot_kimg,
    snapshots,
    state_hash,
)

__all__ = [
    "load_into",
    "load_network",
    "locate",
    "newest_snapshot",
    "read_header",
    "read_network_file",
    "save_network",
    "snapshot_kimg",
    "snapshots",
    "state_hash",
]
