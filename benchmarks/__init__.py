"""Side-by-side measurements: each prints a ratio of two things timed in turns in one run."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # whose helpers write the small archives here too
