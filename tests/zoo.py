"""Every architecture of mlx-lm at a size that is built and run in milliseconds.

``data/mlx_lm_zoo.json`` holds for each name the ``config`` of a tiny model and, where needed:
``module`` (of ``mlx_lm.models``, if not the name), ``stub`` (packages that it only wants to be
there), ``tokens`` (how many it runs at once), ``pipeline`` (the machine to split it for) and
``no_forward`` (why it cannot run on the CPU).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import sys
import types
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import mlx.core as mx

ZOO: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "mlx_lm_zoo.json").read_text()
)
VARIANTS = [name for name in ZOO if "module" in ZOO[name]]
ARCHITECTURES = [name for name in ZOO if "module" not in ZOO[name]]
MADE_FOR = "0.32.2"  # the mlx-lm that has just these architectures

_HAS_MODEL = re.compile(r"(?m)^(class Model\(|from \S+ import (.*, )?Model\b(?! as))")


def installed() -> list[str]:
    """The architectures of the mlx-lm that is installed, by their files."""
    spec = importlib.util.find_spec("mlx_lm.models")
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.py")]
    return sorted(file.stem for file in files if _HAS_MODEL.search(file.read_text("utf-8")))


def build(name: str, **config: Any) -> Any:
    """A new model, with the same parameters each time, and some of its config changed."""
    entry = ZOO[name]
    module = _module(entry.get("module", name), tuple(entry.get("stub", ())))
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict({**entry["config"], **config}))
    if "pipeline" in entry:
        split = entry["pipeline"]
        model.model.pipeline(Mock(rank=lambda: split["rank"], size=lambda: split["size"]))
    return model


@functools.cache
def _module(name: str, stubs: tuple[str, ...]) -> Any:
    missing = [stub for stub in stubs if stub not in sys.modules]
    sys.modules.update((stub, types.ModuleType(stub)) for stub in missing)
    try:
        return importlib.import_module(f"mlx_lm.models.{name}")
    finally:
        for stub in missing:
            del sys.modules[stub]


def run(name: str, model: Any) -> mx.array:
    """What the model makes of a few tokens."""
    tokens = mx.arange(1, 1 + ZOO[name].get("tokens", 8))[None]
    output = model(tokens)
    mx.eval(output)
    return output


def same(a: mx.array, b: mx.array) -> bool:
    """Whether two outputs are equal bit by bit, where both are no number too."""
    return a.dtype == b.dtype and mx.array_equal(a, b, equal_nan=True).item() is True
