"""Format rows of text as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable

Row = dict[str, str]  # column -> cell


def markdown(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns)]
    lines += [[row.get(column, "") for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(ok: bool) -> str:
    return "met" if ok else "**missed**"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def mb(number: float) -> str:
    return f"{number / 1e6:.1f} MB"


def missed(rows: Iterable[Row]) -> int:
    return sum(verdict(False) in cell for row in rows for cell in row.values())
