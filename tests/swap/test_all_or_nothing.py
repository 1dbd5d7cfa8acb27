"""A swap that is refused leaves the model as it was, and the new modules that it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from interrupting import interrupt_at
from models import Block, Model, build, fresh
from oracle import Snapshot
from refusals import refuses

from mlx_modswap import SelectionError, Wrapper, replace_layers, swapped


class New(nn.Module):
    """A new module with others inside, one of them in another mode."""

    def __init__(self, *held: Any):
        super().__init__()
        self.held = list(held)
        self.inner = {"dropout": nn.Dropout(), "norm": nn.LayerNorm(2).eval()}


class Maker:
    """A factory that keeps what it has made, and does something at one of its calls."""

    def __init__(self, at: str = "", do: Callable[[Any], Any] = lambda module: None):
        self.at, self.do = at, do
        self.made: list[nn.Module] = []
        self.before: list[Snapshot] = []

    def __call__(self, path: str, module: nn.Module) -> nn.Module:
        new = New()
        self.made.append(new)
        self.before.append(Snapshot(new))
        result = self.do(module) if path == self.at else None
        return new if result is None else result

    def differences(self) -> list[str]:
        return [text for snapshot in self.before for text in snapshot.differences()]


def fail(module: nn.Module) -> Any:
    raise RuntimeError("no memory left")


def not_a_module(module: nn.Module) -> Any:
    return 3


class Locked(nn.Module):
    """A module whose entries cannot be set."""

    error: type[BaseException] = KeyError

    def __setitem__(self, key: str, value: Any) -> None:
        raise self.error("locked")


class Interrupted(Locked):
    error = KeyboardInterrupt


class Deaf(nn.Module):
    """A module that silently keeps its entries."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


def locked(kind: type[nn.Module], entry: nn.Module) -> Any:
    module = kind()
    dict.__setitem__(module, "act", entry)
    return module


def model_with(kind: type[nn.Module] = nn.Module) -> Any:
    """A model with a tie, and with a module of a kind among the others."""
    model: Any = Model()
    model.tied = model.embed
    model.odd = locked(kind, nn.ReLU())
    model.last = nn.ReLU()
    return model


AROUND = ["layers.*", "odd.act", "last"]
REFUSED: dict[str, tuple[Any, ...]] = {
    # kind of module in the model, what to swap, options, what the factory does, error
    "a factory that raises": (Deaf, "layers.*", {}, ("layers.2", fail), RuntimeError),
    "a factory that raises at once": (Deaf, "layers.*", {}, ("layers.0", fail), RuntimeError),
    "a result that is not a module": (
        *(Deaf, "layers.*", {}, ("layers.2", not_a_module)),
        TypeError,
    ),
    "half of a tie": (Deaf, ["layers.*", "embed"], {}, (), SelectionError),
    "a place inside another": (Deaf, ["layers.*", "layers.*.norm"], {}, (), SelectionError),
    "a place to be left alone": (
        *(Deaf, ["layers.*", "layers.*.norm"], {"exclude": "**.norm"}, ()),
        SelectionError,
    ),
    "an update that fails": (Locked, AROUND, {}, (), SelectionError),
    "an update that is interrupted": (Interrupted, AROUND, {}, (), KeyboardInterrupt),
    "an update that does nothing": (Deaf, AROUND, {}, (), SelectionError),
}


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("swap", [replace_layers, swapped])
@pytest.mark.parametrize(
    ("kind", "pattern", "options", "doing", "error"), REFUSED.values(), ids=REFUSED
)
def test_model_and_new_modules_stay(kind, pattern, options, doing, error, swap, mode):
    model = model_with(kind).train(mode)
    make = Maker(*doing)
    before = Snapshot(model)
    with pytest.raises(error):
        swap(model, pattern, make, **options).__enter__()
    assert before.differences() == []
    assert make.made
    assert make.differences() == []


def test_a_new_module_without_a_mode_is_in_training():
    new = nn.Tanh()
    del new._training  # as in a class that does not call `super().__init__()`
    refuses(model_with(Locked).eval(), AROUND, lambda path, module: new)
    assert new.training


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Locked, "MLX's update_modules failed, and nothing was changed: 'locked'"),
        (
            Deaf,
            "MLX's update_modules failed, and nothing was changed: "
            "MLX's update_modules left 'odd.act' as it was",
        ),
    ],
)
def test_an_update_that_fails_says_so(kind, message):
    assert refuses(model_with(kind), AROUND, fresh) == message


def test_a_place_that_cannot_be_put_back_is_named():
    class Once(nn.Module):
        def __setitem__(self, key, value):
            if dict.__contains__(self, "done"):
                raise KeyError("locked")
            dict.__setitem__(self, key, value)
            dict.__setitem__(self, "done", mx.zeros(1))

    once = Once()
    dict.update(once, a=nn.ReLU(), b=nn.ReLU())
    with pytest.raises(SelectionError) as caught:
        replace_layers(build(once=once), "once.*", fresh)
    assert str(caught.value) == (
        "MLX's update_modules failed, and so did putting 'once.a' back: 'locked'"
    )


class Indexed(nn.Module):
    """A module that looks like a list, through which MLX cannot reach its children."""

    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(4, 4)]

    def __getitem__(self, index):
        return self.layers[index]


def test_a_place_that_update_modules_cannot_reach():
    model = nn.Sequential(nn.Linear(4, 4), Indexed())
    assert refuses(model, "**", fresh, where=nn.Linear) == (
        "MLX's update_modules failed, and nothing was changed: "
        "list indices must be integers or slices, not str"
    )


# ---------------------------------------------------------------- factories that edit the model

BY_HAND = nn.ReLU()


def set_mlp(model: Any) -> None:
    model.layers[0].mlp = BY_HAND


def set_block(model: Any) -> None:
    model.layers[1] = Block()


def set_list(model: Any) -> None:
    model.layers = [Block() for _ in range(3)]


@pytest.mark.parametrize(
    ("edit", "named"),
    [(set_mlp, "layers.0.mlp"), (set_block, "layers.1.mlp"), (set_list, "layers.0.mlp")],
)
def test_a_place_that_a_factory_edits_is_named(edit, named):
    model: Any = Model().eval()
    kept = [model.embed, *model.layers]
    make = Maker("embed", lambda module: edit(model))
    with pytest.raises(SelectionError) as error:
        replace_layers(model, ["embed", "layers.*.mlp"], make)
    assert str(error.value) == (
        f"'{named}' was modified while the factories ran; the swap was not applied"
    )
    assert model.embed is kept[0]
    assert [type(layer.mlp) for layer in (*kept[2:], *model.layers[1:])] == [nn.Linear] * 4
    assert (model.layers[0].mlp is BY_HAND) == (edit is set_mlp)
    assert make.differences() == []


def test_a_cycle_leaves_the_new_modules():
    model = Model().eval()
    make = Maker("layers.2", lambda module: New(model))
    with pytest.raises(SelectionError, match="the model contains a cycle"):
        replace_layers(model, "layers.*", make)
    assert make.differences() == []


# ---------------------------------------------------------------- after a refusal


def test_a_refused_module_can_be_used_in_the_next_swap():
    model: Any = model_with().eval()
    new: Any = New()
    for pattern in ("embed", ["layers.0", "layers.0.norm"]):
        with pytest.raises(SelectionError):
            replace_layers(model, pattern, lambda path, module: new)
    assert {module.training for module in new.modules()} == {True, False}
    replace_layers(model, "last", lambda path, module: new)
    assert not any(module.training for module in new.modules())


def test_a_layer_in_a_new_wrapper_keeps_its_mode():
    model = model_with(Locked)
    model.last.eval()
    before = Snapshot(model)
    with pytest.raises(SelectionError):
        replace_layers(model, ["layers.*", "odd.act"], lambda path, module: Wrapper(model.last))
    assert before.differences() == []
    replace_layers(model, "layers.*", lambda path, module: Wrapper(module))
    assert not model.last.training


def test_an_interrupt_at_any_line_leaves_all_or_nothing():
    """New modules have the mode of the model if they are in it, and their own if not."""
    outcomes = set()
    for line in range(1, 10_000, 5):
        model: Any = Model().eval()
        before, make = Snapshot(model), Maker()
        interrupted = interrupt_at(line, lambda m=model, f=make: replace_layers(m, "layers.*", f))
        is_in = any(layer is make.made[0] for layer in model.layers if make.made)
        modes = {module.training for new in make.made for module in new.modules()}
        if make.made:
            assert modes == ({False} if is_in else {True, False})
        assert len(before.differences()) == (3 if is_in else 0)
        outcomes.add(is_in)
        if not interrupted:
            break
    assert outcomes == {True, False}
