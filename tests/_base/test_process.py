"""What a process has, and may lack."""

from __future__ import annotations

import subprocess
import sys

WITHOUT = """
import os, sys
from transformers import PreTrainedModel  # with torch and psutil, which ask for the platform's name instead
del os.register_at_fork
sys.modules["resource"] = None
import specgen
from specgen.server.config import ServerConfig
from specgen.server.connections import most_connections
print(specgen.Engine.__name__, most_connections(ServerConfig(max_connections=5)))
"""


def test_a_system_without_forks_and_limits_is_taken() -> None:
    """As Windows is."""
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "Engine 5\n", done.stderr
