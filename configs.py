"""`from configs import …` from a checkout, without an install."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "src"))
from diffit.configs.presets import get_diffit_config, get_training_config

__all__ = ["get_diffit_config", "get_training_config"]
