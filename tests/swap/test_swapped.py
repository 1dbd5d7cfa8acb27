"""`swapped` puts the identical layers back; a place changed by hand meanwhile is left and named."""

from __future__ import annotations

from typing import Any

import mlx.nn as nn
import pytest
from models import Holder, Model, around, build, fresh
from oracle import Snapshot
from refusals import modified

from mlx_modswap import NoMatchError, Replacement, SelectionError, swapped


def test_the_identical_modules_are_put_back():
    model = Model()
    before = Snapshot(model)
    with swapped(model, "layers.*.mlp", fresh) as report:
        assert isinstance(report, Replacement)
        assert all(type(layer.mlp) is Holder for layer in model.layers)
    assert before.differences() == []


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_they_are_put_back_after_an_error(error):
    model = Model()
    before = Snapshot(model)
    with pytest.raises(error), swapped(model, "embed", fresh):
        raise error
    assert before.differences() == []


def test_a_swap_inside_a_swap():
    model = Model()
    before = Snapshot(model)
    with swapped(model, "layers.0.mlp", around), swapped(model, "layers.0.mlp.inner", fresh):
        assert type(model.layers[0].mlp.inner) is Holder
    assert before.differences() == []


def test_a_mode_set_inside_does_not_reach_the_old_layers():
    model = Model()
    original = model.embed
    with swapped(model, "embed", fresh):
        model.eval()
    assert model.embed is original
    assert model.embed.training
    assert not model.layers[0].training


def test_a_swap_that_is_refused_does_not_run_the_body():
    with pytest.raises(NoMatchError), swapped(Model(), "nothing", fresh):
        raise AssertionError


# ---------------------------------------------------------------- changes by hand


def test_a_place_changed_by_hand_is_left_and_named():
    model = Model()
    with pytest.raises(SelectionError) as caught, swapped(model, "layers.*.mlp", fresh):
        model.layers[1].mlp = nn.ReLU()
    assert str(caught.value) == modified("layers.1.mlp")
    assert [type(layer.mlp) for layer in model.layers] == [nn.Linear, nn.ReLU, nn.Linear]


def test_a_container_changed_by_hand_is_left():
    model = Model()
    moved = "is no longer at its path, because a module that contains it was replaced"
    with pytest.raises(SelectionError, match=moved), swapped(model, "layers.*.mlp", fresh):
        model.layers = list(model.layers)
    assert [type(layer.mlp) for layer in model.layers] == [nn.Linear] * 3
    with pytest.raises(SelectionError, match=moved), swapped(model, "layers[-1].mlp", around):
        model.layers.pop()


def test_an_error_in_the_body_gets_a_note():
    model = Model()

    def spoil() -> None:
        with swapped(model, "embed", fresh):
            model.embed = nn.ReLU()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        spoil()
    assert caught.value.__notes__ == [modified("embed")]


# ---------------------------------------------------------------- when putting back fails


class Lockable(nn.Module):
    """A module whose entries cannot be set once it is locked."""

    locked = False

    def __setitem__(self, key: str, value: Any) -> None:
        if self.locked:
            raise KeyError("locked")
        dict.__setitem__(self, key, value)


def test_a_place_that_cannot_be_put_back_is_left_and_named():
    inner = Lockable()
    inner.act = nn.ReLU()
    model = build(first=nn.ReLU(), inner=inner)
    with pytest.raises(SelectionError) as caught, swapped(model, ["first", "inner.act"], fresh):
        vars(inner)["locked"] = True
    assert str(caught.value) == modified("inner.act")
    assert type(model.first) is nn.ReLU


def test_an_interrupt_does_not_stop_putting_back():
    writes: list[str] = []

    class Interrupted(nn.Module):
        def __setitem__(self, key: str, value: Any) -> None:
            writes.append(key)
            if len(writes) == 2:  # the first is the swap
                raise KeyboardInterrupt
            dict.__setitem__(self, key, value)

    inner = Interrupted()
    dict.__setitem__(inner, "act", nn.ReLU())
    model = build(first=build(act=nn.ReLU()), inner=inner)
    before = Snapshot(model)
    with pytest.raises(KeyboardInterrupt), swapped(model, ["first.act", "inner.act"], fresh):
        pass
    assert before.differences() == []
