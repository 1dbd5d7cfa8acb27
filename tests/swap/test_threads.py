"""Swaps in different models at once: there is no state that they share."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from oracle import Snapshot

from mlx_modswap import NoMatchError, SelectionError, replace_layers, select, swapped

ROUNDS = 60


class Mark(nn.Module):
    """A module that says who made it."""

    def __init__(self, owner: str, path: str):
        super().__init__()
        self.weight = mx.zeros(1)
        self.made_by = owner, path


class Tree(nn.Module):
    def __init__(self, depth: int = 2):
        super().__init__()
        self.act = nn.ReLU()
        self.parts = [Tree(depth - 1) for _ in range(3)] if depth else []
        self.named = {"1": nn.Tanh(), "x": nn.Linear(1, 1)}


@pytest.fixture
def _fast_switches():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def maker(owner: str) -> Callable[[str, nn.Module], nn.Module]:
    return lambda path, module: Mark(owner, path)


def marks(model: nn.Module) -> set[tuple[str, str]]:
    return {module.made_by for module in model.modules() if isinstance(module, Mark)}


def work(owner: str, model: nn.Module, start: threading.Barrier) -> None:
    """Swap, fail and undo, and look after every step that the model is what it should be."""
    start.wait()
    before = Snapshot(model)
    paths = list(select(model, "**.{act,x}"))
    for _ in range(ROUNDS):
        with swapped(model, "**.{act,x}", maker(owner)) as report:
            assert list(report) == paths
            assert marks(model) == {(owner, path) for path in paths}
        with pytest.raises(NoMatchError):
            replace_layers(model, f"only_in_{owner}", maker(owner))
        with pytest.raises(SelectionError):
            replace_layers(model, ["parts.0", "parts.0.act"], maker(owner))
        with pytest.raises(ZeroDivisionError):
            replace_layers(model, "**.act", failing_at("parts.2.act"))
        first, second = (swapped(model, "**.act", maker(owner)) for _ in range(2))
        first.__enter__()
        second.__enter__()
        with pytest.raises(SelectionError, match="by a block that was entered after this one"):
            first.__exit__(None, None, None)
        second.__exit__(None, None, None)
        assert before.differences() == []
    replace_layers(model, "**", maker(owner), where=nn.Tanh)
    assert marks(model) == {(owner, path) for path in select(model, "**.1", where=Mark)}


def failing_at(place: str) -> Callable[[str, nn.Module], nn.Module]:
    def factory(path: str, module: nn.Module) -> nn.Module:
        if path == place:
            raise ZeroDivisionError
        return Mark("nobody", path)

    return factory


@pytest.mark.usefixtures("_fast_switches")
def test_threads_with_a_model_each_do_not_disturb_each_other():
    owners = ["a", "b", "c"]
    start = threading.Barrier(len(owners), timeout=30)
    with ThreadPoolExecutor(len(owners)) as pool:
        runs = [pool.submit(work, owner, Tree(), start) for owner in owners]
        assert [run.result(timeout=60) for run in runs] == [None] * len(owners)


def test_a_swap_may_run_to_its_end_in_one_thread_while_a_factory_waits_in_another():
    first, second = Tree(), Tree()
    inside, done = threading.Event(), threading.Event()

    def waiting(path: str, module: nn.Module) -> nn.Module:
        inside.set()
        assert done.wait(30)
        return Mark("first", path)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(replace_layers, first, "**.act", waiting)
        assert inside.wait(30)
        report = replace_layers(second, "**.x", maker("second"))
        done.set()
        assert list(run.result(timeout=30)) == list(select(first, "**.act"))
    assert marks(first) == {("first", path) for path in select(first, "**.act")}
    assert marks(second) == {("second", path) for path in report}


def test_blocks_in_two_threads_end_in_any_order():
    first, second = Tree(), Tree()
    snapshots = Snapshot(first), Snapshot(second)
    entered, left = threading.Event(), threading.Event()

    def stay() -> None:
        with swapped(first, "**.act", maker("first")):
            entered.set()
            assert left.wait(30)

    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(stay)
        assert entered.wait(30)
        with swapped(second, "**.act", maker("second")):
            assert {owner for owner, _ in marks(first)} == {"first"}
            assert {owner for owner, _ in marks(second)} == {"second"}
        left.set()
        run.result(timeout=30)
    assert [snapshot.differences() for snapshot in snapshots] == [[], []]


def test_a_factory_may_swap_in_another_model_itself():
    outer, inner = Tree(), Tree()

    def factory(path: str, module: nn.Module) -> nn.Module:
        replace_layers(inner, path, maker("inner"))
        return Mark("outer", path)

    paths: Any = list(replace_layers(outer, "**.act", factory))
    assert marks(outer) == {("outer", path) for path in paths}
    assert marks(inner) == {("inner", path) for path in paths}
