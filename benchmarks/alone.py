"""Call a function of this package in its own process."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from typing import Any


def alone(module: str, function: str, *arguments: Any) -> Any:
    """Return what the function returns. Its arguments and its result have to be JSON."""
    call = json.dumps([module, function, *arguments])
    command = [sys.executable, "-m", "benchmarks.alone", call]
    return json.loads(subprocess.check_output(command, text=True))


if __name__ == "__main__":
    module, function, *arguments = json.loads(sys.argv[1])
    print(json.dumps(getattr(import_module(f"benchmarks.{module}"), function)(*arguments)))
