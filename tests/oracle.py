"""What the library should do, said again as naively as possible and without using it.

Everything here is slow on purpose: walk the whole model, try every pattern on every path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Location = tuple[int, Any]
Pattern = str | re.Pattern[str]


@dataclass(frozen=True)
class Segment:
    """What stands between two dots of a path; a list entry also knows where in its list it is."""

    text: str
    index: int = -1
    length: int = 0


@dataclass(frozen=True, eq=False)
class Place:
    """A path and what lies there."""

    path: str
    container: Any
    key: Any
    module: nn.Module
    segments: tuple[Segment, ...]
    around: tuple[Location, ...]

    @property
    def location(self) -> Location:
        return id(self.container), self.key

    def put(self, module: nn.Module) -> None:
        if isinstance(self.container, list):
            self.container[self.key] = module
        else:
            dict.__setitem__(self.container, self.key, module)

    def now(self) -> nn.Module:
        return dict(entries(self.container))[self.key]


def entries(container: Any) -> list[tuple[Any, Any]]:
    if isinstance(container, dict):
        return list(dict.items(container))
    return list(enumerate(container))


def places(model: nn.Module) -> list[Place]:
    """Every place of a model in definition order."""
    return list(places_in(model, (), ()))


def places_in(
    container: Any, segments: tuple[Segment, ...], around: tuple[Location, ...]
) -> Iterator[Place]:
    for key, value in entries(container):
        inner = (*segments, *segments_of(container, key))
        if isinstance(value, nn.Module):
            path = ".".join(segment.text for segment in inner)
            place = Place(path, container, key, value, inner, around)
            yield place
            yield from places_in(value, inner, (*around, place.location))
        elif isinstance(value, (dict, list)):
            yield from places_in(value, inner, around)


def segments_of(container: Any, key: Any) -> list[Segment]:
    if isinstance(container, list):
        return [Segment(str(key), key, len(container))]
    return [Segment(text) for text in str(key).split(".")]


def everything(model: Any) -> list[Any]:
    """Every container that can be reached from `model`, also those that MLX does not see."""
    seen: dict[int, Any] = {}
    waiting = [model]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or not isinstance(thing, (dict, list, tuple)):
            continue
        seen[id(thing)] = thing
        waiting += [value for _, value in entries(thing) + attributes(thing)]
    return list(seen.values())


def attributes(thing: Any) -> list[tuple[str, Any]]:
    return list(vars(thing).items()) if isinstance(thing, nn.Module) else []


class Snapshot:
    """All that a model holds, to see later what has changed."""

    def __init__(self, model: nn.Module) -> None:
        self._then = [(thing, self._contents(thing)) for thing in everything(model)]

    @staticmethod
    def _contents(thing: Any) -> tuple[Any, ...]:
        frozen = set(thing._no_grad) if isinstance(thing, nn.Module) else None
        return type(thing), entries(thing), attributes(thing), frozen

    def differences(self, but: Iterable[Location] = ()) -> list[str]:
        """What is not as it was, looking away from the locations in `but`."""
        return list(self._differences(set(but)))

    def _differences(self, but: set[Location]) -> Iterator[str]:
        for thing, (kind, then, attributes_then, frozen_then) in self._then:
            name = kind.__name__
            _, now, attributes_now, frozen_now = self._contents(thing)
            if type(thing) is not kind:
                yield f"the type of a {name}"
            if frozen_now != frozen_then:
                yield f"what is frozen in a {name}"
            for before, after in ((then, now), (attributes_then, attributes_now)):
                if [key for key, _ in before] != [key for key, _ in after]:
                    yield f"the keys of a {name}"
                for (key, old), (_, new) in zip(before, after):
                    if old is not new and (id(thing), key) not in but:
                        yield f"{key!r} of a {name}"


def matches(pattern: Pattern, place: Place) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(place.path) is not None
    parts, segments = pattern.split("."), place.segments

    @cache
    def rest(p: int, s: int) -> bool:
        if p == len(parts):
            return s == len(segments)
        if parts[p] == "**":
            least = 1 if p == len(parts) - 1 else 0
            return any(rest(p + 1, then) for then in range(s + least, len(segments) + 1))
        name, *indices = re.split(r"\]?\[", parts[p].removesuffix("]"))
        after = s + 1 + len(indices)
        if after > len(segments):
            return False
        return (
            glob(name, segments[s].text)
            and all(map(picks, indices, segments[s + 1 : after]))
            and rest(p + 1, after)
        )

    return rest(0, 0)


def glob(pattern: str, text: str) -> bool:
    if "{" in pattern:
        head, _, inside = pattern.partition("{")
        alternatives, _, tail = inside.partition("}")
        return any(glob(head + one + tail, text) for one in alternatives.split(","))
    if pattern[:1] == "*":
        return any(glob(pattern[1:], text[start:]) for start in range(len(text) + 1))
    if not pattern or not text:
        return pattern == text
    return pattern[0] in ("?", text[0]) and glob(pattern[1:], text[1:])


def picks(index: str, segment: Segment) -> bool:
    numbers = [int(number) if number else None for number in index.split(":")]
    if len(numbers) == 1:
        return segment.length > 0 and numbers[0] in (segment.index, segment.index - segment.length)
    return segment.index in range(segment.length)[slice(*numbers)]


def admits(where: Any, place: Place) -> bool:
    if where is None:
        return True
    if isinstance(where, (type, tuple)):
        return isinstance(place.module, where)
    return where(place.path, place.module)


def chosen(
    model: nn.Module,
    patterns: Sequence[Pattern],
    where: Any = None,
    exclude: Sequence[Pattern] = (),
) -> list[Place]:
    """The places that the arguments name, in definition order."""
    return [
        place
        for place in places(model)
        if any(matches(pattern, place) for pattern in patterns)
        and not any(matches(pattern, place) for pattern in exclude)
        and admits(where, place)
    ]


def deciding(rules: Iterable[Pattern], place: Place) -> Pattern:
    """The first rule that matches the place."""
    return next(rule for rule in rules if matches(rule, place))


def idle(
    model: nn.Module,
    patterns: Sequence[Pattern],
    where: Any = None,
    exclude: Sequence[Pattern] = (),
) -> bool | None:
    """Whether one of the arguments does nothing; `None` where that is a matter of taste."""
    matched = chosen(model, patterns)
    left = chosen(model, patterns, None, exclude)
    if any(not chosen(model, [pattern]) for pattern in patterns):
        return True
    if any(not any(matches(pattern, place) for place in matched) for pattern in exclude):
        return True
    if where is None or any(admits(where, place) for place in left):
        return False
    return True if left else None


def idle_rules(
    model: nn.Module,
    rules: Mapping[Pattern, Any],
    where: Any = None,
    exclude: Sequence[Pattern] = (),
) -> bool | None:
    """Whether a rule or another of the arguments does nothing; `None` for a matter of taste."""

    def shadowed(rule: Pattern, exclude: Sequence[Pattern]) -> bool:
        return all(
            deciding(rules, place) is not rule for place in chosen(model, [rule], None, exclude)
        )

    unused = idle(model, list(rules), where, exclude)
    early = any(shadowed(rule, ()) for rule in rules)
    late = any(shadowed(rule, exclude) for rule in rules)
    decided = [
        rules[deciding(rules, place)] for place in chosen(model, list(rules), where, exclude)
    ]
    if unused is None or early != late or (where is not None and not any(decided)):
        return True if unused or early else None
    return unused or early


def tied(module: nn.Module) -> bool:
    """Whether two places with this one object would be a tie."""
    return any(isinstance(leaf, mx.array) for _, leaf in tree_flatten(module.parameters()))


def calls(targets: Iterable[Place]) -> list[Place]:
    """The places with which a factory is called: one for a tied object, one for a location."""
    first: dict[Any, Place] = {}
    for place in targets:
        first.setdefault(id(place.module) if tied(place.module) else place.location, place)
    return list(first.values())


def brothers(model: nn.Module, place: Place) -> list[Place]:
    """All the places that have to change together with this one, itself included."""
    return [
        other
        for other in places(model)
        if other.location == place.location or (other.module is place.module and tied(place.module))
    ]


def objections(model: nn.Module, changing: Mapping[str, Any]) -> list[str]:
    """Why these paths cannot change; each path comes with the factory that changes it."""
    found = []
    targets = [place for place in places(model) if place.path in changing]
    locations = {place.location for place in targets}
    for place in targets:
        for other in brothers(model, place):
            if changing.get(other.path) is not changing[place.path]:
                found.append(f"{place.path} changes without {other.path}")
        if locations.intersection(place.around):
            found.append(f"{place.path} lies inside another that changes")
    return found


def partial_faults(
    model: nn.Module, partial: Any, wanted: Mapping[Location, nn.Module]
) -> list[str]:
    """What is wrong, missing or too much in a partial module dict."""
    faults = []
    found: dict[Location, nn.Module] = {}

    def visit(part: Any, container: Any) -> None:
        kind = list if isinstance(container, list) else dict
        if type(part) is not kind or not part:
            faults.append(f"{part!r} for a {type(container).__name__}")
            return
        there = dict(entries(container))
        for key, value in entries(part):
            if key not in there:
                faults.append(f"{key!r} is not in the model")
            elif isinstance(value, nn.Module):
                found[id(container), key] = value
            elif kind is dict or key == len(part) - 1 or value != {}:
                visit(value, there[key])

    visit(partial, model)
    if {key: id(value) for key, value in found.items()} != {
        key: id(value) for key, value in wanted.items()
    }:
        faults.append("not the modules that were asked for")
    return faults


def parameters(model: nn.Module) -> int:
    """How many parameters all modules hold that can be reached, each module once."""
    seen = [model]
    return sum(numbers_in(module, module, seen) for module in seen)


def numbers_in(container: Any, owner: nn.Module, seen: list[nn.Module]) -> int:
    """How many numbers a module holds without those inside it, which join the ones to see."""
    numbers = 0
    for key, value in entries(container):
        if container is owner and str(key).startswith("_"):
            continue
        if isinstance(value, mx.array):
            numbers += unpacked(owner, key, value.size)
        elif isinstance(value, nn.Module):
            if not any(value is module for module in seen):
                seen.append(value)
        elif isinstance(value, (dict, list)):
            numbers += numbers_in(value, owner, seen)
    return numbers


def unpacked(owner: nn.Module, key: Any, size: int) -> int:
    """A quantized layer packs several numbers into one, and holds others that are no parameters."""
    if "scales" not in dict.keys(owner) or "bits" not in vars(owner):
        return size
    return {"weight": size * 32 // vars(owner)["bits"], "bias": size}.get(key, 0)


def proposed_by(error: Exception) -> list[tuple[Any, int | None]]:
    """What an error proposes, with the number of modules that it says are matched."""
    line = str(error).split("\n")[0]
    proposed: list[tuple[Any, int | None]] = []
    for at in re.finditer("; ", line):
        said = re.fullmatch(r"(?:.*write )?(.*?)(?: matches (\d+))?", line[at.end() :])
        with suppress(SyntaxError, NameError, TypeError):  # it is in the middle of something else
            assert said is not None
            proposed.append((eval(said[1], {"re": re}), int(said[2]) if said[2] else None))
    assert proposed or not re.search("write | matches [0-9]+$", line), line
    return proposed
