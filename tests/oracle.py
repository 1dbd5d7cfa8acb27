"""What the library should do, said again as naively as possible and without using it.

Everything here is slow on purpose: walk the whole model, try every pattern on every path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

Location = tuple[int, Any]
Pattern = str | re.Pattern[str]
Key = Pattern | tuple[Pattern, ...]
Rules = Mapping[Any, Any]  # by Key; the value is None, or whatever changes a place


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


def covers(pattern: Pattern, place: Place) -> bool:
    """Whether the pattern matches the place or something around it: what to leave alone covers."""
    lengths = range(1, len(place.segments) + 1)
    return any(matches(pattern, leading_part(place, length)) for length in lengths)


def leading_part(place: Place, length: int) -> Place:
    """The first segments of a place, whether or not a module is there."""
    segments = place.segments[:length]
    return replace(place, path=".".join(one.text for one in segments), segments=segments)


def is_excluded(exclude: Iterable[Pattern], place: Place) -> bool:
    return any(covers(pattern, place) for pattern in exclude)


def chosen(
    model: nn.Module,
    patterns: Sequence[Pattern],
    where: Any = None,
    exclude: Sequence[Pattern] = (),
) -> list[Place]:
    """The places that the arguments name, in definition order."""
    return chosen_by_rules(model, dict.fromkeys(patterns, "new"), where, exclude)


def chosen_by_rules(
    model: nn.Module, rules: Rules, where: Any = None, exclude: Sequence[Pattern] = ()
) -> list[Place]:
    """The places that rules decide about, in definition order; rules of None included."""
    return [
        place
        for place in places(model)
        if deciding(rules, place) is not None
        and not is_excluded(exclude, place)
        and admits(where, place)
    ]


def several(key: Key) -> tuple[Pattern, ...]:
    return key if isinstance(key, tuple) else (key,)


def deciding(rules: Rules, place: Place) -> Key | None:
    """The first rule that is about the place, if there is one."""
    for key, factory in rules.items():
        is_about = covers if factory is None else matches
        if any(is_about(pattern, place) for pattern in several(key)):
            return key
    return None


def left_alone(model: nn.Module, rules: Rules, exclude: Iterable[Pattern] = ()) -> list[Place]:
    """The places that are to be left alone by an exclude or by a rule of None."""
    return [
        place
        for place in places(model)
        if is_excluded(exclude, place) or rules.get(deciding(rules, place), "") is None
    ]


def losses(kept: Iterable[Place], news: Mapping[Location, nn.Module]) -> list[str]:
    """What was to be left alone, and is gone when these modules are where they are to be."""
    return [
        place.path
        for place in kept
        for location in place.around
        if location in news and not holds(news[location], place.module)
    ]


def holds(module: nn.Module, other: nn.Module) -> bool:
    return module is other or any(place.module is other for place in places(module))


def idle(
    model: nn.Module,
    patterns: Sequence[Pattern],
    where: Any = None,
    exclude: Sequence[Pattern] = (),
) -> bool:
    """Whether one of the arguments does nothing."""
    return idle_rules(model, {tuple(patterns): "new"}, where, exclude)


def idle_rules(
    model: nn.Module, rules: Rules, where: Any = None, exclude: Sequence[Pattern] = ()
) -> bool:
    """Whether a rule, one of its patterns, or another of the arguments does nothing."""
    about = [place for place in places(model) if deciding(rules, place) is not None]
    seen = [place for place in about if admits(where, place)]
    if all(is_excluded(exclude, place) for place in seen):
        return True

    def does_something(some: Callable[[Place], bool]) -> bool:
        """Whether there are such places, `where` lets one through, or all are excluded."""
        return any(map(some, seen)) or (
            any(map(some, about))
            and all(is_excluded(exclude, place) for place in filter(some, about))
        )

    for key, factory in rules.items():
        is_about = covers if factory is None else matches
        tests: list[Callable[[Place], bool]]
        tests = [partial(is_about, pattern) for pattern in several(key)]
        tests.append(lambda place, key=key: deciding(rules, place) == key)
        if not all(map(does_something, tests)):
            return True
    return not all(any(covers(pattern, place) for place in seen) for pattern in exclude)


def tied(module: nn.Module) -> bool:
    """Whether two places with this one object would be a tie."""
    return any(isinstance(leaf, mx.array) for _, leaf in tree_flatten(module.parameters()))


def calls(targets: Iterable[Place]) -> list[Place]:
    """The places with which a factory is called: one for a tied object, one for a location."""
    first: dict[Any, Place] = {}
    for place in targets:
        first.setdefault(id(place.module) if tied(place.module) else place.location, place)
    return list(first.values())


def siblings(model: nn.Module, place: Place) -> list[Place]:
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
        for other in siblings(model, place):
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
