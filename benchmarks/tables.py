"""Format rows of text as Markdown tables."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version

import mlx.core as mx

Row = dict[str, str]  # column -> cell


def markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions(*packages: str) -> str:
    """What the figures were measured with."""
    device = f"CPU ({platform.system()} {platform.machine()})"
    if mx.default_device() != mx.Device(mx.cpu):
        device = str(mx.device_info().get("device_name", "GPU"))
    numbers = [f"{package} {version(package)}" for package in packages]
    python = f"Python {platform.python_version()}, MLX {version('mlx')}"
    return ", ".join([python, *numbers, device, str(date.today())])


def verdict(ok: bool) -> str:
    return "met" if ok else "**missed**"


def duration(seconds: float) -> str:
    size, unit = (1e-6, "us") if seconds < 1e-3 else (1e-3, "ms") if seconds < 1 else (1, "s")
    return f"{seconds / size:.3g} {unit}"


def mb(number: float) -> str:
    return f"{number / 1e6:.1f} MB"


def missed(rows: Iterable[Row]) -> int:
    return sum(verdict(False) in cell for row in rows for cell in row.values())
