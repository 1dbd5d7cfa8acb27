"""What a swap guarantees: one class for each promise, plain examples inside.

The promises are the numbered ones: frame, all or nothing, order, ties, nesting, nothing silent,
training mode, rules, no pinning, limits.
"""

from __future__ import annotations

import gc
import sys
import weakref
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from interrupting import interrupt_at
from mlx.utils import tree_flatten
from models import Block, Holder, Model, Recorder, around, build, fresh, modified, unchanged
from oracle import Snapshot

from mlx_modswap import (
    NoMatchError,
    Replacement,
    SelectionError,
    Wrapper,
    partial_modules,
    replace_layers,
    select,
    swapped,
)


def refuses(model: nn.Module, *arguments: Any, **options: Any) -> str:
    """The text of the SelectionError that a swap ends with, having changed nothing."""
    before = Snapshot(model)
    with pytest.raises(SelectionError) as caught:
        replace_layers(model, *arguments, **options)
    assert before.differences() == []
    return str(caught.value)


def misses(model: nn.Module, *arguments: Any, **options: Any) -> str:
    """The text of the NoMatchError that a swap ends with, having changed nothing."""
    before = Snapshot(model)
    with pytest.raises(NoMatchError) as caught:
        replace_layers(model, *arguments, **options)
    assert before.differences() == []
    return str(caught.value)


class TestFrame:
    """1. Outside of the targeted locations nothing changes."""

    def test_only_the_named_places_change(self):
        model = Model()
        before = Snapshot(model)
        report = replace_layers(model, "layers.*.attn", fresh)
        targets = {(id(layer), "attn") for layer in model.layers}
        assert before.differences(but=targets) == []
        assert list(report) == ["layers.0.attn", "layers.1.attn", "layers.2.attn"]
        assert all(layer.attn is report[f"layers.{i}.attn"] for i, layer in enumerate(model.layers))

    def test_what_is_excluded_or_no_instance_of_where_does_not_change(self):
        model = Model()
        before = Snapshot(model)
        replace_layers(model, "layers.*.*", fresh, exclude="layers[0].**", where=nn.Linear)
        targets = {(id(model.layers[1]), "attn"), (id(model.layers[2]), "attn")}
        assert before.differences(but=targets) == []
        assert type(model.layers[1].attn) is type(model.layers[2].attn) is Holder

    def test_layer_1_is_not_layer_10(self):
        model = Model(12)
        before = Snapshot(model)
        replace_layers(model, "layers.1", fresh)
        assert before.differences(but={(id(model.layers), 1)}) == []
        assert [i for i, layer in enumerate(model.layers) if type(layer) is Holder] == [1]

    def test_none_and_functions_in_a_list_keep_their_places(self):
        model = Model()
        acts = model.layers[0].acts
        replace_layers(model, "layers.0.acts.0", fresh)
        assert model.layers[0].acts is acts
        assert type(acts[0]) is Holder
        assert acts[1:] == [None, nn.gelu]

    def test_the_keys_of_dicts_and_modules_keep_their_order(self):
        model = Model()
        replace_layers(model, ["heads.a", "embed"], fresh)
        assert list(model.heads) == ["b", "a", "10"]
        assert list(dict.keys(model)) == ["embed", "layers", "heads", "scale"]

    def test_a_digit_key_of_a_dict_is_a_key_and_no_index(self):
        model = Model()
        before = Snapshot(model)
        replace_layers(model, "heads.10", fresh)
        assert before.differences(but={(id(model.heads), "10")}) == []

    def test_the_names_of_all_other_parameters_and_their_arrays_are_the_same(self):
        model = Model()
        before = dict(tree_flatten(model.parameters()))
        replace_layers(model, "layers.1.attn", around)
        after = dict(tree_flatten(model.parameters()))
        ours = "layers.1.attn."
        assert [k for k in before if not k.startswith(ours)] == [
            k for k in after if not k.startswith(ours)
        ]
        assert all(after[k] is before[k] for k in before if not k.startswith(ours))
        assert [k for k in after if k.startswith(ours)] == [
            ours + "weight",
            ours + "inner.weight",
            ours + "inner.bias",
        ]

    def test_frozen_and_training_flags_elsewhere_stay(self):
        model = Model()
        model.layers[0].freeze()
        model.layers[2].eval()
        before = Snapshot(model)
        replace_layers(model, "layers.*.norm", fresh)
        assert before.differences(but={(id(layer), "norm") for layer in model.layers}) == []

    def test_a_list_subclass_is_not_rebuilt(self):
        class Chain(list):
            pass

        chain = Chain([nn.ReLU(), nn.ReLU()])
        model = build(chain=chain)
        replace_layers(model, "chain[-1]", fresh)
        assert model.chain is chain
        assert [type(m) for m in chain] == [nn.ReLU, Holder]

    def test_what_the_model_overrides_is_not_asked(self):
        class Odd(nn.Module):
            def __len__(self):
                return 0

            def __iter__(self):
                raise AssertionError

            def parameters(self):
                raise AssertionError

        odd = Odd()
        odd.act = nn.ReLU()
        model = build(odd=odd, tail=[odd.act, nn.ReLU()])
        assert list(replace_layers(model, "**", fresh, where=nn.ReLU)) == [
            "odd.act",
            "tail.0",
            "tail.1",
        ]

    def test_select_and_partial_modules_and_update_modules_are_the_same_by_hand(self):
        model = Model()
        originals = select(model, "layers.*.attn")
        before = Snapshot(model)
        replace_layers(model, "layers.*.attn", fresh)
        model.update_modules(partial_modules(model, originals))
        assert before.differences() == []

    def test_a_partial_dict_names_nothing_but_its_places(self):
        tanh = nn.Tanh()
        assert repr(partial_modules(Model(), {"layers.1.acts.0": tanh, "heads.10": tanh})) == (
            "{'layers': [{}, {'acts': [Tanh()]}], 'heads': {'10': Tanh()}}"
        )

    def test_the_paths_of_a_partial_dict_may_hold_dotted_and_empty_keys(self):
        inside = build(a=nn.ReLU(), d={"": build(a=nn.ReLU())})
        model = build(d={"": inside, "x.y": nn.ReLU()})
        tanh = nn.Tanh()
        assert repr(partial_modules(model, {"d..a": tanh, "d.x.y": tanh})) == (
            "{'d': {'': {'a': Tanh()}, 'x.y': Tanh()}}"
        )

    def test_the_modules_of_the_model_may_change_places(self):
        model = build(layers=[nn.Linear(1, 1) for _ in range(4)])
        one, *others = model.layers
        turned = dict(zip(select(model, "layers.*"), [*others, one]))
        before = Snapshot(model)
        with swapped(model, "layers.*", lambda path, module: turned[path]):
            assert [id(layer) for layer in model.layers] == list(map(id, [*others, one]))
        assert before.differences() == []

    def test_update_modules_is_called_once(self, monkeypatch):
        calls = []
        original = nn.Module.update_modules

        def counting(self, *arguments, **options):
            calls.append(arguments)
            return original(self, *arguments, **options)

        monkeypatch.setattr(nn.Module, "update_modules", counting)
        replace_layers(Model(), "layers.*.attn", fresh)
        assert len(calls) == 1


class TestAllOrNothing:
    """2. Every factory runs and every check passes before the model is touched."""

    @pytest.mark.parametrize("good_calls", [0, 1, 2])
    def test_a_factory_that_raises_changes_nothing(self, good_calls):
        model = Model()
        before = Snapshot(model)

        def failing(path, module):
            if path == f"layers.{good_calls}.attn":
                raise RuntimeError("out of memory")
            return Holder()

        with pytest.raises(RuntimeError, match="out of memory") as caught:
            replace_layers(model, "layers.*.attn", failing)
        assert before.differences() == []
        assert caught.value.__notes__ == [f"while replacing 'layers.{good_calls}.attn' (Linear)"]

    def test_the_error_of_a_factory_comes_out_as_it_is(self):
        class OwnError(Exception):
            pass

        error = OwnError()

        def failing(path, module):
            raise error

        with pytest.raises(OwnError) as caught:
            replace_layers(Model(), "embed", failing)
        assert caught.value is error

    @pytest.mark.parametrize(
        ("returned", "what"),
        [
            (None, "None"),
            (nn.ReLU, "the class ReLU"),
            (mx.zeros(1), "an array"),
            (fresh, "a function"),
            ({}, "a dict"),
            ([nn.ReLU()], "a list of 1"),
            (3, "an int"),
        ],
    )
    def test_a_factory_that_returns_no_module_changes_nothing(self, returned, what):
        model = Model()
        before = Snapshot(model)
        last = "layers.2.attn"
        with pytest.raises(TypeError) as caught:
            replace_layers(model, "layers.*.attn", lambda p, m: returned if p == last else Holder())
        assert str(caught.value) == (
            f"the factory returned {what} for 'layers.2.attn' (Linear); it must return an "
            "mlx.nn.Module; return the module it was given to leave it unchanged"
        )
        assert before.differences() == []

    def test_an_empty_module_is_as_good_as_any(self):
        model = Model()
        replace_layers(model, "layers.*.acts.*", lambda path, module: nn.Tanh())
        assert all(type(layer.acts[0]) is nn.Tanh for layer in model.layers)
        assert all(layer.acts[1:] == [None, nn.gelu] for layer in model.layers)

    @pytest.mark.parametrize("factory", [None, 3, nn.ReLU(), "Linear", {}])
    def test_what_is_no_factory_is_refused_before_anything_else(self, factory):
        model = Model()
        before = Snapshot(model)
        with pytest.raises(TypeError, match="factory must be a function of path and module"):
            replace_layers(model, "embed", factory)
        with pytest.raises(TypeError, match=r"rule 'embed' must be a function|leave the factory"):
            replace_layers(model, {"embed": factory or 3})  # pyright: ignore[reportArgumentType]
        assert before.differences() == []

    def test_when_update_modules_fails_half_way_all_is_put_back(self):
        class Locked(nn.Module):
            def __setitem__(self, key, value):
                raise KeyError("locked")

        locked = Locked()
        dict.__setitem__(locked, "act", nn.ReLU())
        model = build(first=build(act=nn.ReLU()), locked=locked, last=nn.ReLU())
        assert refuses(model, ["first.act", "locked.act", "last"], fresh) == (
            "MLX's update_modules failed, and nothing was changed: 'locked'"
        )

    def test_when_update_modules_does_nothing_somewhere_all_is_put_back(self):
        class Deaf(nn.Module):
            def __setitem__(self, key, value):
                pass

        deaf = Deaf()
        dict.__setitem__(deaf, "act", nn.ReLU())
        model = build(first=build(act=nn.ReLU()), deaf=deaf, last=nn.ReLU())
        message = refuses(model, ["first.act", "deaf.act", "last"], fresh)
        assert "left 'deaf.act' as it was" in message

    def test_a_keyboard_interrupt_during_the_update_puts_all_back(self):
        class Interrupted(nn.Module):
            def __setitem__(self, key, value):
                raise KeyboardInterrupt

        inner = Interrupted()
        dict.__setitem__(inner, "act", nn.ReLU())
        model = build(first=build(act=nn.ReLU()), inner=inner)
        before = Snapshot(model)
        with pytest.raises(KeyboardInterrupt):
            replace_layers(model, ["first.act", "inner.act"], fresh)
        assert before.differences() == []

    @pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
    @pytest.mark.parametrize("swap", [replace_layers, swapped])
    def test_a_failed_update_gives_new_modules_their_training_mode_back(self, swap, error):
        class Locked(nn.Module):
            def __setitem__(self, key, value):
                raise error

        locked = Locked()
        dict.__setitem__(locked, "act", nn.ReLU())
        model = build(first=build(act=nn.ReLU()), locked=locked)
        model.eval()
        bare = nn.Tanh()
        del bare._training  # as in a class that does not call `super().__init__()`
        new = nn.Sequential(nn.Tanh(), nn.Tanh().eval(), bare)
        with pytest.raises((SelectionError, KeyboardInterrupt)):
            swap(model, "*.act", lambda path, module: new).__enter__()
        assert [module.training for module in (new, *new.layers)] == [True, True, False, True]

    def test_a_refused_swap_leaves_new_modules_in_their_training_mode(self):
        model = Model()
        model.eval()
        new = nn.Linear(4, 4)

        def meddling(path, module):
            model.layers[0].attn = nn.ReLU()
            return new

        with pytest.raises(SelectionError, match="while the factories ran"):
            replace_layers(model, "layers[0].attn", meddling)
        assert new.training

    def test_an_interrupt_at_any_line_leaves_all_places_or_none_changed(self):
        changed = set()
        for line in range(1, 10_000, 5):
            model = Model()
            before = Snapshot(model)
            call = partial(replace_layers, model, "layers.*.attn", fresh)
            interrupted = interrupt_at(line, call)
            differences = before.differences()
            assert differences in ([], ["'attn' of a Block"] * 3)
            changed.add(bool(differences))
            if not interrupted:
                break
        assert changed == {True, False}

    def test_a_factory_that_changes_a_place_itself_is_noticed(self):
        model = Model()
        intruder = nn.ReLU()

        def meddling(path, module):
            model.layers[0].attn = intruder
            return Holder()

        with pytest.raises(SelectionError) as caught:
            replace_layers(model, "layers.*.attn", meddling)
        assert str(caught.value) == (
            "'layers.0.attn' was modified while the factories ran; the swap was not applied"
        )
        assert model.layers[0].attn is intruder
        assert type(model.layers[1].attn) is nn.Linear

    def test_a_factory_that_moves_the_places_themselves_is_noticed(self):
        model = Model()
        others = [Block() for _ in range(3)]

        def meddling(path, module):
            model.layers = others
            return Holder()

        with pytest.raises(SelectionError) as caught:
            replace_layers(model, "layers.*.attn", meddling)
        assert str(caught.value) == (
            "'layers.0.attn' was modified while the factories ran; the swap was not applied"
        )
        assert model.layers is others
        assert [type(layer.attn) for layer in others] == [nn.Linear] * 3

    def test_a_place_that_cannot_be_put_back_is_named(self):
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

    def test_the_place_that_has_moved_is_named_and_not_one_before_it(self):
        model = Model()

        def meddling(path, module):
            model.layers[1] = Block()
            return Holder()

        with pytest.raises(SelectionError) as caught:
            replace_layers(model, ["embed", "layers.*.attn"], meddling)
        assert str(caught.value) == (
            "'layers.1.attn' was modified while the factories ran; the swap was not applied"
        )
        assert type(model.embed) is nn.Embedding


class TestOrder:
    """3. Factories are called in definition order."""

    def test_depth_first_as_the_model_is_written(self):
        model = build(b=nn.ReLU(), a=build(z=[nn.ReLU(), nn.ReLU()], y=nn.ReLU()), c=nn.ReLU())
        factory = Recorder(unchanged)
        replace_layers(model, "**", factory)
        assert factory.paths == ["b", "a", "a.z.0", "a.z.1", "a.y", "c"]

    def test_the_order_of_the_patterns_does_not_matter(self):
        factory = Recorder()
        replace_layers(Model(), ["heads.*", "layers[2].attn", "layers[0].attn", "embed"], factory)
        assert factory.paths == [
            "embed",
            "layers.0.attn",
            "layers.2.attn",
            "heads.b",
            "heads.a",
            "heads.10",
        ]

    def test_call_order_ignores_rule_order_and_slice_direction(self):
        factory = Recorder()
        replace_layers(Model(), {"layers[::-1].norm": factory, "embed": factory})
        assert factory.paths == ["embed", "layers.0.norm", "layers.1.norm", "layers.2.norm"]

    def test_select_gives_the_same_order_and_so_does_the_report(self):
        model = Model()
        factory = Recorder()
        paths = list(select(model, "**", where=nn.Linear))
        assert list(replace_layers(model, "**", factory, where=nn.Linear)) == paths
        assert factory.paths == paths

    def test_random_initialisation_is_reproducible(self):
        def weights():
            mx.random.seed(7)
            report = replace_layers(Model(), "layers.*.attn", lambda p, m: nn.Linear(4, 4))
            return [module["weight"] for module in report.values()]

        assert all(mx.array_equal(a, b) for a, b in zip(weights(), weights()))


class TestTies:
    """4. One module with parameters in several places changes in all of them or in none."""

    def test_the_factory_runs_once_and_the_tie_is_kept(self):
        shared = nn.Embedding(8, 4)
        model = build(shared=shared, encoder=build(embed=shared), other=nn.Linear(1, 1))
        factory = Recorder()
        report = replace_layers(model, "**.{shared,embed}", factory)
        assert factory.paths == ["shared"]
        assert model.shared is model.encoder.embed
        assert list(report) == ["shared", "encoder.embed"]
        assert report["shared"] is report["encoder.embed"] is model.shared

    @pytest.mark.parametrize("before", ["", "**."])
    @pytest.mark.parametrize(("place", "other"), [("first", "last"), ("last", "first")])
    def test_a_tie_is_seen_where_there_is_nothing_else(self, before, place, other):
        shared = nn.Embedding(8, 4)
        model = build(first=shared, last=shared)
        assert refuses(model, before + place, fresh) == (
            f"'{place}' is tied to '{other}' (the same Embedding), which is not selected; "
            f"select both, or neither (exclude='{place}'); to untie them, use "
            f"model.update_modules(partial_modules(model, {{'{place}': new}}))"
        )

    def test_a_tie_is_seen_however_deep_its_arrays_are(self):
        shared = Holder()
        for _ in range(2 * sys.getrecursionlimit()):
            shared = build(inner=shared)
        model = build(first=shared, last=shared)
        with pytest.raises(SelectionError) as caught:
            replace_layers(model, "first", fresh)
        assert str(caught.value).startswith("'first' is tied to 'last' (the same Module), which")
        assert model.first is shared

    def test_a_part_of_a_tie_is_refused_with_the_rest_of_it(self):
        shared = nn.Embedding(8, 4)
        model = build(shared=shared, encoder=build(embed=shared), decoder=build(embed=shared))
        assert refuses(model, "encoder.*", fresh) == (
            "'encoder.embed' is tied to 'shared', 'decoder.embed' (the same Embedding), which "
            "are not selected; select all of them, or none (exclude='encoder.embed'); to untie "
            "them, use model.update_modules(partial_modules(model, {'encoder.embed': new}))"
        )

    def test_where_cannot_cut_a_tie_either(self):
        shared = nn.Linear(1, 1)
        model = build(a=shared, b=shared)
        message = refuses(model, "**", fresh, where=lambda path, module: path == "a")
        assert message.startswith("'a' is tied to 'b' (the same Linear), which is not selected;")

    def test_one_tie_under_two_rules_is_refused(self):
        shared = nn.Linear(1, 1)
        model = build(a=shared, b=shared)
        assert refuses(model, {"a": fresh, "b": around}) == (
            "'a', 'b' are the same Linear, but different rules decide about them: 'a', 'b'; "
            "let one rule match all of these paths first"
        )

    def test_one_tie_under_a_rule_and_none_is_refused(self):
        shared = nn.Linear(1, 1)
        message = refuses(build(a=shared, b=shared), {"a": fresh, "b": None})
        assert "different rules decide about them: 'a', 'b'" in message
        message = refuses(build(a=shared, b=shared), {"a": None, "b": fresh})
        assert "different rules decide about them: 'a', 'b'" in message

    def test_a_tie_that_does_not_change_hides_no_other(self):
        kept, changed = nn.LayerNorm(1), nn.Linear(1, 1)
        model = build(a=kept, b=kept, c=changed, d=changed)
        make = Recorder(lambda path, module: module if module is kept else Holder())
        assert "is tied to" in refuses(model, ["a", "c"], make)

    def test_a_tie_that_does_not_change_may_be_under_two_rules_or_half_selected(self):
        shared = nn.Linear(1, 1)
        model = build(a=shared, b=shared, c=nn.ReLU())
        assert not replace_layers(model, {"a": None, "b": unchanged})
        assert list(replace_layers(model, ["a", "c"], Recorder(self._only_relu))) == ["c"]

    @staticmethod
    def _only_relu(path, module):
        return Holder() if type(module) is nn.ReLU else module

    def test_a_module_without_parameters_is_not_tied(self):
        act = nn.ReLU()
        model = build(a=act, b=act, c=[act])
        factory = Recorder()
        replace_layers(model, ["a", "c.*"], factory)
        assert factory.paths == ["a", "c.0"]
        assert model.b is act
        assert type(model.a) is type(model.c[0]) is Holder
        assert model.a is not model.c[0]

    def test_an_array_under_an_underscore_makes_no_tie(self):
        act = nn.ReLU()
        act._cache = mx.zeros(1)
        model = build(a=act, b=act)
        replace_layers(model, "a", fresh)
        assert model.b is act

    def test_an_array_behind_an_attribute_with_an_underscore_makes_a_tie(self):
        shared = nn.Module()
        shared._cache = [nn.Linear(1, 1)]
        assert list(replace_layers(build(a=shared, b=shared), "a", fresh)) == ["a"]
        shared.weight = mx.zeros(1)
        assert "is tied to" in refuses(build(a=shared, b=shared), "a", fresh)

    def test_what_parameters_says_decides_whether_a_module_is_tied(self):
        class Discreet(nn.Linear):
            def parameters(self):
                return {}

        shared = Discreet(1, 1)
        assert list(replace_layers(build(a=shared, b=shared), "a", fresh)) == ["a"]

    def test_none_and_functions_make_no_tie(self):
        shared = build(acts=[None, nn.gelu, {"x": [nn.ReLU()]}])
        assert list(replace_layers(build(a=shared, b=shared), "a", fresh)) == ["a"]

    def test_an_array_deep_inside_makes_a_tie(self):
        shared = build(inner=[{"x": nn.Linear(1, 1)}])
        message = refuses(build(a=shared, b=shared), "a", fresh)
        assert message.startswith("'a' is tied to 'b' (the same Module), which is not selected;")

    def test_a_frozen_tie_is_a_tie(self):
        shared = nn.Linear(1, 1)
        shared.freeze()
        assert "is tied to" in refuses(build(a=shared, b=shared), "a", fresh)

    def test_the_paths_of_an_aliased_place_go_together(self):
        block = build(act=nn.ReLU())
        model = build(a=block, b=block)
        factory = Recorder()
        report = replace_layers(model, "*.act", factory)
        assert factory.paths == ["a.act"]
        assert list(report) == ["a.act", "b.act"]
        assert report["a.act"] is report["b.act"] is block.act

    def test_a_part_of_the_paths_of_an_aliased_place_is_refused(self):
        block = build(act=nn.ReLU())
        assert refuses(build(a=block, b=block), "a.act", fresh) == (
            "'a.act' and 'b.act' are the same place, because a module or list that contains it is "
            "shared; select both paths, or neither (exclude='a.act')"
        )

    def test_a_shared_list_is_an_alias_as_well(self):
        layers = [nn.ReLU()]
        message = refuses(build(a=layers, b=layers), "a.0", fresh)
        assert message.startswith("'a.0' and 'b.0' are the same place, because a module or list")

    def test_the_paths_of_an_aliased_place_go_together_in_a_partial_dict_too(self):
        block = build(act=nn.ReLU())
        model, tanh = build(a=block, b=block), nn.Tanh()
        assert repr(partial_modules(model, {"a.act": tanh, "b.act": tanh})) == (
            "{'a': {'act': Tanh()}, 'b': {'act': Tanh()}}"
        )
        with pytest.raises(SelectionError) as error:
            partial_modules(model, {"b.act": tanh, "a.act": nn.Tanh()})
        assert str(error.value) == (
            "'a.act' and 'b.act' are the same place, because a module or list that contains it is "
            "shared; give both paths the same module"
        )

    def test_select_does_not_judge(self):
        shared = nn.Linear(1, 1)
        assert list(select(build(a=shared, b=shared), "a")) == ["a"]

    def test_a_layer_that_is_also_in_a_wrapper_elsewhere_is_tied(self):
        layer = nn.Linear(2, 2)
        model = build(a=Wrapper(layer), b=layer)
        assert "'b' is tied to 'a' (the same Linear)" in refuses(model, "b", fresh)
        assert "'a' is tied to 'b' (the same Wrapper)" in refuses(model, "a", fresh)
        assert refuses(model, {"a": fresh, "b": around}) == (
            "'a', 'b' are the same Wrapper, but different rules decide about them: 'a', 'b'; "
            "let one rule match all of these paths first"
        )
        factory = Recorder()  # the layer and the wrapper are two modules, and it may want both
        assert list(replace_layers(model, "*", factory)) == factory.paths == ["a", "b"]


class TestNesting:
    """5. No place that changes lies inside another that changes."""

    def test_an_inner_and_an_outer_place_are_both_named(self):
        assert refuses(Model(), ["layers.1", "layers.1.attn"], fresh) == (
            "'layers.1.attn' lies inside 'layers.1', and both would change; exclude the inner one "
            "(exclude='layers.1.attn'), or select only 'layers.1'"
        )

    def test_nesting_is_found_many_levels_down(self):
        model = build(a=build(b=[{"c": build(d=[nn.ReLU()])}]))
        message = refuses(model, ["a", "a.b.0.c.d.0"], fresh)
        assert message.startswith("'a.b.0.c.d.0' lies inside 'a', and both would change")

    def test_nesting_is_found_through_an_alias(self):
        inner = build(x=nn.ReLU())
        model = build(a=build(inner=inner), b=inner)
        assert "lies inside" in refuses(model, ["a", "**.x"], fresh)

    def test_partial_modules_refuses_a_nested_path(self):
        model = Model()
        with pytest.raises(SelectionError, match=r"'layers\.0\.attn' lies inside 'layers\.0'"):
            partial_modules(model, {"layers.0": nn.ReLU(), "layers.0.attn": nn.ReLU()})

    @pytest.mark.parametrize(("outer", "inner"), [("a.x", "b.x.q"), ("b.x", "a.x.q")])
    def test_partial_modules_refuses_a_nested_path_through_an_alias(self, outer, inner):
        shared = build(x=build(q=nn.ReLU()))
        model = build(a=shared, b=shared)
        with pytest.raises(SelectionError, match=f"'{inner}' lies inside '{outer}'"):
            partial_modules(model, {outer: nn.Tanh(), inner: nn.Tanh()})

    def test_nesting_is_found_under_an_empty_name(self):
        model = build()
        dict.__setitem__(model, "", build(x=nn.ReLU()))
        message = refuses(model, ["**"], fresh)
        assert message.startswith("'.x' lies inside '', and both would change")

    def test_a_factory_that_returns_what_it_was_given_changes_nothing(self):
        model = Model()
        before = Snapshot(model)
        report = replace_layers(model, "**", unchanged)
        assert before.differences() == []
        assert len(report) == 0
        assert str(report) == "nothing changed"

    def test_two_stars_with_a_choosy_factory_are_fine(self):
        model = Model()
        report = replace_layers(model, "**", lambda p, m: Holder() if type(m) is Block else m)
        assert list(report) == ["layers.0", "layers.1", "layers.2"]

    def test_a_neighbour_whose_name_begins_alike_is_not_inside(self):
        model = build(a=build(x=nn.ReLU()), a2=build(x=nn.ReLU()))
        assert list(replace_layers(model, ["a", "a2.x"], fresh)) == ["a", "a2.x"]


class TestNothingSilent:
    """6. Whatever does nothing is an error."""

    def test_a_pattern_that_matches_nothing(self):
        model = Model()
        assert misses(model, "attn", fresh) == "'attn' matches nothing; '**.attn' matches 3"

    def test_one_of_several_patterns_that_matches_nothing(self):
        assert misses(Model(), ["embed", "norm"], fresh).startswith("'norm' matches nothing")

    def test_an_exclude_that_removes_nothing(self):
        assert misses(Model(), "layers.*.attn", fresh, exclude="embed") == (
            "exclude 'embed' has no effect: it matches 1 module, but none of the 3 matched by "
            "'layers.*.attn'"
        )

    def test_an_exclude_that_matches_nothing(self):
        message = misses(Model(), "layers.*.attn", fresh, exclude=["layers.0.attn", "attn"])
        assert message.startswith("exclude 'attn' matches nothing")

    def test_an_exclude_is_judged_after_where(self):
        arguments = {"exclude": "layers.0.norm", "where": nn.Linear}
        assert misses(Model(), "layers.0.*", fresh, **arguments) == (
            "exclude 'layers.0.norm' has no effect: where=Linear rejects the only module that it "
            "would exclude: LayerNorm"
        )
        assert list(select(Model(), "layers.0.*", **arguments, strict=False)) == ["layers.0.attn"]

    def test_a_where_that_leaves_nothing(self):
        assert misses(Model(), "layers.*", fresh, where=nn.Linear) == (
            "where=Linear rejects all 3 modules that 'layers.*' matches: 3 Block; "
            "'layers.*.**' matches 3"
        )

    def test_a_where_without_a_name_is_shown_as_it_is(self):
        class Never:
            def __call__(self, path, module):
                assert isinstance(module, nn.Module)
                return False

            def __repr__(self):
                return "Never()"

        assert misses(Model(), "embed", fresh, where=Never()) == (
            "where=Never() rejects the only module that 'embed' matches: Embedding"
        )

    def test_an_index_behind_the_end_of_a_list_matches_nothing(self):
        assert list(select(Model(), "layers.{0,3}")) == ["layers.0"]

    def test_an_empty_list_of_patterns_is_an_error(self):
        assert misses(Model(), [], fresh) == (
            "no pattern was given; '**' matches every module of the model"
        )

    @pytest.mark.parametrize(
        ("model", "pattern", "said"),
        [
            (build(a=mx.zeros(1)), "a", "it is an array, not a module"),
            (build(a=fresh), "a", "it is a function, not a module"),
            (build(a=None), "a", "it is None, not a module"),
            (build(a=(nn.ReLU(),)), "a.0", "it is in a tuple, and MLX sees modules in lists and"),
            (build(a=[nn.ReLU()]), "a", "it is a list of 1, not a module"),
        ],
    )
    def test_what_is_no_module_is_said_to_be_none(self, model, pattern, said):
        assert said in misses(model, pattern, fresh)

    def test_what_is_suggested_matches(self):
        model = Model()
        for wrong in ["layer.0.attn", "layers.attn", "layers.9.attn", "Embed"]:
            message = misses(model, wrong, fresh)
            *_, suggestion, count = message.rpartition("; ")[2].split("'", 2)
            assert f" matches {len(select(model, suggestion))}" == count

    def test_not_strict_skips_what_does_not_match(self):
        model = Model()
        report = replace_layers(
            model, ["nothing", "layers.*.attn"], fresh, exclude=["embed", "no"], strict=False
        )
        assert len(report) == 3
        assert not replace_layers(model, "embed", fresh, where=nn.ReLU, strict=False)
        assert not replace_layers(model, {"nothing": fresh}, strict=False)
        assert not select(model, "nothing", strict=False)

    def test_a_path_that_leads_nowhere_is_no_place_of_a_partial_dict(self):
        with pytest.raises(NoMatchError, match=r"there is no module at 'layers\.3'"):
            partial_modules(Model(), {"layers.3": nn.ReLU()})

    def test_two_places_that_print_the_same_path_are_refused_when_they_would_change(self):
        model = build(d={0: nn.ReLU(), "0": nn.ReLU()}, other=nn.ReLU())
        assert "2 places have the path 'd.0'" in refuses(model, "d.*", fresh)
        with pytest.raises(SelectionError, match=r"2 places have the path 'd\.0'"):
            partial_modules(model, {"d.0": nn.ReLU()})
        assert list(replace_layers(model, "other", fresh)) == ["other"]


class TestTrainingMode:
    """7. New modules take the mode of the old ones; frozen state is not carried."""

    @pytest.mark.parametrize("mode", [True, False])
    def test_all_that_the_swap_brings_in_takes_the_mode_of_what_was_there(self, mode):
        model = Model()
        model.train(mode)

        def opposite(path, module):
            new = Holder([Holder(), {"x": nn.Dropout()}])
            new.train(not mode)
            return new

        replace_layers(model, "layers.*.attn", opposite)
        assert {module.training for module in model.modules()} == {mode}

    def test_a_module_that_sets_its_mode_in_its_own_way_is_asked_to(self):
        class Own(nn.Module):
            def _set_training_mode(self, mode):
                super()._set_training_mode(mode)
                self.told = mode

        if not hasattr(nn.Module, "_set_training_mode"):
            pytest.skip("this MLX has no such method")
        model = Model()
        model.eval()
        report = replace_layers(model, "embed", lambda path, module: Own())
        assert vars(report["embed"])["told"] is False

    def test_each_takes_the_mode_of_its_own_predecessor(self):
        model = Model()
        model.layers[1].eval()
        replace_layers(model, "layers.*.attn", fresh)
        assert [layer.attn.training for layer in model.layers] == [True, False, True]

    def test_a_module_without_a_mode_is_taken_to_be_in_training(self):
        class Bare(nn.Module):
            def __init__(self):
                pass  # does not call `super().__init__()`

        model = build(a=nn.ReLU(), b=Bare(), c=nn.ReLU())
        model.a.eval()
        replace_layers(model, "*", lambda path, module: nn.Tanh().train(path == "a"))
        assert [model.a.training, model.b.training, model.c.training] == [False, True, True]

    def test_what_was_in_the_model_already_keeps_its_own(self):
        model = Model()
        model.embed.eval()
        model.layers[0].eval()
        model.layers[0].attn.train()
        wrapped = model.layers[0].attn
        replace_layers(model, "layers.0", lambda p, m: Holder([wrapped, model.embed]))
        assert not model.layers[0].training
        assert wrapped.training
        assert not model.embed.training

    def test_a_module_for_two_places_takes_the_mode_of_the_first(self):
        model = build(a=nn.ReLU(), b=nn.ReLU())
        model.a.eval()
        one = Holder()
        replace_layers(model, "*", lambda path, module: one)
        assert model.a is model.b is one
        assert not one.training

    def test_what_two_new_modules_hold_takes_the_mode_of_the_first_as_well(self):
        model = build(a=nn.ReLU(), b=nn.ReLU(), c=nn.ReLU())
        model.b.eval()
        shared = Holder([nn.ReLU(), Holder(nn.ReLU())])
        replace_layers(model, "*", lambda path, module: Holder([nn.Tanh(), shared]))
        assert [model.a.training, model.b.training, model.c.training] == [True, False, True]
        assert {module.training for module in shared.modules()} == {True}
        assert [one.inner[0].training for one in (model.a, model.b, model.c)] == [True, False, True]

    def test_frozen_state_is_not_carried(self):
        model = Model()
        model.freeze()
        replace_layers(model, "layers.0.attn", around)
        assert [name for name, _ in tree_flatten(model.trainable_parameters())] == [
            "layers.0.attn.weight"
        ]

    def test_a_new_module_that_is_frozen_stays_frozen(self):
        model = Model()
        frozen = nn.Linear(4, 4)
        frozen.freeze()
        replace_layers(model, "layers.0.attn", lambda path, module: frozen)
        assert frozen._no_grad == {"weight", "bias"}

    def test_a_wrapper_of_a_module_of_the_model_leaves_its_mode_alone(self):
        model = build(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
        model.b.eval()
        replace_layers(model, "a", lambda path, module: Wrapper(model.b))
        assert not model.b.training

    def test_a_factory_that_deletes_a_part_of_the_model_does_not_hide_what_it_makes(self):
        model = build(a=nn.Identity(), junk=[nn.Identity() for _ in range(50)])
        model.eval()

        def deleting(path: str, module: nn.Module) -> nn.Module:
            del model.junk
            return nn.Sequential(*[nn.Identity() for _ in range(60)])

        replace_layers(model, "a", deleting)
        assert not any(module.training for _, module in model.named_modules())


class TestRules:
    """8. The first rule that matches decides, once."""

    def test_the_first_rule_that_matches_decides_about_a_place(self):
        model = Model()
        replace_layers(model, {"layers.0.attn": fresh, "layers.*.attn": around})
        assert ["inner" in layer.attn for layer in model.layers] == [False, True, True]

    def test_none_leaves_a_place_alone(self):
        model = Model()
        last = model.layers[-1].attn
        report = replace_layers(model, {"layers[-1].**": None, "layers.*.attn": fresh})
        assert list(report) == ["layers.0.attn", "layers.1.attn"]
        assert model.layers[-1].attn is last

    def test_no_rule_sees_what_another_put_in(self):
        model = build(a=nn.ReLU())
        factory = Recorder(around)
        replace_layers(model, {"a": factory, "a.inner": factory}, strict=False)
        assert factory.paths == ["a"]
        assert type(model.a.inner) is nn.ReLU

    def test_a_rule_that_matches_nothing_is_an_error(self):
        message = misses(Model(), {"embed": fresh, "nothing": None})
        assert message.startswith("'nothing' matches nothing")

    def test_a_rule_that_is_wholly_shadowed_is_an_error(self):
        assert misses(Model(), {"layers.*.attn": fresh, "layers[0].attn": None}) == (
            "rule 'layers[0].attn' never applies: earlier rules already match its only module; "
            "remove it, or move it up"
        )

    def test_shadowing_is_judged_after_where(self):
        def is_the_first(path, module):
            return path == "layers.0.attn"

        rules = {"layers.0.*": fresh, "layers[0:2].*": fresh}
        assert misses(Model(), rules, where=is_the_first) == (
            "rule 'layers[0:2].*' never applies: earlier rules already match the only one of its "
            "modules that where=is_the_first accepts; remove it, or move it up"
        )
        report = replace_layers(Model(), rules, where=is_the_first, strict=False)
        assert list(report) == ["layers.0.attn"]

    def test_rules_that_do_nothing_are_skipped_if_not_strict(self):
        rules = {"layers.*.attn": fresh, "layers[0].attn": fresh, "nothing": fresh}
        assert len(replace_layers(Model(), rules, strict=False)) == 3

    def test_rules_and_a_factory_do_not_go_together(self):
        with pytest.raises(TypeError, match="rules hold their own factories"):
            replace_layers(Model(), {"embed": fresh}, fresh)


class TestNoPinning:
    """9. The library keeps no replaced module; `swapped` does until it puts them back."""

    @pytest.fixture(autouse=True)
    def _no_collector(self):
        gc.collect()
        gc.disable()
        yield
        gc.enable()

    def test_a_replaced_module_is_gone_at_once(self):
        model = Model()
        old = weakref.ref(model.embed)
        report = replace_layers(model, "embed", fresh)
        assert old() is None
        assert str(report).startswith("embed   Embedding -> Holder   x1")

    def test_swapped_puts_the_identical_modules_back(self):
        model = Model()
        before = Snapshot(model)
        with swapped(model, "layers.*.attn", fresh) as report:
            assert isinstance(report, Replacement)
            assert all(type(layer.attn) is Holder for layer in model.layers)
        assert before.differences() == []

    def test_swapped_puts_them_back_also_on_an_exception(self):
        model = Model()
        before = Snapshot(model)
        with pytest.raises(ZeroDivisionError), swapped(model, "embed", fresh):
            raise ZeroDivisionError
        assert before.differences() == []

    def test_swapped_puts_them_back_also_on_a_keyboard_interrupt(self):
        model = Model()
        before = Snapshot(model)
        with pytest.raises(KeyboardInterrupt), swapped(model, "embed", fresh):
            raise KeyboardInterrupt
        assert before.differences() == []

    def test_nested_swaps_are_undone_from_the_inside(self):
        model = Model()
        before = Snapshot(model)
        with swapped(model, "layers.0.attn", around), swapped(model, "layers.0.attn.inner", fresh):
            assert type(model.layers[0].attn.inner) is Holder
        assert before.differences() == []

    def test_a_mode_set_inside_stays_with_the_layers_that_were_there(self):
        model = Model()
        original = model.embed
        with swapped(model, "embed", fresh):
            model.eval()
        assert model.embed is original
        assert model.embed.training
        assert not model.layers[0].training

    def test_a_place_changed_by_someone_else_is_left_as_it_is(self):
        model = Model()
        intruder = nn.ReLU()
        with pytest.raises(SelectionError) as caught, swapped(model, "layers.*.attn", fresh):
            model.layers[1].attn = intruder
        assert str(caught.value) == (modified("layers.1.attn"))
        assert [type(layer.attn) for layer in model.layers] == [nn.Linear, nn.ReLU, nn.Linear]

    def test_a_container_changed_by_someone_else_counts_as_well(self):
        model = Model()
        moved = "is no longer at its path, because a module that contains it was replaced"
        with pytest.raises(SelectionError, match=moved), swapped(model, "layers.*.attn", fresh):
            model.layers = list(model.layers)
        assert [type(layer.attn) for layer in model.layers] == [nn.Linear] * 3
        with pytest.raises(SelectionError, match=moved), swapped(model, "layers[-1].attn", around):
            model.layers.pop()

    def test_when_update_modules_cannot_put_back_the_new_modules_stay(self):
        class Lockable(nn.Module):
            locked = False

            def __setitem__(self, key, value):
                if self.locked:
                    raise KeyError("locked")
                dict.__setitem__(self, key, value)

        inner = Lockable()
        inner.act = nn.ReLU()
        model = build(first=nn.ReLU(), inner=inner)

        def lock() -> None:
            with swapped(model, ["first", "inner.act"], fresh):
                snapshots.append(Snapshot(model))
                Lockable.locked = True

        snapshots: list[Snapshot] = []
        with pytest.raises(
            SelectionError, match=r"'inner\.act' was modified inside the block and left"
        ):
            lock()
        assert type(model.first) is nn.ReLU

    def test_an_error_raised_in_the_body_wins(self):
        model = Model()

        def spoil() -> None:
            with swapped(model, "embed", fresh):
                model.embed = nn.ReLU()
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError) as caught:
            spoil()
        assert caught.value.__notes__ == [modified("embed")]

    def test_a_swap_that_fails_at_once_does_not_run_the_body(self):
        with pytest.raises(NoMatchError), swapped(Model(), "nothing", fresh):
            raise AssertionError

    def test_an_interrupt_while_swapped_puts_things_back_does_not_stop_it(self):
        writes: list[str] = []

        class Interrupted(nn.Module):
            def __setitem__(self, key, value):
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


class TestLimits:
    """10. Cycles, and models that MLX itself cannot go down."""

    def test_the_number_of_paths_is_limited(self, monkeypatch):
        shared = Holder()
        model = build(first=shared, last=shared)  # three paths, with that of the model itself
        monkeypatch.setattr("mlx_modswap._model.sharing._MOST_PATHS", 2)
        assert refuses(model, "*", fresh) == (
            "more than 2 paths lead through this model: shared modules hold other shared modules, "
            "at many levels"
        )
        monkeypatch.setattr("mlx_modswap._model.sharing._MOST_PATHS", 3)
        assert list(replace_layers(model, "*", fresh)) == ["first", "last"]

    def test_a_cycle_is_refused(self):
        model = build(a=build(b=[nn.ReLU()]))
        model.a.b.append(model.a)
        with pytest.raises(SelectionError) as caught:
            replace_layers(model, "a.b.0", fresh)
        assert str(caught.value) == "the model contains a cycle: 'a.b.1' is 'a' again"

    def test_a_new_module_that_holds_the_model_is_refused(self):
        model = build(a=nn.ReLU(), b=nn.ReLU())
        assert refuses(model, "a", lambda path, module: Holder(model)) == (
            "the model contains a cycle: 'a.inner' is the model itself again"
        )

    def test_a_new_module_that_holds_one_around_its_place_is_refused(self):
        model = build(a=build(b=[nn.ReLU()]))
        message = refuses(model, "a.b.0", lambda path, module: Holder([model.a]))
        assert message == "the model contains a cycle: 'a.b.0.inner.0' is 'a' again"

    def test_two_new_modules_that_hold_one_another_are_refused(self):
        one, two = Holder(), Holder()
        one.other, two.other = two, one
        model = build(a=nn.ReLU(), b=nn.ReLU())
        message = refuses(model, "*", lambda path, module: one if path == "a" else two)
        assert message == "the model contains a cycle: 'a.other.other' is 'a' again"

    def test_a_new_module_that_holds_the_layer_of_a_wrapper_around_its_place_is_refused(self):
        layer = build(a=nn.ReLU())
        message = refuses(Wrapper(layer), "a", lambda path, module: Holder(layer))
        assert message == "the model contains a cycle: 'a.inner' is the model itself again"

        model = build(b=Wrapper(layer))
        message = refuses(model, "b.a", lambda path, module: Holder(layer))
        assert message == "the model contains a cycle: 'b.a.inner' is 'b' again"

    @pytest.mark.parametrize("length", [1, 2, 3, 4])
    def test_a_cycle_inside_a_new_module_is_refused(self, length):
        new, ring = Holder(), [Holder() for _ in range(length)]
        new.inner = ring[0]
        for one, next_one in zip(ring, ring[1:] + ring[:1]):
            one.inner = next_one
        assert refuses(build(a=nn.ReLU()), "a", lambda path, module: new) == (
            f"the model contains a cycle: 'a.inner{'.inner' * length}' is 'a.inner' again"
        )

    def test_two_places_that_each_take_in_the_other_are_refused(self):
        model = build(a=build(x=nn.ReLU()), b=build(x=nn.ReLU()))
        others = {"a.x": model.b, "b.x": model.a}
        assert "contains a cycle" in refuses(model, "*.x", lambda path, module: others[path])

    def test_a_wrapper_around_the_old_module_is_no_cycle(self):
        model = Model()
        assert len(replace_layers(model, "layers.*", around)) == 3

    def test_a_model_deeper_than_update_modules_can_go_is_refused_and_select_still_works(self):
        model = deep = build(first=nn.ReLU())
        for _ in range(2000):
            deep.down = build()
            deep = deep.down
        deep.act = nn.ReLU()
        path = "down." * 2000 + "act"
        assert list(select(model, "**.act")) == [path]
        before = Snapshot(model)
        with pytest.raises(SelectionError) as caught:
            replace_layers(model, ["first", "**.act"], fresh)
        assert str(caught.value) == (
            "a place that is 2001 levels deep cannot be changed: MLX's update_modules goes down "
            "by recursion, which Python limits (sys.setrecursionlimit); nothing was changed"
        )
        assert before.differences() == []
        assert list(replace_layers(model, "first", fresh)) == ["first"]

    def test_a_swap_with_little_of_the_stack_left_changes_nothing(self):
        model = deep = build(first=nn.ReLU())
        for _ in range(200):
            deep.down = build()
            deep.act = nn.ReLU()
            deep = deep.down

        def swap_below(frames: int) -> None:
            if frames:
                swap_below(frames - 1)
            else:
                replace_layers(model, "**.act", lambda path, module: nn.Tanh())

        before = Snapshot(model)
        for frames in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit(), 10):
            with pytest.raises((SelectionError, RecursionError)):
                swap_below(frames)
            assert before.differences() == []
        swap_below(0)
        assert len(select(model, "**.act", where=nn.Tanh)) == 200

    def test_a_place_behind_the_limit_is_no_obstacle_to_others(self):
        model = deep = build(first=nn.ReLU())
        for _ in range(2000):
            deep.down = [build()]
            deep = deep.down[0]
        with swapped(model, "first", around):
            assert type(model.first) is Holder
        assert type(model.first) is nn.ReLU
