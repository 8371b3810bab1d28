"""A process that has given up writing, and what it then cannot do."""

import subprocess
import sys

import pytest

CHILD = """
import os, socket, subprocess, sys
from pathlib import Path
from diffit.utils.confine import give_up_writing
folder = Path(sys.argv[1])
if not give_up_writing(but_below=folder / "devices"):
    sys.exit(3)
attempts = {
    "write": lambda: (folder / "kept").open("r+b"),
    "truncate": lambda: os.truncate(folder / "kept", 0),
    "make": lambda: (folder / "new").touch(),
    "folder": lambda: (folder / "new").mkdir(),
    "remove": lambda: (folder / "kept").unlink(),
    "rename": lambda: (folder / "kept").rename(folder / "renamed"),
    "link": lambda: (folder / "link").symlink_to(folder / "kept"),
    "run": lambda: subprocess.run(["true"], check=True),
    "read": lambda: (folder / "kept").read_bytes(),
    "device": lambda: (folder / "devices" / "null").write_bytes(b"x"),
}
for name, attempt in attempts.items():
    try:
        attempt()
    except PermissionError:
        continue
    print(name)
"""


def test_nothing_is_written_made_removed_or_run(tmp_path):
    (tmp_path / "devices").mkdir()
    (tmp_path / "devices" / "null").touch()
    (tmp_path / "kept").write_bytes(b"kept")
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path)], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip("this kernel has no Landlock")
    assert done.stdout.split() == ["read", "device"], done.stderr
    assert (tmp_path / "kept").read_bytes() == b"kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["devices", "kept"]
