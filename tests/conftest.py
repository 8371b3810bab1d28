"""Property tests draw the same examples everywhere, and a busy machine does not fail them."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before any client reads it: no test may depend on the network

settings.register_profile("diffit", deadline=None, derandomize=True)
settings.load_profile("diffit")
