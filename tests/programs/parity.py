"""What mlx-lm writes against what is written here: the table in docs/parity.md, run on the zoo.

::

    python tests/programs/parity.py                # every architecture: the figures in the document
    python tests/programs/parity.py llama mixtral  # some, with a line for each that is not exact
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

sys.path.insert(0, str(Path(__file__).parents[1]))  # when it is run as a program
import zoo

DOCUMENT = Path(__file__).parents[2] / "docs" / "parity.md"

# What is done to a model, by mlx-lm, before a row of the table is run on it.
BEFORE = {
    "LoRA on a quantized model": ["quantize all but some"],
    "fuse adapters": ["LoRA in all layers of the last blocks"],
    "fuse adapters into a quantized model": [
        "quantize all but some",
        "LoRA in all layers of the last blocks",
    ],
    "take adapters off": ["LoRA in the layers that a config lists"],
    "dequantize": ["quantize all but some"],
}


class Row(NamedTuple):
    """A row of the table: two pieces of code that do the same."""

    name: str
    theirs: str
    ours: str


class Outcome(NamedTuple):
    """How the two sides of a row compare on an architecture, and why."""

    kind: str
    why: str = ""


EXACT = "exact"
NOT_RUN = "same, not run"
NOTHING = "nothing there"
ONLY_HERE = "only here"
NEITHER = "neither"
GOOD = (EXACT, NOT_RUN, NOTHING, ONLY_HERE, NEITHER)
ONLY_THERE = "only mlx-lm"
DIFFERENT = "different"
BAD = (ONLY_THERE, DIFFERENT)


@functools.cache
def rows() -> dict[str, Row]:
    """The rows of the table, by name."""
    text = DOCUMENT.read_text("utf-8")
    cells = re.findall(r"(?m)^\| ([^`|]+) \| `([^`]+)` \| `([^`]+)` \|$", text)
    return {name: Row(name, theirs, ours) for name, theirs, ours in cells}


@functools.cache
def preamble() -> Any:
    """The first block of Python in the document, which the table leans on."""
    block = re.search(r"(?ms)^```python\n(.*?)^```$", DOCUMENT.read_text("utf-8"))
    assert block is not None
    return compile(block[1], str(DOCUMENT), "exec")


# ---------------------------------------------------------------- one side of a row


class Side:
    """A model, and the names that the code in the table uses for what is in it."""

    def __init__(self, architecture: str):
        self.architecture = architecture
        self.model = zoo.build(architecture)
        self.names: dict[str, Any] = {"__name__": "document"}
        exec(preamble(), self.names)
        self.names.update(names_in(self.model, self.names), model=self.model)

    def run(self, code: str) -> str:
        """Run code from the table; say how it failed, if it did."""
        code = code.replace('"model.layers', f'"{self.names["blocks"]}')
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                eval(code, self.names)
        except Exception as error:
            return in_words(error)
        return ""

    def output(self) -> mx.array | str:
        try:
            return zoo.run(self.architecture, self.model)
        except Exception as error:
            return in_words(error)

    def places(self) -> dict[str, nn.Module]:
        return dict(self.model.named_modules())

    def identities(self) -> dict[str, int]:
        return {path: id(module) for path, module in self.places().items()}

    def arrays(self) -> dict[str, mx.array]:
        return dict(tree_flatten(self.model.parameters()))

    def randomize_adapters(self) -> None:
        """Give the adapters random arrays, the same ones for the same paths."""
        mx.random.seed(1)
        arrays = [
            (path, 0.1 * mx.random.normal(array.shape))
            for path, array in sorted(self.arrays().items(), key=lambda item: item[0])
            if not {"lora_a", "lora_b"}.isdisjoint(path.split("."))
        ]
        self.model.load_weights(arrays, strict=False)


def names_in(model: Any, preamble: dict[str, Any]) -> dict[str, Any]:
    """What ``blocks``, ``keys``, ``experts``, ``embedding`` and ``keep`` are in this model."""
    places = dict(reversed(model.named_modules()))
    inside: dict[str, nn.Module] = {}
    for block in model.layers[-2:]:
        inside.update(reversed(block.named_modules()))
    last = next(path for path, module in places.items() if module is model.layers[-1])
    dense = [path for path, layer in inside.items() if isinstance(layer, preamble["LINEAR"])]
    return {
        "blocks": last.rpartition(".")[0],
        "keys": list(dict.fromkeys(dense[:1] + dense[-1:])),
        "experts": [p for p, layer in inside.items() if isinstance(layer, preamble["EXPERTS"])],
        "embedding": next(p for p, m in places.items() if "Embedding" in type(m).__name__),
        "keep": [path for path, layer in places.items() if isinstance(layer, nn.Linear)][-1:],
    }


def in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


# ---------------------------------------------------------------- both sides


@functools.cache
def compare(name: str, architecture: str) -> Outcome:
    """Run both sides of a row on a model each."""
    row, theirs, ours = rows()[name], Side(architecture), Side(architecture)
    for earlier in BEFORE.get(name, ()):
        for side in (theirs, ours):
            if failure := side.run(rows()[earlier].theirs):
                return Outcome(NEITHER, f"{earlier}: {failure}")
            side.randomize_adapters()
    untouched = theirs.identities()
    if failure := theirs.run(row.theirs):
        works = not ours.run(row.ours) and isinstance(ours.output(), mx.array)
        return Outcome(ONLY_HERE if works else NEITHER, failure)
    if failure := ours.run(row.ours):
        nothing = theirs.identities() == untouched and failure.startswith("NoMatchError")
        return Outcome(NOTHING if nothing else ONLY_THERE, failure)
    for difference in differences(theirs, ours):
        return Outcome(DIFFERENT, difference)
    return compare_outputs(theirs, ours)


def differences(theirs: Side, ours: Side) -> Iterator[str]:
    expected, found = theirs.places(), ours.places()
    if list(expected) != list(found):
        yield f"{expected.keys() ^ found.keys()} are in one of the models only"
    for path in expected:
        if (a := described(expected[path])) != (b := described(found[path])):
            yield f"{path}: {a}, {b}"
    arrays, others = theirs.arrays(), ours.arrays()
    equal = {path: mx.array_equal(arrays[path], others[path], equal_nan=True) for path in arrays}
    mx.eval(equal)
    for path in equal:
        # These alone are random, and mlx-lm makes them in the reverse order.
        if "lora_a" not in path.split(".") and not equal[path].item():
            yield f"the values of {path}"


def described(module: nn.Module) -> Any:
    """The class of a module, its options, what is frozen, and the arrays in it."""
    plain = (bool, int, float, str, list, set, type(None))
    options = {key: value for key, value in vars(module).items() if isinstance(value, plain)}
    arrays = {k: (v.shape, v.dtype) for k, v in module.items() if isinstance(v, mx.array)}
    return type(module), options, arrays


def compare_outputs(theirs: Side, ours: Side) -> Outcome:
    if reason := zoo.ZOO[theirs.architecture].get("no_forward"):
        return Outcome(NOT_RUN, reason)
    theirs.randomize_adapters()
    ours.randomize_adapters()
    a, b = theirs.output(), ours.output()
    if isinstance(a, str):
        return Outcome(NOT_RUN, a) if a == b else Outcome(DIFFERENT, f"outputs: {a}, {b}")
    if isinstance(b, str):
        return Outcome(DIFFERENT, f"ours does not run: {b}")
    if zoo.same(a, b):
        return Outcome(EXACT)
    return Outcome(DIFFERENT, f"outputs, by up to {mx.abs(a - b).max().item()}")


# ---------------------------------------------------------------- figures


def figures(architectures: Iterable[str]) -> str:
    """How many architectures have which outcome in each row, as a table in Markdown."""
    architectures = list(architectures)
    counts = {
        name: Counter(compare(name, architecture).kind for architecture in architectures)
        for name in rows()
    }
    total = sum(counts.values(), Counter[str]())
    kinds = [*GOOD, *filter(total.get, BAD)]
    lines = [
        ["", *kinds],
        ["---", *("---:" for _ in kinds)],
        *([name, *(str(count[kind]) for kind in kinds)] for name, count in counts.items()),
        ["**all**", *(f"**{total[kind]}**" for kind in kinds)],
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(chosen: list[str]) -> None:
    mx.set_default_device(mx.cpu)
    print(figures(chosen or zoo.ARCHITECTURES))
    for name in rows() if chosen else ():
        for architecture in chosen:
            kind, why = compare(name, architecture)
            if kind != EXACT:
                print(f"\n{name}, {architecture}: {kind}: {why}")


if __name__ == "__main__":
    main(sys.argv[1:])
