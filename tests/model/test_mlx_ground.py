"""What MLX itself does, and the library leans on. If an MLX changes it, this says so first.

Nothing of the library is used here.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import pytest
from mlx.utils import tree_flatten, tree_unflatten
from models import build


def paths(model: Any) -> list[str]:
    return [path for path, _ in model.named_modules()]


class TestWhereChildrenAre:
    def test_a_module_is_a_dict_that_holds_its_arrays_and_children_in_definition_order(self):
        model = build(b=nn.ReLU(), a=[nn.Tanh()], weight=mx.zeros(1), c={"k": nn.ReLU()})
        assert issubclass(nn.Module, dict)
        assert list(dict.keys(model)) == ["b", "a", "weight", "c"]
        assert list(model.children()) == ["b", "a", "c"]

    def test_named_modules_goes_last_child_first_and_names_the_model_with_nothing(self):
        model = build(a=[nn.ReLU(), nn.ReLU()], b=nn.ReLU())
        assert paths(model) == ["", "b", "a.1", "a.0"]

    def test_named_modules_lists_a_shared_module_once_for_each_place(self):
        one = nn.ReLU()
        assert paths(build(a=one, b=[one])) == ["", "b.0", "a"]

    def test_children_are_found_in_lists_and_dicts_of_any_depth(self):
        model = build(a=[{"x": [[nn.ReLU()]]}], b={"2-1": {"0": nn.ReLU()}})
        assert paths(model) == ["", "b.2-1.0", "a.0.x.0.0"]

    def test_children_in_tuples_are_not_found(self):
        assert paths(build(a=(nn.ReLU(),))) == [""]

    def test_children_among_none_and_functions_are_found(self):
        assert paths(build(a=[None, nn.gelu, nn.ReLU()])) == ["", "a.2"]

    def test_keys_of_dicts_may_be_numbers_and_may_hold_dots(self):
        assert paths(build(a={0: nn.ReLU(), "x.y": nn.ReLU()})) == ["", "a.x.y", "a.0"]

    def test_names_that_start_with_an_underscore_are_children_but_not_parameters(self):
        model = build(_inner=nn.Linear(1, 1))
        assert paths(model) == ["", "_inner"]
        assert tree_flatten(model.parameters()) == []

    def test_functions_and_none_are_plain_attributes_and_not_in_the_dict(self):
        model = build(act=nn.gelu, bias=None)
        assert list(dict.keys(model)) == []
        assert vars(model)["act"] is nn.gelu
        assert vars(model)["bias"] is None

    def test_a_cycle_makes_a_walk_endless(self):
        model = build()
        model.itself = model
        depths: list[int] = []

        def count(path: str, _: nn.Module) -> None:
            depths.append(path.count("."))
            if len(depths) == 100:
                raise StopIteration

        with pytest.raises(StopIteration):
            model.apply_to_modules(count)
        assert depths[-1] == 98


class TestWhatAModuleIsLikeInPython:
    def test_a_module_without_arrays_is_false(self):
        assert not nn.ReLU()

    def test_modules_of_different_classes_are_equal(self):
        assert nn.ReLU() == nn.Tanh()
        assert nn.ReLU() == {}

    def test_modules_do_not_hash(self):
        with pytest.raises(TypeError, match="unhashable"):
            hash(nn.ReLU())

    def test_a_module_and_its_arrays_can_be_held_weakly(self):
        layer = nn.Linear(1, 1)
        references = [weakref.ref(layer), weakref.ref(layer.weight)]
        del layer
        assert [reference() for reference in references] == [None, None]

    def test_a_module_is_callable_so_callable_does_not_tell_it_from_a_factory(self):
        assert callable(nn.ReLU())

    def test_training_mode_and_frozen_names_are_kept_outside_the_dict(self):
        layer = nn.Linear(1, 1)
        assert list(dict.keys(layer)) == ["weight", "bias"]
        assert vars(layer)["_training"] is True
        assert vars(layer)["_no_grad"] == set()

    def test_train_and_freeze_reach_every_module_inside(self):
        model = build(a=[nn.Linear(1, 1)])
        model.eval()
        model.freeze()
        assert not model.training
        assert not model.a[0].training
        assert model.a[0]._no_grad == {"weight", "bias"}
        assert tree_flatten(model.trainable_parameters()) == []

    def test_a_new_module_is_in_training_mode_and_not_frozen(self):
        layer = nn.Linear(1, 1)
        assert layer.training
        assert layer._no_grad == set()

    def test_the_mode_of_a_module_is_what_training_says(self):
        layer = nn.ReLU()
        layer._training = False
        assert not layer.training


class TestUpdateModules:
    def test_it_puts_the_identical_object_in_and_keeps_containers_and_their_order(self):
        model = build(a=nn.ReLU(), b=[nn.ReLU(), nn.ReLU()], c={"x": nn.ReLU(), "y": nn.ReLU()})
        kept = [model.b, model.c, model.b[1], model.c["y"]]
        news = [nn.Tanh(), nn.Tanh(), nn.Tanh()]
        model.update_modules({"c": {"x": news[0]}, "b": [news[1]], "a": news[2]})
        assert [id(model.c["x"]), id(model.b[0]), id(model.a)] == list(map(id, news))
        assert list(map(id, [model.b, model.c, model.b[1], model.c["y"]])) == list(map(id, kept))
        assert list(dict.keys(model)) == ["a", "b", "c"]
        assert list(model.c) == ["x", "y"]

    def test_an_empty_dict_leaves_an_entry_of_a_list_alone_whatever_it_is(self):
        before = [nn.ReLU(), None, nn.gelu, nn.Linear(1, 1), [nn.ReLU()], {"k": nn.ReLU()}]
        model = build(a=[*before, nn.ReLU()])
        model.update_modules({"a": [{}, {}, {}, {}, {}, {}, nn.Tanh()]})
        assert [id(x) for x in model.a[:-1]] == [id(x) for x in before]
        assert isinstance(model.a[-1], nn.Tanh)

    def test_it_goes_through_modules_lists_and_dicts_with_the_real_keys(self):
        model = build(a={"0": [build(b=nn.ReLU())], 1: nn.ReLU(), "x.y": nn.ReLU()})
        partial = {"a": {"0": [{"b": nn.Tanh()}], 1: nn.Tanh(), "x.y": nn.Tanh()}}
        model.update_modules(partial)
        assert {type(m).__name__ for _, m in model.named_modules()} == {"Module", "Tanh"}

    def test_it_is_not_atomic(self):
        model = build(a=nn.ReLU(), b=nn.ReLU())
        with pytest.raises(ValueError, match="missing"):
            model.update_modules({"a": nn.Tanh(), "missing": nn.Tanh()})
        assert isinstance(model.a, nn.Tanh)

    def test_it_goes_in_the_order_of_the_partial_dict(self):
        model = build(a=nn.ReLU(), b=nn.ReLU())
        with pytest.raises(ValueError, match="missing"):
            model.update_modules({"b": nn.Tanh(), "missing": nn.Tanh(), "a": nn.Tanh()})
        assert isinstance(model.a, nn.ReLU)
        assert isinstance(model.b, nn.Tanh)

    def test_it_silently_ignores_an_empty_module_where_a_function_sits_in_a_list(self):
        model = build(a=[nn.gelu, None])
        model.update_modules({"a": [nn.ReLU(), nn.ReLU()]}, strict=True)
        assert model.a == [nn.gelu, None]

    def test_it_goes_down_by_recursion_and_gives_up_before_the_limit_of_python(self):
        limit = sys.getrecursionlimit()
        deep: Any = nn.ReLU()
        partial: Any = nn.Tanh()
        for _ in range(limit):
            deep, partial = build(a=deep), {"a": partial}
        with pytest.raises(RecursionError):
            deep.update_modules(partial)

    def test_it_does_not_look_at_what_the_partial_dict_does_not_name(self):
        deep: Any = nn.ReLU()
        for _ in range(2 * sys.getrecursionlimit()):
            deep = build(a=deep)
        model = build(deep=deep, other=nn.ReLU())
        model.update_modules({"other": nn.Tanh()})
        assert isinstance(model.other, nn.Tanh)

    def test_it_hands_over_neither_training_mode_nor_frozen_state(self):
        model = build(a=nn.Linear(1, 1))
        model.eval()
        model.freeze()
        model.update_modules({"a": nn.Linear(1, 1)})
        assert model.a.training
        assert model.a._no_grad == set()


class TestTreeUnflattenIsNoWayToThePartialDict:
    def test_digit_keys_of_a_dict_become_a_list_that_does_not_fit(self):
        model = build(a={"0": nn.ReLU()})
        with pytest.raises(KeyError, match="0"):
            model.update_modules(tree_unflatten([("a.0", nn.Tanh())]))

    def test_dotted_keys_are_split(self):
        assert tree_unflatten([("a.b", 1)]) == {"a": {"b": 1}}

    def test_a_negative_index_becomes_the_first_entry(self):
        assert tree_unflatten([("layers.-1", 1)]) == {"layers": [1]}


class TestWhatASwapMeansForTheRestOfAProgram:
    def test_a_compiled_function_keeps_the_old_layers_even_with_the_state_as_input(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        x = mx.ones((1, 2))
        compiled = mx.compile(lambda x: model(x), inputs=[model.state])
        before = compiled(x)
        model.update_modules({"layers": [{}, nn.Sigmoid()]})
        assert mx.array_equal(compiled(x), before)
        assert not mx.array_equal(model(x), before)
        again = mx.compile(lambda x: model(x), inputs=[model.state])
        assert mx.allclose(again(x), model(x))

    def test_an_optimizer_does_not_know_parameters_that_a_swap_brought_in(self):
        model = nn.Sequential(nn.Linear(2, 2))
        optimizer = optim.Adam(learning_rate=0.1)
        optimizer.init(model.trainable_parameters())
        model.update_modules({"layers": [build(other=nn.Linear(2, 2))]})
        named: Any = tree_flatten(model.parameters())
        gradients = tree_unflatten([(name, mx.ones_like(array)) for name, array in named])
        with pytest.raises(KeyError, match="other"):
            optimizer.update(model, gradients)

    def test_an_optimizer_silently_keeps_the_old_moments_where_the_names_are_the_same(self):
        model = nn.Sequential(nn.Linear(2, 2))
        optimizer = optim.Adam(learning_rate=0.1)
        optimizer.init(model.trainable_parameters())
        optimizer.update(model, {"layers": [{"weight": mx.ones((2, 2)), "bias": mx.ones(2)}]})
        moment = optimizer.state["layers"][0]["weight"]["m"]
        model.update_modules({"layers": [nn.Linear(2, 2)]})
        assert optimizer.state["layers"][0]["weight"]["m"] is moment

    def test_a_fresh_layer_is_float32_and_upcasts_a_bfloat16_model(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model.set_dtype(mx.bfloat16)
        x = mx.ones((1, 2), mx.bfloat16)
        assert model(x).dtype == mx.bfloat16
        model.update_modules({"layers": [nn.Linear(2, 2)]})
        assert model(x).dtype == mx.float32

    def test_a_replaced_layer_is_freed_at_once_when_nobody_else_holds_it(self):
        model = nn.Sequential(nn.Linear(512, 512))
        mx.eval(model.parameters())
        mx.synchronize()
        before = mx.get_active_memory()
        model.update_modules({"layers": [nn.Identity()]})
        assert before - mx.get_active_memory() >= 512 * 512 * 4

    def test_a_quantized_layer_has_bits_and_scales(self):
        layer = nn.Linear(64, 64).to_quantized(bits=4)
        assert layer.bits == 4
        assert "scales" in layer
        assert layer.weight.size * 32 // layer.bits == 64 * 64

    def test_what_mx_compile_reads_of_a_state_is_the_raw_dict(self):
        class Hiding(nn.Module):
            def __getattr__(self, key: str):
                raise AttributeError(key)

        model = Hiding()
        dict.__setitem__(model, "weight", mx.ones(1))
        compiled = mx.compile(lambda x: x * dict.__getitem__(model, "weight"), inputs=[model])
        assert compiled(mx.ones(1)).item() == 1
        dict.__setitem__(model, "weight", mx.full(1, 2.0))
        assert compiled(mx.ones(1)).item() == 2

    def test_isinstance_believes_an_object_that_gives_another_class(self):
        class Wrapping(nn.Module):
            @property
            def __class__(self):  # pyright: ignore[reportIncompatibleMethodOverride]
                return nn.Linear

        assert isinstance(Wrapping(), nn.Linear)
        assert type(Wrapping()) is Wrapping
