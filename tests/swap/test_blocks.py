"""Blocks that end in any order: the model has its own layers back, and who is told what."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import permutations, product
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from interrupting import interrupt_at
from models import Holder, around, identity
from oracle import Snapshot
from refusals import modified
from running import IDS, Block, Model, nothing

from mlx_modswap import (
    Replacement,
    SelectionError,
    Wrapper,
    capture,
    observe,
    patch,
    replace_layers,
    swapped,
)
from mlx_modswap._swap import undo


@pytest.fixture(autouse=True)
def _all_blocks_end():
    yield
    assert undo._open == []


def end(manager: AbstractContextManager[Any]) -> str | None:
    """End a block; what it says, if it raises."""
    try:
        manager.__exit__(None, None, None)
    except SelectionError as error:
        return str(error)
    return None


def covered(path: str) -> str:
    return (
        f"'{path}' was changed again by a block that was entered after this one and is still "
        "open; end blocks in the reverse order, or use one block around both; the model has its "
        "own layers back once the last of these blocks has ended"
    )


def lost(path: str) -> str:
    return (
        f"'{path}' is no longer at its path, because a module that contains it was replaced "
        "inside the block; its own layer was put back inside that module; if another block "
        "replaced it, end blocks in the reverse order, or use one block around both"
    )


# All orders of three blocks

ADAPTER = nn.Tanh()
KINDS: dict[str, Callable[[Model], AbstractContextManager[Any]]] = {
    "a new layer": lambda model: swapped(model, "layers[0]", identity),
    "a layer around it": lambda model: swapped(model, "layers[0]", around),
    "an adapter that comes back": lambda model: swapped(
        model, "layers[0]", lambda path, layer: ADAPTER
    ),
    "capture": lambda model: capture(model, "layers[0]", strict=False),
}
HOOKS: dict[str, Callable[[Model], AbstractContextManager[Any]]] = {
    "capture": KINDS["capture"],
    "observe": lambda model: observe(model, "layers[0]", nothing, strict=False),
    "patch": lambda model: patch(model, "layers[0]", lambda path, output: 2 * output, strict=False),
}
ALL_OF_THREE = [*product(KINDS.values(), repeat=3), *permutations(HOOKS.values())]


@pytest.mark.parametrize("order", [*permutations(range(3))], ids=str)
def test_three_blocks_on_one_place_end_in_any_order(order):
    model = Model()
    before, expected = Snapshot(model), model(IDS)
    for kinds in ALL_OF_THREE:
        enter_and_end(model, kinds, order)
        assert before.differences() == [], kinds
    assert mx.array_equal(model(IDS), expected)


def enter_and_end(model: Model, kinds: Sequence[Any], order: tuple[int, ...]) -> None:
    blocks = [kind(model) for kind in kinds]
    found: list[nn.Module] = []  # what each block found there
    recorded: list[Any] = []
    for block in blocks:
        found.append(model.layers[0])
        recorded.append(block.__enter__())
    # An adapter that is there already changes nothing.
    changed = [new is not old for old, new in zip(found, [*found[1:], model.layers[0]])]
    still_open = [number for number in range(3) if changed[number]]
    for number in order:
        later = [other for other in still_open if other > number]
        said = end(blocks[number])
        assert said == (covered("layers.0") if changed[number] and later else None), kinds
        if number in still_open:
            still_open.remove(number)
        before_a_call = str(recorded[number])
        model.layers[0](mx.ones((1, 4)))
        assert str(recorded[number]) == before_a_call, kinds


INSIDE = {
    "hooked": lambda model, pattern: capture(model, pattern, strict=False),
    "wrapped": lambda model, pattern: swap_inside(
        model, pattern, lambda path, layer: Wrapper(layer)
    ),
    "replaced": lambda model, pattern: swap_inside(model, pattern, around),
}


def swap_inside(model: Model, pattern: str, factory: Any) -> AbstractContextManager[Any]:
    exclude = "layers.0" if pattern == "**.0" else ()
    return swapped(model, pattern, factory, exclude=exclude, strict=False)


@pytest.mark.parametrize("patterns", [*permutations(["layers[0]", "layers[0].mlp", "**.0"])])
@pytest.mark.parametrize("kind", INSIDE.values(), ids=INSIDE)
def test_three_blocks_inside_one_another_end_in_any_order(kind, patterns):
    model = Model()
    before = Snapshot(model)
    new_modules: list[weakref.ref[nn.Module]] = []
    for order in permutations(range(3)):
        blocks: list[Any] = []
        for pattern in patterns:
            blocks.append(kind(model, pattern))
            entered = blocks[-1].__enter__()
            if isinstance(entered, Replacement):
                new_modules += map(weakref.ref, entered.values())
            del entered
        for number in order:
            end(blocks[number])
            blocks[number] = None
        assert before.differences() == []
    gc.collect()
    assert [new() for new in new_modules] == [None] * len(new_modules)


# What is said, in a table: what each block changes, the order in which they end, and what they say

SAID: dict[str, tuple[list[Any], list[int], list[str | None]]] = {
    "in the reverse order": (
        [("layers[0]", identity), ("layers[0]", identity)],
        [1, 0],
        [None, None],
    ),
    "the first ends first": (
        [("layers[0]", identity), ("layers[0]", identity)],
        [0, 1],
        [covered("layers.0"), None],
    ),
    "one place of several is the same": (
        [("layers.*", identity), ("layers[1]", identity)],
        [0, 1],
        [covered("layers.1"), None],
    ),
    "different places": (
        [("layers[0]", identity), ("layers[1]", identity)],
        [0, 1],
        [None, None],
    ),
    "the middle one of three": (
        [("layers[0]", identity), ("layers[0]", around), ("layers[0]", identity)],
        [1, 0, 2],
        [covered("layers.0"), covered("layers.0"), None],
    ),
    "inside another, in the reverse order": (
        [("layers[0]", around), ("layers[0].inner.mlp", identity)],
        [1, 0],
        [None, None],
    ),
    "inside what an outer block takes away": (
        [("layers[0]", around), ("layers[0].inner", identity)],
        [0, 1],
        [None, lost("layers.0.inner")],
    ),
    "inside what a later block has taken away": (
        [("layers[0].mlp", identity), ("layers[0]", identity)],
        [0, 1],
        [lost("layers.0.mlp"), None],
    ),
    "two levels inside": (
        [("layers[0].mlp", around), ("layers[0]", identity), ("layers[0]", identity)],
        [0, 1, 2],
        [lost("layers.0.mlp"), covered("layers.0"), None],
    ),
    "inside a wrapper, which takes nothing away": (
        [("layers[0].mlp", identity), ("layers[0]", lambda path, layer: Wrapper(layer))],
        [0, 1],
        [None, None],
    ),
    "inside what had a wrapper": (
        [("layers[0]", lambda path, layer: Wrapper(layer)), ("layers[0].mlp", identity)],
        [0, 1],
        [None, None],
    ),
}


@pytest.mark.parametrize(("swaps", "order", "messages"), SAID.values(), ids=SAID)
def test_a_block_says_what_its_user_did_not_mean(swaps, order, messages):
    model = Model()
    before = Snapshot(model)
    blocks = [swapped(model, pattern, factory) for pattern, factory in swaps]
    for block in blocks:
        block.__enter__()
    assert [end(blocks[number]) for number in order] == messages
    assert before.differences() == []


def test_two_streams_on_one_model_that_alternate():
    """As two token streams do that are generators with a block each."""
    model = Model()
    before = Snapshot(model)

    def stream(factory: Any, length: int) -> Iterator[mx.array]:
        with swapped(model, "layers.*.mlp", factory):
            for _ in range(length):
                yield model(IDS)

    first, second = stream(identity, 2), stream(around, 2)
    for _ in range(2):
        next(first)
        next(second)
    with pytest.raises(SelectionError, match=r"'layers\.0\.mlp' was changed again by a block"):
        next(first)
    assert [type(layer.mlp) for layer in model.layers] == [Holder] * 3
    with pytest.raises(StopIteration):
        next(second)
    assert before.differences() == []


def test_a_stream_that_is_closed_leaves_nothing():
    model = Model()
    before = Snapshot(model)

    def stream() -> Generator[mx.array, None, None]:
        with capture(model, "layers.*.mlp"):
            while True:
                yield model(IDS)

    first, second = stream(), stream()
    next(first)
    next(second)
    first.close()
    next(second)
    second.close()
    assert before.differences() == []


def test_an_error_in_a_block_that_ends_too_early_wins():
    model = Model()
    before = Snapshot(model)
    later = swapped(model, "layers[0]", identity)

    def fail() -> None:
        with swapped(model, "layers[0]", around):
            later.__enter__()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        fail()
    assert caught.value.__notes__ == [covered("layers.0")]
    assert end(later) is None
    assert before.differences() == []


# Changes by hand


def test_what_was_modified_by_hand_under_a_later_block_is_not_put_back():
    model = Model()
    first, second = swapped(model, "layers.*", around), swapped(model, "layers[0]", identity)
    first.__enter__()
    second.__enter__()
    model.layers[1] = by_hand = nn.Tanh()

    assert end(first) == modified("layers.1")
    assert end(second) is None
    assert type(model.layers[0]) is Block
    assert model.layers[1] is by_hand


def test_what_was_modified_by_hand_is_seen_by_all_blocks_on_that_place():
    model = Model()
    first, second = swapped(model, "layers[0]", around), swapped(model, "layers[0]", identity)
    first.__enter__()
    second.__enter__()
    model.layers[0] = by_hand = nn.Tanh()
    said = modified("layers.0")

    assert [end(first), end(second)] == [covered("layers.0"), said]
    assert model.layers[0] is by_hand


def test_an_inner_block_that_was_modified_puts_back_the_rest_and_the_outer_one_its_own():
    model = Model()
    layer = model.layers[0]
    outer, inner = swapped(model, "layers[0]", around), swapped(model, "layers.*", identity)
    outer.__enter__()
    inner.__enter__()
    model.layers[1] = by_hand = nn.Tanh()

    assert end(inner) == modified("layers.1")
    assert end(outer) is None
    assert model.layers[0] is layer
    assert model.layers[1] is by_hand


def test_a_list_that_got_shorter_is_a_change_by_hand_among_other_blocks_too():
    model = Model()
    first, second = swapped(model, "layers[2]", identity), swapped(model, "layers[0]", identity)
    first.__enter__()
    second.__enter__()
    model.layers.pop()

    assert end(first) == modified("layers.2")
    assert end(second) is None


def test_a_wrapper_whose_layer_was_exchanged_by_hand_is_seen_among_other_blocks_too():
    model = Model()
    replace_layers(model, "layers[0]", lambda path, layer: Wrapper(layer))
    first, second = (
        swapped(model, "layers.*.mlp", identity),
        swapped(model, "layers[1].mlp", identity),
    )
    first.__enter__()
    second.__enter__()
    model.layers[0]["(wrapped)"] = Block()

    assert end(second) is None
    assert end(first) == lost("layers.0.mlp")


def test_a_module_far_around_a_place_that_was_exchanged_by_hand_is_seen_among_other_blocks():
    model = Model()
    first = swapped(model, "layers[0].mlp.layers[0]", identity)
    second = swapped(model, "layers[1].mlp", identity)
    for block in (first, second):
        block.__enter__()
    model.layers[0] = Block()

    assert end(first) == lost("layers.0.mlp.layers.0")
    assert end(second) is None


# When putting back fails


def test_an_interrupt_while_a_block_is_undone_out_of_order_does_not_stop_it():
    writes: list[str] = []

    class Interrupted(nn.Module):
        def __setitem__(self, key: str, value: Any) -> None:
            writes.append(key)
            if len(writes) == 2:  # the first is the swap
                raise KeyboardInterrupt
            dict.__setitem__(self, key, value)

    model, inner = Model(), Interrupted()
    dict.__setitem__(inner, "act", nn.ReLU())
    model.inner = inner
    before = Snapshot(model)
    first = swapped(model, ["layers.*", "inner.act"], identity)
    second = swapped(model, "layers[1]", around)
    first.__enter__()
    second.__enter__()
    with pytest.raises(KeyboardInterrupt) as caught:
        first.__exit__(None, None, None)
    assert caught.value.__notes__ == [covered("layers.1")]
    assert end(second) is None
    assert before.differences() == []


def in_blocks(frame: FrameType) -> bool:
    own = frame.f_code.co_name not in ("until_the_end", "end")
    return frame.f_code.co_filename == undo.__file__ and own


def test_an_interrupt_anywhere_while_a_block_begins_leaves_nothing_behind():
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        model = Model()
        before = Snapshot(model)
        block = swapped(model, "layers.*", identity)
        was_interrupted = interrupt_at(line, block.__enter__, in_blocks)
        assert was_interrupted or end(block) is None
        assert before.differences() == []
    assert line > 2


def test_an_interrupt_anywhere_while_a_block_ends_out_of_order_does_not_stop_it():
    line, was_interrupted = 0, True
    while was_interrupted:
        line += 1
        model = Model()
        before = Snapshot(model)
        first, second = swapped(model, "layers.*", identity), swapped(model, "layers[1]", around)
        first.__enter__()
        second.__enter__()
        was_interrupted = interrupt_at(line, lambda block=first: end(block), in_blocks)
        assert end(second) is None
        assert before.differences() == []
    assert line > 20


def test_when_a_module_refuses_to_be_put_back_out_of_order_none_is():
    class Lockable(nn.Module):
        locked = False

        def __setitem__(self, key: str, value: Any) -> None:
            if self.locked:
                raise KeyError("locked")
            dict.__setitem__(self, key, value)

    model, inner = Model(), Lockable()
    inner.act = nn.ReLU()
    model.inner = inner
    first = swapped(model, ["layers.*", "inner.act"], identity)
    second = swapped(model, "layers[1]", around)
    first.__enter__()
    second.__enter__()
    Lockable.locked = True

    assert end(first) == (modified("inner.act"))
    assert end(second) is None
    assert [type(layer) for layer in model.layers] == [Block] * 3
