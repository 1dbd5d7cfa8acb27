"""A swap that is refused leaves as they were: the model, and the new modules it was given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import pytest
from interrupting import interrupt_at
from oracle import Snapshot

from mlx_modswap import SelectionError, Wrapper, replace_layers, swapped


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(2, 2)
        self.norm = nn.LayerNorm(2)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = self.tied = nn.Embedding(2, 2)
        self.layers: list[Any] = [Block() for _ in range(3)]
        self.head = nn.Linear(2, 2)


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
    """Takes nothing in."""

    error: type[BaseException] = KeyError

    def __setitem__(self, key: str, value: Any) -> None:
        raise self.error("locked")


class Interrupted(Locked):
    error = KeyboardInterrupt


class Deaf(nn.Module):
    """Takes nothing in, and says nothing."""

    def __setitem__(self, key: str, value: Any) -> None:
        pass


def holding(kind: type[nn.Module]) -> Callable[[Model], None]:
    def prepare(model: Model) -> None:
        model.odd = kind()
        dict.__setitem__(model.odd, "act", nn.ReLU())

    return prepare


def nothing(model: Model) -> None:
    pass


REFUSED: dict[str, tuple[Any, ...]] = {
    # what is refused: how to prepare the model, what to swap, options, what the factory does
    "a factory that raises": (nothing, "layers.*", {}, ("layers.2", fail), RuntimeError),
    "a factory that returns a number": (
        nothing,
        "layers.*",
        {},
        ("layers.2", not_a_module),
        TypeError,
    ),
    "half of a tie": (nothing, ["layers.*", "embed"], {}, (), SelectionError),
    "a place inside another": (nothing, ["layers.*", "layers.*.norm"], {}, (), SelectionError),
    "what was to be left alone": (
        nothing,
        ["layers.*", "layers.*.norm"],
        {"exclude": "**.norm"},
        (),
        SelectionError,
    ),
    "an update that fails": (
        holding(Locked),
        ["layers.*", "odd.act"],
        {},
        (),
        SelectionError,
    ),
    "an update that is interrupted": (
        holding(Interrupted),
        ["layers.*", "odd.act"],
        {},
        (),
        KeyboardInterrupt,
    ),
    "an update that does nothing": (holding(Deaf), ["layers.*", "odd.act"], {}, (), SelectionError),
}


@pytest.mark.parametrize("mode", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    ("prepare", "pattern", "options", "doing", "error"), REFUSED.values(), ids=REFUSED
)
def test_a_refused_swap_leaves_the_training_mode_of_the_new_modules(
    prepare, pattern, options, doing, error, mode
):
    for swap in (replace_layers, lambda *a, **k: swapped(*a, **k).__enter__()):
        model = Model()
        prepare(model)
        model.train(mode)
        make = Maker(*doing)
        before = Snapshot(model)
        with pytest.raises(error):
            swap(model, pattern, make, **options)
        assert before.differences() == []
        assert make.made
        assert make.differences() == []


def test_a_factory_that_spoils_the_model_does_not_spoil_the_new_modules():
    model: Any = Model().eval()

    def spoil(module: Any) -> None:
        layers: Any = model.layers
        layers[0] = nn.ReLU()

    make = Maker("layers.2", spoil)
    with pytest.raises(SelectionError) as error:
        replace_layers(model, "layers.*", make)
    assert str(error.value) == (
        "'layers.0' was modified while the factories ran; the swap was not applied"
    )
    assert make.differences() == []


def test_a_cycle_does_not_spoil_the_new_modules():
    model = Model().eval()
    make = Maker("layers.2", lambda module: New(model))
    with pytest.raises(SelectionError, match="the model contains a cycle"):
        replace_layers(model, "layers.*", make)
    assert make.differences() == []


def test_a_new_module_that_was_refused_can_be_used_in_the_next_swap():
    model: Any = Model().eval()
    new: Any = New()
    for pattern in ("embed", ["layers.0", "layers.0.norm"]):
        with pytest.raises(SelectionError):
            replace_layers(model, pattern, lambda path, module: new)
    assert new.training
    assert {module.training for module in new.modules()} == {True, False}
    replace_layers(model, "head", lambda path, module: new)
    assert not any(module.training for module in new.modules())


def test_the_mode_of_a_layer_under_a_new_wrapper_is_left_as_it_was():
    model = Model()
    holding(Locked)(model)
    model.head.eval()
    before = Snapshot(model)
    with pytest.raises(SelectionError):
        replace_layers(model, ["layers.*", "odd.act"], lambda path, module: Wrapper(model.head))
    assert before.differences() == []
    replace_layers(model, "layers.*", lambda path, module: Wrapper(module))
    assert not model.head.training


def test_an_interrupt_at_any_line_leaves_the_modes_as_the_model_is():
    """The new modules have the mode of the model if they are in it, and their own if not."""
    outcomes = set()
    for line in range(1, 10_000, 7):
        model: Any = Model().eval()
        make = Maker()
        interrupted = interrupt_at(line, lambda m=model, f=make: replace_layers(m, "layers.*", f))
        is_in = any(layer is make.made[0] for layer in model.layers if make.made)
        modes = {module.training for new in make.made for module in new.modules()}
        if make.made:
            assert modes == ({False} if is_in else {True, False})
        outcomes.add(is_in)
        if not interrupted:
            break
    assert outcomes == {True, False}
