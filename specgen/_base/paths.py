"""Where specgen keeps what it has built: models, kernels, compiled forwards."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SPECGEN_CACHE`, else `specgen` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("SPECGEN_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specgen"
