"""Any value for any argument is taken, or refused with one of the library's errors in its words.

What comes out is never a bare KeyError, IndexError, AttributeError or RecursionError from inside,
and nothing is changed by a call that fails.
"""

from __future__ import annotations

import collections
import contextlib
import decimal
import enum
import inspect
import io
import itertools
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import event, given
from hypothesis import strategies as st
from models import fresh, unchanged
from oracle import Snapshot
from strategies import Leaf, Net, weighted

from mlx_modswap import (
    NoMatchError,
    PatternError,
    SelectionError,
    Wrapper,
    capture,
    observe,
    partial_modules,
    patch,
    replace_layers,
    select,
    swapped,
    tree,
)

REFUSALS = {TypeError, PatternError, NoMatchError, SelectionError}


class Silent:
    """Has nothing of its own."""

    __slots__ = ()


class Colour(enum.Enum):
    RED = "layers.*"


class Path2(str):
    """A path that is more than a str."""


class Rules(Mapping[Any, Any]):
    """A mapping that is no dict."""

    def __init__(self, rules: dict[Any, Any]):
        self.rules = rules

    def __getitem__(self, key: Any) -> Any:
        return self.rules[key]

    def __iter__(self) -> Any:
        return iter(self.rules)

    def __len__(self) -> int:
        return len(self.rules)


def build() -> nn.Module:
    model = Net()
    model.layers = [nn.Linear(1, 1), nn.ReLU(), None, nn.gelu]
    model.by_key = {0: Leaf(), "x.y": Leaf(), "": nn.Identity()}
    model.pair = (nn.Linear(1, 1),)
    model.tied = model.layers[0]
    return model


# Things that somebody may give by mistake, or on purpose. Each is made anew.
THINGS: dict[str, Callable[[], Any]] = {
    "None": lambda: None,
    "NotImplemented": lambda: NotImplemented,
    "an ellipsis": lambda: ...,
    "True": lambda: True,
    "0": lambda: 0,
    "a large int": lambda: 10**30,
    "nan": lambda: float("nan"),
    "a Decimal": lambda: decimal.Decimal(1),
    "a complex": lambda: 1j,
    "an empty str": str,
    "a path": lambda: "layers.0",
    "a path with a cut-off letter": lambda: "\ud800",
    "a NUL": lambda: "\0",
    "a str that is more": lambda: Path2("layers.0"),
    "a slice text": lambda: "layers[0:1]",
    "a wrong pattern": lambda: "layers[",
    "two stars": lambda: "**",
    "bytes": lambda: b"layers.0",
    "a bytearray": lambda: bytearray(b"layers"),
    "a regex": lambda: re.compile("layers.*"),
    "a regex of bytes": lambda: re.compile(b"layers.*"),
    "a Path": lambda: Path("layers"),
    "an enum": lambda: Colour.RED,
    "a tuple": lambda: ("layers.0", "by_key.0"),
    "an empty tuple": tuple,
    "a list of lists": lambda: [["layers.0"]],
    "a list of Nones": lambda: [None],
    "a set": lambda: {"layers.0"},
    "an empty set": set,
    "an iterator": lambda: iter(["layers.0"]),
    "an empty generator": lambda: (_ for _ in ()),
    "a range": lambda: range(3),
    "an instance of a class without a name": lambda: type("", (), {})(),
    "a scalar array": lambda: mx.array(1),
    "a tuple in a tuple": lambda: ((nn.Conv1d,),),
    "a union in a tuple": lambda: (nn.Conv1d | nn.RMSNorm,),
    "a map of ints": lambda: map(int, "12"),
    "an exhausted iterator": lambda: itertools.islice("ab", 0),
    "a deque": lambda: collections.deque(["layers.0"]),
    "an empty dict": dict,
    "rules": lambda: {"layers.*": unchanged},
    "rules of None": lambda: {"layers.*": None},
    "rules of another kind": lambda: Rules({"layers.0": unchanged, "tied": None}),
    "rules of modules": lambda: {"layers.0": nn.ReLU()},
    "rules for no paths": lambda: {3: unchanged},
    "a mapping proxy": lambda: types.MappingProxyType({"layers.0": fresh}),
    "modules by path": lambda: {"layers.1": nn.Tanh()},
    "modules by int": lambda: {0: nn.Tanh()},
    "a module": lambda: nn.Linear(1, 1),
    "an empty module": nn.ReLU,
    "a wrapper": lambda: Wrapper(nn.Linear(1, 1)),
    "a class": lambda: nn.Linear,
    "another class": lambda: int,
    "classes": lambda: (nn.Linear, nn.ReLU),
    "a union of classes": lambda: nn.Linear | nn.ReLU,
    "a generic class": lambda: list[int],
    "a class and a str": lambda: (nn.Linear, "ReLU"),
    "a metaclass": lambda: type,
    "a function": lambda: unchanged,
    "a function of nothing": lambda: lambda: None,
    "a function of anything": lambda: lambda *given, **named: None,
    "a builtin": lambda: len,
    "a method": lambda: nn.Module().train,
    "a callable object": lambda: Callable_(),
    "a generator function": lambda: generator,
    "an array": lambda: mx.zeros((2,)),
    "a dtype": lambda: mx.float32,
    "a file": io.StringIO,
    "Python's own module": lambda: re,
    "an exception": lambda: KeyError("layers"),
    "an object": object,
    "an object without a dict": Silent,
    "a signature": lambda: inspect.signature(unchanged),
    "a namespace": lambda: types.SimpleNamespace(layers=1),
}


class Callable_:
    def __call__(self, path: str, module: nn.Module) -> bool:
        return True


def generator(path: str, module: nn.Module) -> Any:
    yield module


def things() -> st.SearchStrategy[Any]:
    return st.sampled_from(list(THINGS)).map(lambda name: THINGS[name]())


def patterns() -> st.SearchStrategy[Any]:
    usual = st.sampled_from(
        ["**", "layers.*", "layers[0]", "by_key.*", "tied", ["layers.0", "tied"]]
    )
    return weighted({usual: 2, things(): 1})


def functions() -> st.SearchStrategy[Any]:
    return weighted({st.sampled_from([unchanged, fresh]): 2, things(): 1})


def narrowing() -> st.SearchStrategy[dict[str, Any]]:
    one_of_them = {"where": things(), "exclude": patterns(), "strict": st.sampled_from([0, ""])}
    return weighted({st.just({}): 2, st.fixed_dictionaries({}, optional=one_of_them): 3})


def without_strict(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "strict"}


def use(manager: Any) -> None:
    with manager:
        pass


CALLS: dict[str, Callable[[Any, Any, Any, dict[str, Any]], Any]] = {
    "select": lambda model, pattern, _, options: select(model, pattern, **options),
    "replace_layers": lambda model, pattern, factory, options: str(
        replace_layers(model, pattern, factory, **options)
    ),
    "replace_layers with rules": lambda model, pattern, factory, options: str(
        replace_layers(model, {pattern: factory}, **options)
    ),
    "swapped": lambda model, pattern, factory, options: use(
        swapped(model, pattern, factory, **options)
    ),
    "partial_modules": lambda model, pattern, _, options: partial_modules(model, pattern),
    "partial_modules of one": lambda model, pattern, module, _: partial_modules(
        model, {pattern: module}
    ),
    "tree": lambda model, pattern, _, options: str(tree(model, pattern, **without_strict(options))),
    "capture": lambda model, pattern, _, options: use(capture(model, pattern, **options)),
    "observe": lambda model, pattern, hook, options: use(observe(model, pattern, hook, **options)),
    "patch": lambda model, pattern, change, options: use(patch(model, pattern, change, **options)),
    "Wrapper": lambda _, layer, __, options: Wrapper(layer),
}


def refusal(call: Callable[[], Any]) -> Exception | None:
    """The error that a call ends with, if it does."""
    try:
        call()
    except Exception as error:
        return error
    return None


@pytest.mark.parametrize("call", CALLS)
@given(patterns(), functions(), narrowing())
def test_whatever_is_given_is_taken_or_refused(call, pattern, function, options):
    model = build()
    before = Snapshot(model)
    error = refusal(lambda: CALLS[call](model, pattern, function, options))
    event("refused" if error else "taken")
    if error is not None:
        assert type(error) in REFUSALS, repr(error)
        assert str(error)
        assert before.differences() == []


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("thing", THINGS)
def test_whatever_is_given_for_a_model_is_taken_or_refused(call, thing):
    with contextlib.suppress(*REFUSALS):
        CALLS[call](THINGS[thing](), "**", unchanged, {})
    with contextlib.suppress(*REFUSALS):
        CALLS[call](THINGS[thing](), THINGS[thing](), THINGS[thing](), {})


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("thing", THINGS)
def test_whatever_a_factory_returns_is_put_in_or_refused(thing, strict):
    model: Any = build()
    what = THINGS[thing]()
    before = Snapshot(model)
    error = refusal(
        lambda: replace_layers(model, "layers[1]", lambda path, module: what, strict=strict)
    )
    if isinstance(what, nn.Module):
        assert error is None
        assert model.layers[1] is what
    else:
        assert type(error) is TypeError
        assert str(error).startswith("the factory returned ")
        assert before.differences() == []
