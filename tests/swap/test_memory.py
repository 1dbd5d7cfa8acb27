"""What is replaced is garbage at once, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import Model, fresh

from mlx_modswap import (
    NoMatchError,
    PatternError,
    SelectionError,
    partial_modules,
    replace_layers,
    select,
    swapped,
)


class Watched:
    """Weak references to modules and to the arrays inside of them."""

    def __init__(self, modules: Iterable[nn.Module]):
        self.references: list[weakref.ref] = []
        for module in modules:
            self.references.append(weakref.ref(module))
            arrays = [value for value in dict.values(module) if isinstance(value, mx.array)]
            self.references += map(weakref.ref, arrays)

    def alive(self) -> int:
        return sum(reference() is not None for reference in self.references)

    def all_alive(self) -> bool:
        return self.alive() == len(self.references) > 0


def tied_model() -> nn.Module:
    model = Model()
    model.layers[1].mlp = model.layers[0].mlp
    return model


@pytest.fixture(scope="module", autouse=True)
def _no_garbage_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("make", [Model, tied_model])
@pytest.mark.parametrize("pattern", ["**.mlp", "**.{mlp,b}", "layers.*"])
def test_replaced_modules_and_their_arrays_are_gone_while_the_report_is_still_there(make, pattern):
    model = make()
    # The tie is cut when its parents go; then it is the parents that are watched.
    old = Watched(select(model, pattern).values())
    report = replace_layers(model, pattern, fresh)
    assert old.alive() == 0
    assert len(report) == len(select(model, pattern))


def test_printing_the_report_brings_nothing_back():
    model = Model()
    report = replace_layers(model, "**.mlp", fresh)
    new = Watched(report.values())
    assert str(report)
    assert repr(report)
    del report
    replace_layers(model, "**.mlp", lambda path, module: nn.Identity())
    assert new.alive() == 0


def test_each_old_module_can_be_dropped_by_hand_as_well():
    model = Model()
    old = Watched(select(model, "**.mlp").values())
    news = {path: nn.Linear(4, 4) for path in select(model, "**.mlp")}
    model.update_modules(partial_modules(model, news))
    assert old.alive() == 0


def test_rules_and_their_factories_are_not_kept():
    model = Model()

    class Factory:
        def __call__(self, path: str, module: nn.Module) -> nn.Module:
            return nn.Identity()

    factory = Factory()
    reference = weakref.ref(factory)
    report = replace_layers(model, {"layers.0.mlp": None, "**.mlp": factory})
    assert len(report) == 2
    del factory
    assert reference() is None


def fails_at_the_third_call():
    count = iter(range(10))

    def factory(path: str, module: nn.Module) -> Any:
        if next(count) == 2:
            raise RuntimeError("third call")
        return nn.Linear(4, 4)

    return factory


FAILURES = {
    "a factory raises": ("**.{mlp,b}", fails_at_the_third_call, RuntimeError),
    "a factory returns None": ("**.mlp", lambda: lambda path, module: None, TypeError),
    "nothing matches": ("mlp", lambda: fresh, NoMatchError),
    "the pattern is wrong": ("layers[", lambda: fresh, PatternError),
    "one place is inside another": ("**", lambda: fresh, SelectionError),
}


@pytest.mark.parametrize("call", [replace_layers, swapped])
@pytest.mark.parametrize(("pattern", "factory", "error"), FAILURES.values(), ids=FAILURES)
def test_after_a_failed_call_the_model_can_go_and_so_can_what_was_made_for_it(
    call, pattern, factory, error
):
    made: list[weakref.ref] = []
    make = factory()

    def watching(path: str, module: nn.Module) -> Any:
        new = make(path, module)
        if new is not None:
            made.append(weakref.ref(new))
        return new

    model = Model()
    whole = Watched(module for _, module in model.named_modules())
    try:
        result = call(model, pattern, watching)
        with result:
            pass
    except error:
        pass
    else:
        pytest.fail("the call should have failed")
    result = None
    assert [reference() for reference in made] == [None] * len(made)
    assert whole.all_alive()
    del model
    assert whole.alive() == 0


def test_after_a_failed_update_the_model_and_the_new_modules_can_go():
    class Locked(nn.Module):
        def __setitem__(self, key, value):
            raise KeyError(key)

    model = Model()
    locked = Locked()
    dict.__setitem__(locked, "mlp", nn.Linear(4, 4))
    model.layers.append(locked)
    made: list[weakref.ref] = []

    def factory(path: str, module: nn.Module) -> nn.Module:
        new = nn.Linear(4, 4)
        made.append(weakref.ref(new))
        return new

    whole = Watched(module for _, module in model.named_modules())
    with pytest.raises(SelectionError, match="update_modules failed"):
        replace_layers(model, "**.mlp", factory)
    del locked, model
    assert len(made) == 4
    assert [reference() for reference in made] == [None] * 4
    assert whole.alive() == 0


def test_the_second_swap_of_a_place_frees_what_the_first_put_in():
    model = Model()
    first = Watched(replace_layers(model, "**.mlp", fresh).values())
    assert first.all_alive()
    replace_layers(model, "**.mlp", fresh)
    assert first.alive() == 0


def test_swapped_holds_the_old_modules_until_it_exits_and_frees_the_new_ones_then():
    model = Model()
    old = Watched(select(model, "**.mlp").values())
    with swapped(model, "**.mlp", fresh) as report:
        new = Watched(report.values())
        del report
        assert old.all_alive()
        assert new.all_alive()
    assert old.all_alive()
    assert new.alive() == 0
    del model
    assert old.alive() == 0


def test_swapped_frees_the_new_modules_also_when_its_body_raises():
    model = Model()

    def use() -> Watched:
        with swapped(model, "**.mlp", fresh) as report:
            new.append(Watched(report.values()))
            raise ZeroDivisionError

    new: list[Watched] = []
    with pytest.raises(ZeroDivisionError):
        use()
    assert new[0].alive() == 0


def test_a_finished_context_manager_keeps_nothing():
    model = Model()
    whole = Watched(module for _, module in model.named_modules())
    manager = swapped(model, "**.mlp", fresh)
    with manager:
        pass
    del model
    assert whole.alive() == 0


def test_when_swapped_refuses_to_put_back_the_old_modules_are_freed():
    model = Model()
    old = Watched([model.layers[0].mlp])
    with pytest.raises(SelectionError), swapped(model, "layers.0.mlp", fresh):
        model.layers[0].mlp = nn.Identity()
    assert old.alive() == 0


def test_select_keeps_nothing():
    model = Model()
    whole = Watched(module for _, module in model.named_modules())
    assert select(model, "**")
    del model
    assert whole.alive() == 0


def quantize(path: str, module: Any) -> nn.Module:
    return module.to_quantized(bits=4)


def test_a_lazy_model_is_quantized_with_little_more_memory_than_the_result_needs():
    layers, size = 16, 512
    weight = size * size * 4
    model = nn.Sequential(*[nn.Linear(size, size, bias=False) for _ in range(layers)])
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    replace_layers(model, "layers.*", quantize)
    for layer in model.layers:
        mx.eval(layer.parameters())
        mx.synchronize()  # a GPU gives memory back when it is done
    result = mx.get_active_memory() - before
    assert result < layers * weight / 5
    assert mx.get_peak_memory() - before < result + 4 * weight
