"""Random models, as odd as models get, and random patterns that mostly match something in them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import oracle
from hypothesis import assume
from hypothesis import strategies as st
from oracle import Pattern, Place, Segment

USUAL = ["a", "b", "layers", "mlp", "q_proj", "k_proj", "v_proj", "norm"]
ODD = ["0", "1", "10", "2-1", "A", "_private", "dot.ted", "dot.0.b", "st*r", "stir", "wh?t", "what"]
WILD = ["[0]", "a[b]", "br{a,b}", "{", "a**", "**", "line\nbreak"]


class Leaf(nn.Module):
    """The smallest module with a parameter."""

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros(1)


class Secret(nn.Module):
    """A module whose only array is not a parameter."""

    def __init__(self):
        super().__init__()
        self._weight = mx.zeros(1)


class Net(nn.Module):
    def __repr__(self):
        return picture(self)


class Touchy(Net):
    """A module that can only be compared with `is`."""

    def __eq__(self, other):
        raise AssertionError("modules are compared with `is`")

    __ne__ = __eq__

    def __bool__(self):
        raise AssertionError("modules are not asked for a truth value")

    __hash__ = None


class Lengthy(Net):
    def __len__(self):
        return 0

    def __iter__(self):
        raise AssertionError("modules are not iterated over")


class Stubborn(Net):
    def train(self, mode=True):
        super().train(mode)
        self._training = False
        return self


class Discreet(Net):
    def parameters(self):
        return {}


class Chain(list):
    """A list that is called, as in some vision models."""

    def __call__(self, x):
        for layer in self:
            x = layer(x)
        return x


NETS = [Net, Net, Net, Net, Touchy, Lengthy, Stubborn, Discreet]
WITH_ARRAYS = [Leaf, Leaf, Leaf, lambda: nn.Linear(1, 1), lambda: nn.LayerNorm(1)]
WITHOUT = [nn.ReLU, nn.Tanh, nn.Dropout, Secret]


def picture(model: Any) -> str:
    """A model on one line; what stands in several places is written once and has a number."""
    numbers: dict[int, int] = {}

    def draw(thing: Any) -> str:
        if not isinstance(thing, (dict, list, tuple)):
            return getattr(thing, "__name__", None) or ("None" if thing is None else "array")
        if id(thing) in numbers:
            return f"#{numbers[id(thing)]}"
        numbers[id(thing)] = len(numbers)
        inside = ", ".join(f"{key!r}: {draw(value)}" for key, value in oracle.entries(thing))
        flags = ""
        if isinstance(thing, nn.Module):
            flags = "" if thing.training else " eval"
            flags += f" frozen {sorted(thing._no_grad)}" if thing._no_grad else ""
        return f"{type(thing).__name__}#{numbers[id(thing)]}{flags}({inside})"

    return draw(model)


def weighted(weights: dict[st.SearchStrategy[Any], int]) -> st.SearchStrategy[Any]:
    """One of some strategies. `one_of` takes each of them once, however often it is given."""
    several = [strategy for strategy, weight in weights.items() for _ in range(weight)]
    return st.sampled_from(several).flatmap(lambda strategy: strategy)


# Strategies are made once: to make one costs more than to draw from it.
NAMES = st.sampled_from(USUAL * 3 + ODD * 2 + WILD)
KEYS = weighted({NAMES: 2, st.sampled_from([0, 1, 10, -1]): 1, st.sampled_from(["", "0", "1"]): 1})
DICT_KEYS = st.lists(KEYS, min_size=1, max_size=3, unique_by=str)
ATTRIBUTES = st.lists(NAMES, min_size=1, max_size=4, unique=True)
ATTRIBUTES_OF_A_MODEL = st.lists(NAMES, min_size=3, max_size=4, unique=True)
LEAVES = ["leaf"] * 4 + ["empty"] * 2 + ["nothing"]
HOLDERS = ["module"] * 3 + ["list"] * 3 + ["alike"] * 2 + ["dict"] * 2
KINDS = {
    (deeper, again): st.sampled_from(LEAVES + HOLDERS * deeper + ["again"] * 6 * again)
    for deeper in (False, True)
    for again in (False, True)
}
NOTHING = [
    lambda: None,
    lambda: nn.gelu,
    lambda: mx.zeros(1),
    lambda: (Leaf(), None),
    list,
    dict,
]
MAKE = {
    "leaf": st.sampled_from(WITH_ARRAYS),
    "empty": st.sampled_from(WITHOUT),
    "nothing": st.sampled_from(NOTHING),
    "module": st.sampled_from(NETS),
    "list": st.sampled_from([list, list, list, Chain]),
    "inside": st.lists(
        st.tuples(NAMES, st.sampled_from(WITH_ARRAYS * 2 + WITHOUT * 2 + NOTHING)),
        max_size=3,
        unique_by=lambda pair: pair[0],
    ),
}
LENGTHS = st.integers(1, 4)
SHARED = st.booleans()


@st.composite
def models(draw: st.DrawFn, *, shared: bool | None = None) -> nn.Module:
    """A model with at least one place; half of them hold some objects twice."""
    shared = draw(SHARED) if shared is None else shared
    made: list[Any] = []

    def thing(depth: int) -> Any:
        deeper = bool(depth) and len(made) < 30
        kind = draw(KINDS[deeper, bool(shared and made)])
        if kind == "again":
            return made[draw(st.integers(0, len(made) - 1))]
        if kind == "nothing":
            return draw(MAKE[kind])()
        new = {
            "leaf": lambda: draw(MAKE[kind])(),
            "empty": lambda: draw(MAKE[kind])(),
            "module": lambda: module(depth - 1, ATTRIBUTES),
            "list": lambda: draw(MAKE[kind])(thing(depth - 1) for _ in range(draw(LENGTHS))),
            "alike": lambda: alike(depth),
            "dict": lambda: {key: thing(depth - 1) for key in draw(DICT_KEYS)},
        }[kind]()
        if shared and size(new) <= 8:
            made.append(new)
        return new

    def alike(depth: int) -> list[Any]:
        """Layers that look alike, but for one of them in most lists."""
        layer_class, inside = draw(MAKE["module"]), draw(MAKE["inside"])
        layers = [layer_class() for _ in range(draw(LENGTHS) + 1)]
        for layer in layers:
            for name, make in inside:
                setattr(layer, name, make())
        other = draw(st.integers(0, len(layers)))
        if other < len(layers):
            layers[other] = thing(depth - 1)
        return layers

    def module(depth: int, names: st.SearchStrategy[list[str]]) -> nn.Module:
        new = draw(MAKE["module"])()
        for name in draw(names):
            setattr(new, name, thing(depth))
        return new

    model = module(3, ATTRIBUTES_OF_A_MODEL)
    made.clear()  # two functions that know each other keep it until the garbage is collected
    assume(1 < size(model) <= 80)
    inside = [thing for thing in oracle.everything(model) if isinstance(thing, nn.Module)]
    training, frozen = (draw(st.integers(0, 2 ** len(inside) - 1)) for _ in range(2))
    for number, one in enumerate(inside):
        one._training = not training >> number & 1
        if frozen >> number & 1:
            one._no_grad.update(dict.keys(one))
    return model


def size(thing: Any) -> int:
    holder = nn.Module()
    dict.__setitem__(holder, "thing", thing)
    return len(oracle.places(holder))


def is_plain(text: str) -> bool:
    """Whether the text, read as a pattern, means nothing but itself."""
    return not set(text) & set("[]{}*?") and "" not in text.split(".")


def is_speakable(path: str) -> bool:
    """Whether the path, used as a pattern, selects its own place."""
    return not set(path) & set("[]{}") and "**" not in path and "" not in path.split(".")


def one_place(model: nn.Module) -> st.SearchStrategy[Place]:
    return st.sampled_from(oracle.places(model))


RARELY = st.sampled_from([False, False, False, True])
EVENLY = st.booleans()


@st.composite
def matching_patterns(draw: st.DrawFn, model: nn.Module) -> str:
    """The path of a place with some of its segments replaced: it matches that place at least."""
    segments = draw(one_place(model)).segments
    parts: list[str] = []
    at = 0
    while at < len(segments):
        if draw(RARELY):
            parts.append("**")
            at += draw(st.integers(0, len(segments) - at))
            continue
        parts.append(draw(elements(segments[at].text)))
        at += 1
        while at < len(segments) and segments[at].length and draw(EVENLY):
            parts[-1] += f"[{draw(indices(segments[at]))}]"
            at += 1
    return ".".join(parts)


def elements(text: str) -> st.SearchStrategy[str]:
    """Patterns for one segment that match the text."""
    if not is_speakable(text):
        return st.just("*")
    return weighted({st.just(text): 3, st.just("*"): 1, wildcards(text): 1, alternatives(text): 1})


@st.composite
def wildcards(draw: st.DrawFn, text: str) -> str:
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, len(text)))
    wildcard = "?" if stop == start + 1 and draw(st.booleans()) else "*"
    part = text[:start] + wildcard + text[stop:]
    return part if is_speakable(part) else "*"


@st.composite
def alternatives(draw: st.DrawFn, text: str) -> str:
    start = draw(st.integers(0, len(text) - 1))
    stop = draw(st.integers(start + 1, len(text)))
    this = text[start:stop]
    if not is_plain(this):
        return text
    other = draw(st.sampled_from(["x", "q", this + "s", this.swapcase()]))
    both = draw(st.permutations([this, other]))
    return f"{text[:start]}{{{','.join(both)}}}{text[stop:]}"


@st.composite
def indices(draw: st.DrawFn, segment: Segment) -> str:
    """An index or a slice that picks this list entry."""
    here, length = segment.index, segment.length
    if draw(st.booleans()):
        return str(draw(st.sampled_from([here, here - length])))
    if draw(st.sampled_from([False, False, True])):
        return draw(st.sampled_from(["::-1", f"{here}::-1", f"{here - length}::-2"]))
    start = draw(st.integers(0, here))
    stop = draw(st.integers(here + 1, length + 1))
    starts = [start, start - length] + [""] * (start == 0)
    stops = [stop] + [stop - length] * (stop < length) + [""] * (stop >= length)
    step = draw(st.sampled_from(["", ":", ":1", f":{max(here - start, 1)}"]))
    return f"{draw(st.sampled_from(starts))}:{draw(st.sampled_from(stops))}{step}"


NUMBER = st.one_of(st.just(""), st.integers(-3, 3).map(str))
INDEX = st.one_of(
    st.integers(-3, 3).map(str),
    st.builds("{}:{}".format, NUMBER, NUMBER),
    st.builds("{}:{}:{}".format, NUMBER, NUMBER, st.sampled_from([-2, -1, 1, 2])),
)
ELEMENT = st.sampled_from(["*", "?", "*_proj", "{q,k}_proj", "{a,b}", "?*", *USUAL, *ODD[:5]])
PART = weighted({ELEMENT: 2, st.just("**"): 1, st.builds("{}[{}]".format, ELEMENT, INDEX): 1})
PARTS = st.lists(PART, min_size=1, max_size=4)


def random_patterns() -> st.SearchStrategy[str]:
    """Patterns that were made without a look at the model."""
    return PARTS.map(".".join)


@st.composite
def regexes(draw: st.DrawFn, model: nn.Module) -> re.Pattern[str]:
    path = draw(one_place(model)).path
    cut = draw(st.integers(1, len(path)))
    head, tail = re.escape(path[:cut]), re.escape(path[cut:])
    text = draw(st.sampled_from([head + tail, head, head + ".*", ".+" + tail, f"{head}|{tail}x"]))
    return re.compile(text, draw(st.sampled_from([0, re.IGNORECASE, re.DOTALL])))


@st.composite
def near_misses(draw: st.DrawFn, model: nn.Module) -> str:
    """Patterns as people get them wrong, which mostly match nothing."""
    path = draw(one_place(model).map(lambda place: place.path).filter(is_speakable))
    first, *others = path.split(".")
    last = others[-1] if others else first
    end = ".".join(others) or "nowhere"
    other_names = [end, last, path.swapcase(), path + "s", path + ".weight"]
    too_deep = [f"{path}.**", f"{path}.9", f"*.{last}.*", f"*.{path}"]
    no_such_entry = ["**.9", f"**.{last}9", f"{first}[9]", f"{first}.9", f"**.{last}[-9]"]
    return draw(st.sampled_from(other_names + too_deep + no_such_entry))


def patterns(model: nn.Module) -> st.SearchStrategy[Pattern]:
    return weighted({matching_patterns(model): 5, regexes(model): 1, random_patterns(): 1})


def lists_of_patterns(model: nn.Module) -> st.SearchStrategy[list[Pattern]]:
    return st.lists(patterns(model), min_size=1, max_size=3)


def in_eval_mode(path: str, module: nn.Module) -> bool:
    return not module.training


def with_an_even_path(path: str, module: nn.Module) -> bool:
    return len(path) % 2 == 0


CLASSES = [nn.Linear, Leaf, Net, (Leaf, nn.Linear), (nn.ReLU, Secret, Touchy), nn.Module]


def wheres() -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *CLASSES, in_eval_mode, with_an_even_path])


class Selection(NamedTuple):
    """A model and arguments that name some of its places, whether or not these can be swapped."""

    model: nn.Module
    patterns: list[Pattern]
    where: Any
    exclude: list[Pattern]

    @property
    def narrowing(self) -> dict[str, Any]:
        return {"where": self.where, "exclude": self.exclude}

    def places(self) -> list[Place]:
        return oracle.chosen(*self)


@st.composite
def selections(draw: st.DrawFn, *, shared: bool | None = None) -> Selection:
    model = draw(models(shared=shared))
    exclude = draw(weighted({st.just([]): 2, st.lists(patterns(model), max_size=2): 1}))
    where = draw(weighted({st.none(): 1, wheres(): 1}))
    return Selection(model, draw(lists_of_patterns(model)), where, exclude)


class Swap(NamedTuple):
    """A model and places of it that can be swapped: whole ties, whole aliases, none in another."""

    model: nn.Module
    targets: list[Place]
    patterns: list[Pattern]

    @property
    def locations(self) -> set[oracle.Location]:
        return {place.location for place in self.targets}


@st.composite
def swaps(draw: st.DrawFn, *, shared: bool | None = None) -> Swap:
    model = draw(models(shared=shared))
    paths: set[str] = set()
    for place in draw(st.lists(one_place(model), min_size=1, max_size=4)):
        more = paths | {sibling.path for sibling in family(model, place)}
        if not oracle.objections(model, dict.fromkeys(more, "new")):
            paths = more
    targets = [place for place in oracle.places(model) if place.path in paths]
    return Swap(model, targets, [exactly(place.path) for place in targets])


def family(model: nn.Module, place: Place) -> list[Place]:
    """The places that change with this one, those that change with these, and so on."""
    found = {place.path: place}
    waiting = [place]
    while waiting:
        for other in oracle.siblings(model, waiting.pop()):
            if other.path not in found:
                found[other.path] = other
                waiting.append(other)
    return list(found.values())


def exactly(path: str) -> Pattern:
    return path if is_plain(path) else re.compile(re.escape(path))
