"""What must hold for every model and every pattern, looked for with random ones."""

from __future__ import annotations

import contextlib
import re
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from models import Recorder
from oracle import Place, Snapshot
from strategies import (
    CLASSES,
    Leaf,
    Net,
    exactly,
    family,
    is_speakable,
    lists_of_patterns,
    matching_patterns,
    models,
    near_misses,
    one_place,
    patterns,
    random_patterns,
    regexes,
    selections,
    swaps,
)

from mlx_modswap import (
    NoMatchError,
    PatternError,
    Replacement,
    SelectionError,
    Wrapper,
    capture,
    partial_modules,
    replace_layers,
    select,
    swapped,
)


class New(nn.Module):
    """A module that a swap brings in; it may hold the one that it replaces."""

    def __init__(self, path: str = "", inner: Any = None):
        super().__init__()
        self.weight = mx.zeros(1)
        self.path = path
        self.parts = [Leaf(), {"act": nn.ReLU()}]
        self._hidden = nn.Dropout()
        if inner is not None:
            self.inner = [inner]


def new(path: str, module: nn.Module) -> nn.Module:
    return New(path)


def wrap(path: str, module: nn.Module) -> nn.Module:
    return New(path, module)


class Boom(Exception):
    pass


def same(found: Mapping[str, nn.Module], expected: list[Place]) -> bool:
    return [(path, id(module)) for path, module in found.items()] == [
        (place.path, id(place.module)) for place in expected
    ]


def called(recorder: Recorder, expected: list[Place]) -> bool:
    return [(path, id(module)) for path, module in recorder.calls] == [
        (place.path, id(place.module)) for place in expected
    ]


def locations(places: list[Place]) -> set[oracle.Location]:
    return {place.location for place in places}


def lost(kept: list[Place], changed: list[Place], make: Callable[..., nn.Module]) -> list[str]:
    """What was to be left alone and is not in what the factory makes of the places around it."""
    news = {place.location: make(place.path, place.module) for place in changed}
    return oracle.losses(kept, news)


def printed(path: str) -> str:
    """A path as it stands in a message."""
    return repr(path)[1:-1]


def holds(replacement: Mapping[str, nn.Module], places: list[Place]) -> bool:
    """Whether the new modules are where the places are."""
    return list(replacement) == [place.path for place in places] and all(
        replacement[place.path] is place.now() for place in places
    )


# Patterns


def test_most_of_the_random_patterns_match_something():
    found = []

    @settings(max_examples=60, derandomize=True, database=None)
    @given(st.data())
    def look(data):
        model = data.draw(models())
        pattern = data.draw(patterns(model))
        found.append(any(oracle.matches(pattern, place) for place in oracle.places(model)))

    look()
    assert sum(found) / len(found) > 0.8


@given(st.data())
def test_a_derived_pattern_matches_something(data):
    model = data.draw(models())
    assert select(model, data.draw(matching_patterns(model)))


@given(models())
def test_the_paths_are_those_of_named_modules(model):
    found = select(model, "**")
    assert same(found, oracle.places(model))
    assert {(path, id(module)) for path, module in found.items()} == {
        (path, id(module)) for path, module in model.named_modules() if module is not model
    }


@given(selections())
def test_select_agrees_with_the_reference(selection):
    model, patterns, *_ = selection
    expected = selection.places()
    event("selects some" if expected else "selects none")
    before = Snapshot(model)
    assert same(select(model, patterns, **selection.narrowing, strict=False), expected)
    assert before.differences() == []


@given(st.data())
def test_one_pattern_agrees_with_the_reference(data):
    model = data.draw(models())
    pattern = data.draw(st.one_of(matching_patterns(model), random_patterns()))
    found = select(model, pattern, strict=False)
    event("matches some" if found else "matches none")
    assert same(found, oracle.chosen(model, [pattern]))


@given(st.data())
def test_a_regex_matches_the_whole_path(data):
    model = data.draw(models())
    pattern = data.draw(regexes(model))
    expected = [place for place in oracle.places(model) if pattern.fullmatch(place.path)]
    assert same(select(model, pattern, strict=False), expected)


@given(st.data())
def test_the_kind_of_iterable_does_not_matter(data):
    model = data.draw(models())
    several = data.draw(lists_of_patterns(model))
    less = data.draw(lists_of_patterns(model))
    expected = oracle.chosen(model, several, None, less)
    for kind in (list, tuple, iter, dict.fromkeys):
        found = select(model, kind(several), exclude=kind(less), strict=False)
        assert same(found, expected)


@given(models())
def test_a_path_used_as_a_pattern_selects_its_place_again(model):
    for path, module in select(model, "**").items():
        if is_speakable(path):
            assert select(model, path)[path] is module


@given(models())
def test_an_escaped_path_is_a_regex_for_its_place_alone(model):
    for path, module in select(model, "**").items():
        found = select(model, re.compile(re.escape(path)))
        assert list(found) == [path]
        assert found[path] is module


@given(models())
def test_two_stars_at_the_end_mean_what_is_inside(model):
    every = select(model, "**")
    for path in filter(is_speakable, every):
        if not set(path) & set("*?"):
            inside = [other for other in every if other.startswith(path + ".")]
            assert list(select(model, f"{path}.**", strict=False)) == inside


@given(st.data())
def test_two_stars_elsewhere_stand_for_any_number_of_segments(data):
    model = data.draw(models())
    path = data.draw(one_place(model)).path
    assume(is_speakable(path))
    segments = path.split(".")
    start = data.draw(st.integers(0, len(segments) - 1))
    stop = data.draw(st.integers(start, len(segments) - 1))
    pattern = ".".join([*segments[:start], "**", *segments[stop:]])
    assert path in select(model, pattern)


@given(
    st.lists(st.sampled_from([Leaf, nn.ReLU, lambda: None, lambda: nn.gelu]), max_size=6),
    st.slices(6) | st.integers(-7, 7),
)
def test_an_index_or_a_slice_means_what_it_means_in_python(kinds, index):
    layers = [kind() for kind in kinds]
    model = Net()
    model.layers = layers
    if isinstance(index, slice):
        picked = layers[index]
        numbers = [index.start, index.stop] + [index.step] * (index.step is not None)
        text = ":".join("" if number is None else str(number) for number in numbers)
    else:
        picked = [layers[index]] if -len(layers) <= index < len(layers) else []
        text = str(index)
    found = select(model, f"layers[{text}]", strict=False)
    assert {id(module) for module in found.values()} == {
        id(layer) for layer in picked if isinstance(layer, nn.Module)
    }


@given(models())
def test_an_index_is_for_lists_and_not_for_keys_that_are_digits(model):
    for place in oracle.places(model):
        head, _, last = place.path.rpartition(".")
        if head and is_speakable(head) and re.fullmatch("-?[1-9]|0", last):
            pattern = f"{head}[{last}]"
            expected = oracle.chosen(model, [pattern])
            event("a list entry" if place in expected else "a key")
            assert same(select(model, pattern, strict=False), expected)


@given(
    st.data(),
    st.sampled_from(
        ["", "a**", "**a", "[ab]", "a[ab]", "a[0-9]", "[0-9]_proj", "a[", "a[0", "{a,b", "a{b"]
    ),
)
def test_a_wrong_pattern_is_refused_whatever_the_model(data, fault):
    model = data.draw(models())
    parts = data.draw(matching_patterns(model)).split(".")
    parts.insert(data.draw(st.integers(0, len(parts))), fault)
    wrong = ".".join(parts)
    recorder = Recorder(new)
    before = Snapshot(model)
    for strict in (True, False):
        with pytest.raises(PatternError):
            select(model, wrong, strict=strict)
        with pytest.raises(PatternError):
            replace_layers(model, {"**": recorder, wrong: recorder}, strict=strict)
        with pytest.raises(PatternError):
            replace_layers(model, "**", recorder, exclude=wrong, strict=strict)
    assert recorder.calls == []
    assert before.differences() == []


# Strictness


@given(selections())
def test_strict_mode_complains_exactly_when_an_argument_did_nothing(selection):
    model, patterns, *_ = selection
    did_nothing = oracle.idle(*selection)
    event(f"complains: {did_nothing}")
    before = Snapshot(model)
    recorder = Recorder(new)
    if did_nothing:
        with pytest.raises(NoMatchError):
            select(model, patterns, **selection.narrowing)
        with pytest.raises(NoMatchError):
            replace_layers(model, patterns, recorder, **selection.narrowing)
        assert not recorder.calls
    else:
        assert same(select(model, patterns, **selection.narrowing), selection.places())
    assert before.differences() == []


@given(st.data())
def test_what_an_error_suggests_matches_as_many_as_it_says(data):
    model = data.draw(models())
    pattern = data.draw(near_misses(model))
    assume(not oracle.chosen(model, [pattern]))
    with pytest.raises(NoMatchError) as error:
        select(model, pattern)
    suggested = re.findall(r"'([^'\\]+)' matches (\d+)", str(error.value))
    event(f"suggestions: {len(suggested)}")
    for suggestion, number in suggested:
        assert len(select(model, suggestion)) == int(number)


# Replacing


@given(
    swaps(),
    st.sampled_from([new, wrap, lambda _, module: New("", module)]),
    st.sampled_from([(), (), Leaf, (nn.Linear, nn.ReLU), Net]),
)
def test_a_swap_changes_its_places_and_no_others(swap, make, kept):
    recorder = Recorder(lambda path, old: old if isinstance(old, kept) else make(path, old))
    changed = [place for place in swap.targets if not isinstance(place.module, kept)]
    before = Snapshot(swap.model)
    calls = oracle.calls(swap.targets)  # what is tied is so before the swap
    replacement = replace_layers(swap.model, swap.patterns[::-1], recorder)
    assert isinstance(replacement, (Replacement, Mapping))
    assert len(replacement) == len(changed)
    assert holds(replacement, changed)
    assert "nowhere" not in replacement
    assert called(recorder, calls)
    assert before.differences(but=locations(changed)) == []


@given(swaps(shared=True))
def test_a_tie_stays_a_tie_and_other_places_get_modules_of_their_own(swap):
    together = {
        (place.path, other.path)
        for place in swap.targets
        for other in oracle.siblings(swap.model, place)
    }
    event("with a tie or an alias" if len(together) > len(swap.targets) else "without")
    replacement = replace_layers(swap.model, swap.patterns, wrap)
    for one in swap.targets:
        for other in swap.targets:
            is_one = replacement[one.path] is replacement[other.path]
            assert is_one == ((one.path, other.path) in together)


@given(
    selections(),
    st.sampled_from([(), (), Net, (Leaf, nn.ReLU)]),
    st.sampled_from([new, wrap]),
)
def test_any_selection_is_swapped_as_asked_or_refused_with_nothing_changed(selection, kind, make):
    model, patterns, *_ = selection
    recorder = Recorder(lambda path, old: old if isinstance(old, kind) else make(path, old))
    targets = selection.places()
    changed = [place for place in targets if not isinstance(place.module, kind)]
    objections = oracle.objections(model, {place.path: recorder for place in changed})
    objections += lost(oracle.left_alone(model, {}, selection.exclude), changed, make)
    event("refused" if objections else "swapped" if changed else "nothing to change")
    before = Snapshot(model)
    if objections:
        with pytest.raises(SelectionError):
            replace_layers(model, patterns, recorder, **selection.narrowing, strict=False)
        assert before.differences() == []
    else:
        calls = oracle.calls(targets)  # what is tied is so before the swap
        replacement = replace_layers(model, patterns, recorder, **selection.narrowing, strict=False)
        assert called(recorder, calls)
        assert holds(replacement, changed)
        assert before.differences(but=locations(changed)) == []


@given(models())
def test_a_factory_that_returns_what_it_was_given_changes_nothing(model):
    before = Snapshot(model)
    recorder = Recorder(lambda _, module: module)
    assert list(replace_layers(model, "**", recorder)) == []
    assert called(recorder, oracle.calls(oracle.places(model)))
    assert before.differences() == []


@given(swaps(), st.booleans())
def test_new_modules_get_the_training_mode_of_what_they_replace_and_old_ones_keep_theirs(
    swap, mode
):
    def make(path: str, module: nn.Module) -> nn.Module:
        new = New(path)
        new.train(mode)
        new.inner = [module]
        return new

    before = Snapshot(swap.model)
    old = {id(thing) for thing in oracle.everything(swap.model)}
    replacement = replace_layers(swap.model, swap.patterns, make)
    for place in swap.targets:
        for module in replacement[place.path].modules():
            if id(module) not in old:
                assert module.training == place.module.training
    assert before.differences(but=swap.locations) == []


@given(swaps())
def test_a_new_module_in_two_places_gets_the_training_mode_of_the_first(swap):
    new = New()
    replacement = replace_layers(swap.model, swap.patterns, lambda path, module: new)
    mode = swap.targets[0].module.training
    assert all(module is new for module in replacement.values())
    assert all(module.training == mode for module in new.modules())


@given(swaps(), st.data())
def test_a_module_that_was_elsewhere_in_the_model_is_not_touched(swap, data):
    donor = data.draw(one_place(swap.model)).module
    inside = {id(thing) for thing in oracle.everything(donor)}
    assume(not any(id(place.container) in inside for place in swap.targets))
    changed = [place for place in swap.targets if place.module is not donor]
    before = Snapshot(swap.model)
    replacement = replace_layers(swap.model, swap.patterns, lambda path, module: donor)
    assert holds(replacement, changed)
    assert before.differences(but=locations(changed)) == []


@given(models())
def test_nothing_holds_on_to_a_replaced_module(model):
    old = [weakref.ref(module) for module in select(model, "**", where=Leaf, strict=False).values()]
    replacement = replace_layers(model, "**", new, where=Leaf, strict=False)
    assert [ref() for ref in old] == [None] * len(old)
    assert replacement is not None


# Wrappers


@given(models())
def test_all_of_a_model_can_be_listened_to_and_is_the_same_afterwards(model):
    paths = [place.path for place in oracle.places(model)]
    before = Snapshot(model)
    with capture(model, "**", strict=False) as outputs:
        assert list(outputs) == paths
    assert before.differences() == []


@given(models(), st.data())
def test_wrappers_do_not_change_the_paths_of_a_model(model, data):
    for place in data.draw(st.lists(one_place(model), min_size=1, max_size=3)):
        place.put(Wrapper(place.now()))
    found = select(model, "**")
    assert list(found) == [path for path, _ in walked(model)]
    assert sorted((path, id(module)) for path, module in found.items()) == sorted(
        (path, id(module)) for path, module in model.named_modules() if path
    )
    assert all(path in select(model, path) for path in found if is_speakable(path))


def walked(thing: Any, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The places of a model with wrappers in it, in definition order."""
    while type(thing) is Wrapper:
        thing = thing.__wrapped__
    for key, value in oracle.entries(thing):
        if isinstance(value, nn.Module):
            yield f"{prefix}{key}", value
        if isinstance(value, (dict, list)):
            yield from walked(value, f"{prefix}{key}.")


# Refusals


@given(swaps(), st.data())
def test_a_factory_that_fails_at_any_call_leaves_the_model_as_it_was(swap, data):
    number = data.draw(st.integers(0, len(oracle.calls(swap.targets)) - 1))
    bad = data.draw(
        st.sampled_from([Boom, None, nn.Linear, New, 3, {}, [], "x", [Leaf()], nn.relu, mx.zeros])
    )
    boom = Boom("no")

    def make(path: str, module: nn.Module) -> Any:
        if len(recorder.calls) <= number:
            return New(path, module)
        if bad is Boom:
            raise boom
        return bad

    before = Snapshot(swap.model)
    for run in (replace_layers, enter):
        recorder = Recorder(make)
        with pytest.raises((Boom, TypeError, SelectionError)) as error:
            run(swap.model, swap.patterns, recorder)
        assert len(recorder.calls) == number + 1
        assert (error.value is boom) == (bad is Boom)
        if bad is Boom:
            assert printed(recorder.calls[-1][0]) in boom.__notes__[-1]
        assert before.differences() == []


def enter(model: nn.Module, *arguments: Any) -> None:
    with swapped(model, *arguments):
        raise AssertionError("the swap was to fail")


@given(swaps())
def test_a_where_that_fails_leaves_the_model_as_it_was(swap):
    def where(path: str, module: nn.Module) -> bool:
        if path == swap.targets[-1].path:
            raise Boom
        return True

    before = Snapshot(swap.model)
    with pytest.raises(Boom):
        replace_layers(swap.model, swap.patterns, Recorder(new), where=where)
    assert before.differences() == []


@given(swaps(shared=True), st.data())
def test_a_part_of_a_tie_or_of_an_alias_is_refused_and_the_rest_is_named(swap, data):
    for_all = [p for p in swap.targets if len(oracle.siblings(swap.model, p)) > 1]
    assume(for_all)
    left_out = data.draw(st.sampled_from(for_all))
    rest = [place for place in swap.targets if place is not left_out]
    assume(not any(oracle.covers(exactly(left_out.path), place) for place in rest))
    before = Snapshot(swap.model)
    with pytest.raises(SelectionError, match=re.escape(printed(left_out.path))):
        replace_layers(swap.model, [exactly(place.path) for place in rest], Recorder(new))
    with pytest.raises(SelectionError, match=re.escape(printed(left_out.path))):
        replace_layers(swap.model, swap.patterns, Recorder(new), exclude=exactly(left_out.path))
    assert before.differences() == []


@given(swaps(shared=True), st.data())
def test_two_rules_cannot_share_a_tie_or_an_alias(swap, data):
    for_all = [p for p in swap.targets if len(oracle.siblings(swap.model, p)) > 1]
    assume(for_all)
    other = data.draw(st.sampled_from(for_all))
    assume(sum(oracle.covers(exactly(other.path), place) for place in swap.targets) == 1)
    factory = data.draw(st.sampled_from([Recorder(new), None]))
    rules: dict[Any, Any] = {exactly(other.path): factory}
    rules |= {pattern: Recorder(new) for pattern in swap.patterns if pattern not in rules}
    before = Snapshot(swap.model)
    with pytest.raises(SelectionError):
        replace_layers(swap.model, rules)
    assert before.differences() == []


@given(st.data())
def test_a_place_inside_another_one_is_refused_and_both_are_named(data):
    model = data.draw(models(shared=False))
    nested = [place for place in oracle.places(model) if place.around]
    assume(nested)
    inner = data.draw(st.sampled_from(nested))
    outer = data.draw(
        st.sampled_from([p for p in oracle.places(model) if p.location in inner.around])
    )
    before = Snapshot(model)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, [exactly(inner.path), exactly(outer.path)], wrap)
    assert printed(inner.path) in str(error.value)
    assert printed(outer.path) in str(error.value)
    assert before.differences() == []


@given(models(), st.data())
def test_a_cycle_is_refused(model, data):
    place = data.draw(one_place(model))
    above = [p.module for p in oracle.places(model) if p.location in place.around]
    dict.__setitem__(place.module, "loop", data.draw(st.sampled_from([model, *above])))
    before = Snapshot(model)
    with pytest.raises(SelectionError):
        select(model, "**")
    with pytest.raises(SelectionError):
        replace_layers(model, "**", lambda _, module: module)
    with pytest.raises(SelectionError):
        replace_layers(model, "**.loop", wrap)
    assert before.differences() == []


@given(models(), st.data())
def test_a_factory_that_would_close_a_cycle_is_refused(model, data):
    place = data.draw(one_place(model))
    above = [p.module for p in oracle.places(model) if p.location in place.around]
    end = data.draw(st.sampled_from([model, *above]))
    paths = [other.path for other in family(model, place)]
    before = Snapshot(model)
    for make in (lambda path, module: end, lambda path, module: New(path, end)):
        with pytest.raises(SelectionError):
            replace_layers(model, map(exactly, paths), make)
        assert before.differences() == []


@given(swaps(), st.sampled_from(["twins.1", "twins.*", "**.1"]))
def test_two_entries_with_one_path_are_refused_when_one_would_change(swap, pattern):
    swap.model.twins = {1: Leaf(), "1": nn.ReLU()}
    before = Snapshot(swap.model)
    with pytest.raises(SelectionError):
        replace_layers(swap.model, pattern, lambda p, m: New() if "twins" in p else m)
    assert before.differences() == []
    replace_layers(swap.model, swap.patterns, Recorder(new))
    assert before.differences(but=swap.locations) == []


# Rules


class Ruled(NamedTuple):
    """A model, rules for it, and what narrows them."""

    model: nn.Module
    rules: dict[Any, Recorder | None]
    narrowing: dict[str, Any]
    make: Any

    def decided(self) -> list[tuple[Place, Recorder | None]]:
        return [
            (place, self.rules[oracle.deciding(self.rules, place)])
            for place in oracle.chosen_by_rules(self.model, self.rules, **self.narrowing)
        ]

    def changed(self) -> list[Place]:
        return [place for place, recorder in self.decided() if recorder is not None]

    def objections(self) -> list[str]:
        changing = {place.path: recorder for place, recorder in self.decided() if recorder}
        kept = oracle.left_alone(self.model, self.rules, self.narrowing["exclude"])
        return oracle.objections(self.model, changing) + lost(kept, self.changed(), self.make)


@st.composite
def mappings(draw: st.DrawFn) -> Ruled:
    selection = draw(selections())
    make = draw(st.sampled_from([new, wrap]))
    rules: dict[Any, Recorder | None] = {}
    waiting = list(selection.patterns)
    while waiting:
        key = waiting.pop(0)
        if draw(st.sampled_from([False, False, True])):
            key = (key, waiting.pop(0)) if waiting else (key,)
        rules[key] = Recorder(make) if draw(st.sampled_from([True, True, False])) else None
    return Ruled(selection.model, rules, selection.narrowing, make)


@given(mappings())
def test_the_first_rule_that_matches_decides(ruled):
    model, rules, narrowing, _ = ruled
    decided, changed, objections = ruled.decided(), ruled.changed(), ruled.objections()
    kept = oracle.left_alone(model, rules, narrowing["exclude"])
    calls = {id(recorder): oracle.calls(of_one(recorder, decided)) for recorder in rules.values()}
    event("refused" if objections else "swapped" if changed else "nothing to change")
    before = Snapshot(model)
    both: tuple[Any, ...] = (swapped, replace_layers)
    for swap in both:
        if objections:
            with pytest.raises(SelectionError):
                swap(model, rules, **narrowing, strict=False).__enter__()
            assert before.differences() == []
            continue
        result: Any = swap(model, rules, **narrowing, strict=False)
        with contextlib.nullcontext(result) if swap is replace_layers else result as replacement:
            assert holds(replacement, changed)
            assert before.differences(but=locations(changed)) == []
            now = {id(place.module) for place in oracle.places(model)}
            assert [place.path for place in kept if id(place.module) not in now] == []
        for recorder in filter(None, rules.values()):
            assert called(recorder, calls[id(recorder)])
            recorder.calls.clear()
        assert swap is replace_layers or before.differences() == []


def of_one(recorder: Recorder | None, decided: list[tuple[Place, Recorder | None]]) -> list[Place]:
    return [place for place, decided_by in decided if decided_by is recorder]


@given(mappings())
def test_strict_mode_complains_exactly_when_a_rule_did_nothing(ruled):
    model, rules, narrowing, _ = ruled
    did_nothing = oracle.idle_rules(model, rules, **narrowing)
    event(f"complains: {did_nothing}")
    before = Snapshot(model)
    if did_nothing:
        with pytest.raises(NoMatchError):
            replace_layers(model, rules, **narrowing)
        assert before.differences() == []
    else:
        with contextlib.suppress(SelectionError):
            replace_layers(model, rules, **narrowing)


@given(mappings(), st.sampled_from(CLASSES))
def test_a_function_that_asks_for_a_class_is_the_same_as_the_class(ruled, classes):
    def is_one(path: str, module: nn.Module) -> bool:
        return isinstance(module, classes)

    assert says(ruled, classes) == says(ruled, is_one)


def says(ruled: Ruled, where: Any) -> str:
    """The error that strict rules end with, without the name of what narrows them."""
    rules = dict.fromkeys(ruled.rules, lambda path, module: module)
    rules |= {key: None for key, recorder in ruled.rules.items() if recorder is None}
    try:
        replace_layers(ruled.model, rules, where=where, exclude=ruled.narrowing["exclude"])
    except (NoMatchError, SelectionError) as error:
        return re.sub(r"where=(\(.*?\)|\w+)", "where", str(error))
    return ""


@given(swaps(), st.data())
def test_the_factories_of_several_rules_are_called_in_definition_order(swap, data):
    log: list[tuple[str, nn.Module]] = []

    def make(path: str, module: nn.Module) -> nn.Module:
        log.append((path, module))
        return New(path)

    families = {
        "|".join(sorted(re.escape(one.path) for one in family(swap.model, place)))
        for place in swap.targets
    }
    order = data.draw(st.permutations(sorted(families)))
    replace_layers(swap.model, {re.compile(paths): lambda *given: make(*given) for paths in order})
    assert [(path, id(module)) for path, module in log] == [
        (place.path, id(place.module)) for place in oracle.calls(swap.targets)
    ]


# By hand


@given(swaps())
def test_select_partial_modules_and_update_modules_are_replace_layers_by_hand(swap):
    before = Snapshot(swap.model)
    originals = select(swap.model, swap.patterns)
    replacement = replace_layers(swap.model, swap.patterns, wrap)
    after = Snapshot(swap.model)
    swap.model.update_modules(partial_modules(swap.model, originals))
    assert before.differences() == []
    swap.model.update_modules(partial_modules(swap.model, dict(replacement)))
    assert after.differences() == []


@given(swaps(), st.data())
def test_partial_modules_holds_what_is_needed_and_no_more(swap, data):
    wanted = data.draw(st.lists(st.sampled_from(swap.targets), min_size=1, unique_by=id))
    kind = data.draw(st.sampled_from([New, nn.ReLU]))
    by_location = {place.location: kind() for place in wanted}
    modules = {place.path: by_location[place.location] for place in wanted}
    before = Snapshot(swap.model)
    partial = partial_modules(swap.model, modules)
    assert before.differences() == []
    assert oracle.partial_faults(swap.model, partial, by_location) == []
    swap.model.update_modules(partial)
    assert all(place.now() is modules[place.path] for place in wanted)
    assert before.differences(but=by_location) == []


# For a while


@given(swaps(), st.sampled_from([None, Boom]))
def test_swapped_puts_everything_back(swap, error):
    before = Snapshot(swap.model)
    with (
        pytest.raises(error) if error else contextlib.nullcontext(),
        swapped(swap.model, swap.patterns, wrap) as replacement,
    ):
        assert holds(replacement, swap.targets)
        assert before.differences(but=swap.locations) == []
        if error:
            raise error
    assert before.differences() == []


@given(swaps(), st.data(), st.sampled_from([Boom, SelectionError]))
def test_swapped_does_not_undo_what_someone_else_changed(swap, data, error):
    victim = data.draw(st.sampled_from(swap.targets))
    before, intruder = Snapshot(swap.model), nn.ReLU()

    def swap_and_interfere() -> None:
        with swapped(swap.model, swap.patterns, wrap):
            victim.put(intruder)
            if error is Boom:
                raise Boom

    with pytest.raises(error) as caught:
        swap_and_interfere()
    paths = [place.path for place in swap.targets if place.location == victim.location]
    assert error is Boom or any(printed(path) in str(caught.value) for path in paths)
    assert victim.now() is intruder
    victim.put(victim.module)  # everything else was put back
    assert before.differences() == []


@given(swaps())
def test_a_mode_set_inside_swapped_stays_with_the_layers_that_were_in_the_model_then(swap):
    modes = [(place.module, place.module.training) for place in swap.targets]
    with swapped(swap.model, swap.patterns, Recorder(new)):
        inside = {id(module): module for module in swap.model.modules()}
        swap.model.eval()
    assert not any(module.training for module in inside.values())
    assert all(module.training == mode for module, mode in modes if id(module) not in inside)
