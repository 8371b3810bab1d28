"""`python train.py …` and `torchrun … train.py …` from a checkout, without an install."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
from diffit.cli import run, train

if __name__ == "__main__":  # the loader's workers import this file again where processes are spawned
    run(train.train)
