"""Long random histories of one model: swaps, failures, blocks in any order, other people's edits.

A plain-Python `Mirror` says after each step what the model has to look like. What the library does
to it is foretold with the reference in `oracle.py`; other people's edits are simply looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mirror import Mirror, OpenBlock, flags, parameters
from mlx.utils import tree_flatten
from oracle import Place
from strategies import Leaf, Net, exactly, lists_of_patterns, models, one_place, patterns, wheres

from mlx_modswap import (
    Replacement,
    SelectionError,
    partial_modules,
    replace_layers,
    select,
    swapped,
)
from mlx_modswap._swap import undo

MOST_BLOCKS = 4  # open `swapped` blocks
MOST_PLACES = 60


class Boom(Exception):
    pass


class Stop(KeyboardInterrupt):
    """What no `except Exception` sees."""


class Around(nn.Module):
    """A new module that holds the one that it replaces."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.scale = mx.ones(1)
        self.inner = [inner]


class Parts(nn.Module):
    """A new module with modules of its own, not all in one mode."""

    def __init__(self):
        super().__init__()
        self.weight = mx.zeros(1)
        self.parts = {"0": Leaf(), "act": nn.ReLU().eval()}


MAKERS: dict[str, Callable[[str, nn.Module], nn.Module]] = {
    "a leaf": lambda path, module: Leaf(),
    "no parameters": lambda path, module: nn.Identity(),
    "parts": lambda path, module: Parts(),
    "a wrapper": lambda path, module: Around(module),
    "a leaf for some": lambda path, module: module if len(path) % 3 else Leaf(),
    "in eval mode": lambda path, module: nn.Dropout().eval(),
}
ONE = "the one factory for all"
ERRORS: list[Any] = [Boom, Stop]
NO_MODULES = [None, nn.ReLU, mx.zeros(1), "module", {}, [Leaf()]]


def makers() -> st.SearchStrategy[Any]:
    return st.sampled_from(list(MAKERS)).map(MAKERS.__getitem__)


class Factory:
    """Remembers what it made for which path; may fail at one of its calls, in one of many ways."""

    def __init__(
        self, make: Callable[[str, nn.Module], nn.Module], fail_at: int = -1, bad: Any = 0
    ):
        self.make = make
        self.fail_at = fail_at
        self.bad = bad
        self.made: dict[str, Any] = {}

    def __call__(self, path: str, module: nn.Module) -> Any:
        assert path not in self.made
        failing = len(self.made) == self.fail_at
        if failing and self.bad in ERRORS:
            raise self.bad
        self.made[path] = self.bad if failing else self.make(path, module)
        return self.made[path]


class Streams(RuleBasedStateMachine):
    """Blocks alone, in any order, many on the same place or inside another."""

    def __init__(self):
        super().__init__()
        self.blocks: list[OpenBlock] = []  # in the order in which they were entered
        self.adapters = [Leaf(), Leaf()]
        self.open_before = list(undo._open)  # those of an example that has failed

    @initialize(model=models())
    def begin(self, model: nn.Module) -> None:
        self.model = model
        self.mirror = Mirror(model)

    @precondition(lambda self: len(self.blocks) < MOST_BLOCKS)
    @rule(data=st.data(), make=makers())
    def enter_a_block(self, data: st.DataObject, make: Any) -> None:
        self.enter(data.draw(one_place(self.model)), make)

    @precondition(lambda self: any(block.olds for block in self.blocks))
    @precondition(lambda self: len(self.blocks) < MOST_BLOCKS)
    @rule(data=st.data(), make=makers(), nearest=st.integers(0, 2))
    def enter_a_block_near_another(self, data: st.DataObject, make: Any, nearest: int) -> None:
        """On its place, on a module around it, or inside what it has put there."""
        location = data.draw(st.sampled_from([at for block in self.blocks for at in block.olds]))
        places = oracle.places(self.model)
        same = [place for place in places if place.location == location]
        around = [p for place in same for p in places if p.location in place.around]
        inside = [p for place in same for p in places if place.location in p.around]
        near = ([same, around, inside] * 2)[nearest : nearest + 3]
        chosen = next(filter(None, near), None)
        if chosen:
            self.enter(data.draw(st.sampled_from(chosen)), make)

    @precondition(lambda self: len(self.blocks) < MOST_BLOCKS)
    @rule(data=st.data(), number=st.integers(0, 1))
    def enter_a_block_with_an_adapter_that_comes_back(
        self, data: st.DataObject, number: int
    ) -> None:
        self.enter(data.draw(one_place(self.model)), lambda path, module: self.adapters[number])

    @precondition(lambda self: len(self.blocks) < MOST_BLOCKS)
    @rule(data=st.data(), make=makers(), other=makers())
    def enter_a_block_by_rules(self, data: st.DataObject, make: Any, other: Any) -> None:
        chosen, rules = self.some_rules(data, make, other)
        manager = swapped(self.model, rules, strict=False)
        deciding = partial(oracle.deciding, rules)
        kept = oracle.left_alone(self.model, rules)
        self.entered(manager, self.swap(chosen, rules, manager.__enter__, deciding, kept), chosen)

    @precondition(lambda self: self.blocks)
    @rule(fail=st.sampled_from([None, None, *ERRORS]), at=st.integers(-MOST_BLOCKS, -1))
    def leave_a_block(self, fail: Any, at: int) -> None:
        """The innermost, or one that was entered before others that are still open."""
        at = max(at, -len(self.blocks))
        block, later = self.blocks[at], self.blocks[at:][1:]
        del self.blocks[at]
        above = {
            location: [other for other in later if location in other.olds]
            for location in block.olds
        }
        by_hand = block.changed_by_hand(above)
        lost = block.has_lost_a_place()
        if fail:
            error = fail()
            assert not block.manager.__exit__(fail, error, None)  # so the error goes on
        elif by_hand:
            with pytest.raises(SelectionError, match="modified inside the block and left"):
                block.manager.__exit__(None, None, None)
        elif any(above.values()) or lost:
            what = "by a block that was entered after" if any(above.values()) else "no longer at"
            with pytest.raises(SelectionError, match=what):
                block.manager.__exit__(None, None, None)
        else:
            block.manager.__exit__(None, None, None)
        for location, old in block.olds.items():
            if above[location]:
                above[location][0].olds[location] = old
            elif location not in by_hand:
                self.mirror.put(location, old)

    # ------------------------------------------------------------ what has to hold

    @invariant()
    def the_model_is_what_the_mirror_says(self) -> None:
        assert self.mirror.differences() == []

    @invariant()
    def the_parameters_have_the_names_that_the_mirror_says(self) -> None:
        named = tree_flatten(nn.Module.parameters(self.model))
        assert [(name, id(array)) for name, array in named] == list(
            self.mirror.parameters(self.model)
        )

    def teardown(self) -> None:
        while self.blocks:
            self.leave_a_block(None, -1)
            self.the_model_is_what_the_mirror_says()
        assert undo._open == self.open_before

    # ------------------------------------------------------------ helpers

    def some_rules(
        self, data: st.DataObject, make: Any, other: Any
    ) -> tuple[list[Place], dict[Any, Factory | None]]:
        names = data.draw(st.lists(patterns(self.model), min_size=2, max_size=3, unique_by=str))
        factories = [Factory(make), None, Factory(other)]
        rules = dict(zip(names, data.draw(st.permutations(factories))))
        return oracle.chosen_by_rules(self.model, rules), rules

    def enter(self, place: Place, make: Any) -> None:
        chosen = self.family(place)
        factory = Factory(make)
        manager = swapped(self.model, [exactly(place.path) for place in chosen], factory)
        self.entered(manager, self.swap(chosen, {ONE: factory}, manager.__enter__), chosen)

    def entered(
        self,
        manager: AbstractContextManager[Replacement],
        report: Replacement | None,
        chosen: list[Place],
    ) -> None:
        if report is not None:
            changed = [place for place in chosen if place.path in report]
            self.blocks.append(OpenBlock(self.model, manager, changed))

    def family(self, place: Place) -> list[Place]:
        """A place and all those that have to change with it."""
        paths = {place.path}
        while True:
            chosen = [place for place in oracle.places(self.model) if place.path in paths]
            more = {other.path for place in chosen for other in oracle.siblings(self.model, place)}
            if more == paths:
                return chosen
            paths = more

    def swap(
        self,
        chosen: list[Place],
        factories: Mapping[Any, Factory | None],
        call: Callable[[], Replacement],
        deciding: Callable[[Place], Any] = lambda place: ONE,
        kept: Iterable[Place] = (),
    ) -> Replacement | None:
        """Make a swap that may be refused, and compare with what was foretold of it."""
        before = parameters(self.model, [place.path for place in chosen])
        calls = self.calls(chosen, deciding)
        rules = {place.path: deciding(place) for place in chosen}
        changing = [
            place for place in chosen if will_change(factories[rules[place.path]], calls, place)
        ]
        objections = oracle.objections(self.model, {p.path: rules[p.path] for p in changing})
        tried = {
            place.location: factory.make(calls[place.path].path, place.module)
            for place in changing
            if (factory := factories[rules[place.path]])
        }
        objections += oracle.losses(kept, tried)
        if objections:
            with pytest.raises(SelectionError):
                call()
            return None
        inside = set(map(id, oracle.everything(self.model)))
        report = call()
        assert list(report) == [place.path for place in changing]
        for place in changing:
            factory = factories[rules[place.path]]
            new = factory.made[calls[place.path].path] if factory else None
            assert report[place.path] is new
            assert isinstance(new, nn.Module)
            self.mirror.put(place.location, new, flags(place.module)[0])
            if id(new) not in inside:  # an adapter that comes back gets the mode again
                inside.add(id(new))
                self.mirror.flags[id(new)] = flags(place.module)[0], self.mirror.flags[id(new)][1]
        assert parameters(self.model, [place.path for place in chosen]) == before
        return report

    @staticmethod
    def calls(chosen: list[Place], deciding: Callable[[Place], Any]) -> dict[str, Place]:
        """For each path the place with which its factory is called."""
        first: dict[Any, Place] = {}
        calls = {}
        for place in chosen:
            unit = id(place.module) if oracle.tied(place.module) else place.location
            calls[place.path] = first.setdefault((unit, deciding(place)), place)
        return calls


class History(Streams):
    """Blocks among all else that the library and other people do."""

    # ------------------------------------------------------------ what the library does

    @rule(data=st.data(), make=makers())
    def replace_what_some_patterns_match(self, data: st.DataObject, make: Any) -> None:
        chosen, names, options = self.a_selection(data)
        factory = Factory(make)
        call = partial(replace_layers, self.model, names, factory, **options)
        kept = oracle.left_alone(self.model, {}, options["exclude"])
        self.swap(chosen, {ONE: factory}, call, kept=kept)
        assert list(factory.made) == [place.path for place in oracle.calls(chosen)]

    @rule(data=st.data(), make=makers())
    def replace_a_place_and_what_goes_with_it(self, data: st.DataObject, make: Any) -> None:
        chosen, names = self.a_family(data)
        factory = Factory(make)
        self.swap(chosen, {ONE: factory}, partial(replace_layers, self.model, names, factory))

    @rule(data=st.data(), make=makers(), other=makers())
    def replace_by_rules(self, data: st.DataObject, make: Any, other: Any) -> None:
        chosen, rules = self.some_rules(data, make, other)
        call = partial(replace_layers, self.model, rules, strict=False)
        kept = oracle.left_alone(self.model, rules)
        self.swap(chosen, rules, call, partial(oracle.deciding, rules), kept)

    @rule(
        data=st.data(),
        make=makers(),
        bad=st.sampled_from([*ERRORS, *ERRORS, *NO_MODULES]),
        call=st.sampled_from([replace_layers, lambda *a, **k: swapped(*a, **k).__enter__()]),
    )
    def fail_at_a_call(self, data: st.DataObject, make: Any, bad: Any, call: Any) -> None:
        chosen, names, options = self.a_selection(data)
        if chosen:
            calls = len(oracle.calls(chosen))
            factory = Factory(make, data.draw(st.integers(0, calls - 1)), bad)
            with pytest.raises(bad if bad in ERRORS else TypeError):
                call(self.model, names, factory, **options)

    @rule(data=st.data(), make=st.sampled_from([Leaf, Parts, nn.Identity]))
    def replace_by_hand(self, data: st.DataObject, make: Any) -> None:
        chosen, _ = self.a_family(data)
        paths = [place.path for place in chosen]
        if oracle.objections(self.model, dict.fromkeys(paths, "new")):
            return
        new: Any = make()
        before = parameters(self.model, paths)
        news: dict[str, Any] = dict.fromkeys(paths, new)
        nested = partial_modules(self.model, news)
        assert self.mirror.differences() == []
        self.model.update_modules(nested)
        for place in chosen:
            self.mirror.put(place.location, new)
        assert parameters(self.model, paths) == before

    @rule(data=st.data())
    def look_at_some(self, data: st.DataObject) -> None:
        chosen, names, options = self.a_selection(data)
        found = select(self.model, names, **options)
        assert list(found) == [place.path for place in chosen]
        assert all(found[place.path] is place.module for place in chosen)

    # ------------------------------------------------------------ what someone else does

    @rule(data=st.data(), make=st.sampled_from([Leaf, Parts]))
    def someone_replaces_a_module(self, data: st.DataObject, make: Any) -> None:
        data.draw(one_place(self.model)).put(make())
        self.mirror.look_again(self.model)

    @rule(data=st.data(), what=st.sampled_from(["freeze", "unfreeze", "train", "eval"]))
    def someone_freezes_a_module_or_sets_its_mode(self, data: st.DataObject, what: str) -> None:
        getattr(data.draw(one_place(self.model)).module, what)()
        self.mirror.look_again(self.model)

    @rule(
        name=st.sampled_from(["added", "0", "q_proj"]),
        make=st.sampled_from([lambda: [Leaf(), None], lambda: {"0": Leaf()}, Leaf, Net]),
    )
    def someone_adds_to_the_model(self, name: str, make: Any) -> None:
        if len(oracle.places(self.model)) < MOST_PLACES:
            setattr(self.model, name, make())
            self.mirror.look_again(self.model)

    @rule(data=st.data())
    def someone_ties_two_places(self, data: st.DataObject) -> None:
        first, second = data.draw(one_place(self.model)), data.draw(one_place(self.model))
        if not oracle.places(first.module):  # so nothing becomes a part of itself
            second.put(first.module)
            self.mirror.look_again(self.model)

    @rule(data=st.data())
    def someone_shortens_a_list(self, data: st.DataObject) -> None:
        lists = [place.container for place in oracle.places(self.model)]
        lists = [one for one in lists if isinstance(one, list) and len(one) > 1]
        if lists:
            data.draw(st.sampled_from(lists)).pop()
            self.mirror.look_again(self.model)

    # ------------------------------------------------------------ helpers

    def a_family(self, data: st.DataObject) -> tuple[list[Place], list[Any]]:
        """A place and all those that have to change with it, and patterns for just these."""
        chosen = self.family(data.draw(one_place(self.model)))
        return chosen, [exactly(place.path) for place in chosen]

    def a_selection(self, data: st.DataObject) -> tuple[list[Place], list[Any], dict[str, Any]]:
        names = data.draw(lists_of_patterns(self.model))
        where = data.draw(st.one_of(st.none(), wheres()))
        exclude = data.draw(st.lists(patterns(self.model), max_size=1))
        options = {"where": where, "exclude": exclude, "strict": False}
        return oracle.chosen(self.model, names, where, exclude), names, options


def will_change(factory: Factory | None, calls: Mapping[str, Place], place: Place) -> bool:
    """What the makers do is no secret, so one can try."""
    return factory is not None and factory.make(calls[place.path].path, place.module) is not (
        place.module
    )


class TestStreams(Streams.TestCase):
    settings = settings(stateful_step_count=25)


class TestHistory(History.TestCase):
    settings = settings(stateful_step_count=25)
