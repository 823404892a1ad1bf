"""Makes `tiny` and `oracles` importable, keeps the hub out, and shares the slow oracles."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
