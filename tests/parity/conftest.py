"""Against torch and transformers, which only these tests need: pip install -e '.[parity]'."""

import importlib.util
import os

os.environ["HF_HUB_OFFLINE"] = "1"

if not all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]
