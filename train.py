import sys, pathlib; sys.path.insert(0, str(pathlib.Path(__file__).parent / "src"))
from diffit.cli import run, train
run(train.train)
