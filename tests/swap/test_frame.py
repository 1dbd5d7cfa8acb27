"""Only the places that were named change: everything else is the identical object."""

from __future__ import annotations

import mlx.nn as nn
from mlx.utils import tree_flatten
from models import Holder, Model, around, build, fresh
from oracle import Snapshot

from mlx_modswap import replace_layers, select, swapped


def test_only_named_places_change():
    model = Model()
    before = Snapshot(model)
    report = replace_layers(model, "layers.*.mlp", fresh)
    targets = {(id(layer), "mlp") for layer in model.layers}
    assert before.differences(but=targets) == []
    assert list(report) == ["layers.0.mlp", "layers.1.mlp", "layers.2.mlp"]
    assert all(layer.mlp is report[f"layers.{i}.mlp"] for i, layer in enumerate(model.layers))


def test_exclude_and_where_narrow_the_places():
    model = Model()
    before = Snapshot(model)
    replace_layers(model, "layers.*.*", fresh, exclude="layers[0].**", where=nn.Linear)
    targets = {(id(model.layers[1]), "mlp"), (id(model.layers[2]), "mlp")}
    assert before.differences(but=targets) == []
    assert type(model.layers[1].mlp) is type(model.layers[2].mlp) is Holder


def test_layer_1_is_not_layer_10():
    model = Model(12)
    before = Snapshot(model)
    replace_layers(model, "layers.1", fresh)
    assert before.differences(but={(id(model.layers), 1)}) == []
    assert [i for i, layer in enumerate(model.layers) if type(layer) is Holder] == [1]


def test_none_and_functions_in_a_list_stay():
    model = Model()
    acts = model.layers[0].acts
    replace_layers(model, "layers.0.acts.0", fresh)
    assert model.layers[0].acts is acts
    assert type(acts[0]) is Holder
    assert acts[1:] == [None, nn.gelu]


def test_keys_keep_their_order():
    model = Model()
    replace_layers(model, ["heads.a", "embed"], fresh)
    assert list(model.heads) == ["b", "a", "10"]
    assert list(dict.keys(model)) == ["embed", "layers", "heads", "scale"]


def test_a_digit_key_of_a_dict_is_not_an_index():
    model = Model()
    before = Snapshot(model)
    replace_layers(model, "heads.10", fresh)
    assert before.differences(but={(id(model.heads), "10")}) == []


def test_other_parameters_keep_their_names_and_arrays():
    model = Model()
    before = dict(tree_flatten(model.parameters()))
    replace_layers(model, "layers.1.mlp", around)
    after = dict(tree_flatten(model.parameters()))
    ours = "layers.1.mlp."
    assert [k for k in before if not k.startswith(ours)] == [
        k for k in after if not k.startswith(ours)
    ]
    assert all(after[k] is before[k] for k in before if not k.startswith(ours))
    assert [k for k in after if k.startswith(ours)] == [
        ours + "weight",
        ours + "inner.weight",
        ours + "inner.bias",
    ]


def test_frozen_state_and_mode_stay_elsewhere():
    model = Model()
    model.layers[0].freeze()
    model.layers[2].eval()
    before = Snapshot(model)
    replace_layers(model, "layers.*.norm", fresh)
    assert before.differences(but={(id(layer), "norm") for layer in model.layers}) == []


def test_a_list_subclass_keeps_its_identity():
    class Chain(list):
        pass

    chain = Chain([nn.ReLU(), nn.ReLU()])
    model = build(chain=chain)
    replace_layers(model, "chain[-1]", fresh)
    assert model.chain is chain
    assert [type(m) for m in chain] == [nn.ReLU, Holder]


def test_methods_that_a_module_overrides_are_not_called():
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


def test_modules_of_the_model_can_be_permuted():
    model = build(layers=[nn.Linear(1, 1) for _ in range(4)])
    one, *others = model.layers
    turned = dict(zip(select(model, "layers.*"), [*others, one]))
    before = Snapshot(model)
    with swapped(model, "layers.*", lambda path, module: turned[path]):
        assert [id(layer) for layer in model.layers] == list(map(id, [*others, one]))
    assert before.differences() == []


def test_update_modules_is_called_once(monkeypatch):
    calls = []
    original = nn.Module.update_modules

    def counting(self, *arguments, **options):
        calls.append(arguments)
        return original(self, *arguments, **options)

    monkeypatch.setattr(nn.Module, "update_modules", counting)
    replace_layers(Model(), "layers.*.mlp", fresh)
    assert len(calls) == 1
