import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).parent / "src"))
from diffit.configs.presets import get_diffit_config, get_training_config
