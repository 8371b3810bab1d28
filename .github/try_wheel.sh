#!/usr/bin/env bash
# Install a wheel into an empty environment and go from images to samples with it, far from any checkout.
set -euo pipefail
wheel=$(realpath "$1")
cd "$(mktemp -d)"
python3 -m venv env
env/bin/python -m pip install --quiet "$wheel"
env/bin/python - <<'PYTHON'
from pathlib import Path
import numpy as np
from PIL import Image
Path("photos").mkdir()
for i in range(24):
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(f"photos/{i}.png")
PYTHON
env/bin/diffit --version
env/bin/diffit --help
env/bin/diffit data convert --source photos --dest photos.zip --resolution 16x16 --transform center-crop
env/bin/diffit train --preset debug --data photos.zip --outdir runs
env/bin/diffit sample --network runs/00000-* --outdir samples --num-samples 4
ls samples
