"""New modules take the training mode of the old ones; frozen state is not copied."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from models import Holder, Model, around, build, fresh

from mlx_modswap import Wrapper, replace_layers


@pytest.mark.parametrize("mode", [True, False])
def test_new_modules_take_the_mode_of_the_old(mode):
    model = Model()
    model.train(mode)

    def opposite(path, module):
        new = Holder([Holder(), {"x": nn.Dropout()}])
        new.train(not mode)
        return new

    replace_layers(model, "layers.*.mlp", opposite)
    assert {module.training for module in model.modules()} == {mode}


def test_each_takes_the_mode_of_its_predecessor():
    model = Model()
    model.layers[1].eval()
    replace_layers(model, "layers.*.mlp", fresh)
    assert [layer.mlp.training for layer in model.layers] == [True, False, True]


def test_a_module_may_set_its_mode_in_its_own_way():
    class Own(nn.Module):
        def _set_training_mode(self, mode):
            super()._set_training_mode(mode)
            self.mode_set = mode

    model = Model()
    model.eval()
    report = replace_layers(model, "embed", lambda path, module: Own())
    assert vars(report["embed"])["mode_set"] is False


def test_a_module_without_a_mode_is_in_training():
    class Bare(nn.Module):
        def __init__(self):
            pass  # does not call `super().__init__()`

    model = build(a=nn.ReLU(), b=Bare(), c=nn.ReLU())
    model.a.eval()
    replace_layers(model, "*", lambda path, module: nn.Tanh().train(path == "a"))
    assert [model.a.training, model.b.training, model.c.training] == [False, True, True]


def test_modules_of_the_model_keep_their_mode():
    model = Model()
    model.embed.eval()
    model.layers[0].eval()
    model.layers[0].mlp.train()
    wrapped = model.layers[0].mlp
    replace_layers(model, "layers.0", lambda p, m: Holder([wrapped, model.embed]))
    assert not model.layers[0].training
    assert wrapped.training
    assert not model.embed.training


def test_a_wrapped_module_of_the_model_keeps_its_mode():
    model = build(a=nn.Linear(2, 2), b=nn.Linear(2, 2))
    model.b.eval()
    replace_layers(model, "a", lambda path, module: Wrapper(model.b))
    assert not model.b.training


def test_a_module_for_two_places_takes_the_first_mode():
    model = build(a=nn.ReLU(), b=nn.ReLU())
    model.a.eval()
    one = Holder()
    replace_layers(model, "*", lambda path, module: one)
    assert model.a is model.b is one
    assert not one.training


def test_a_part_of_two_new_modules_takes_the_first_mode():
    model = build(a=nn.ReLU(), b=nn.ReLU(), c=nn.ReLU())
    model.b.eval()
    shared = Holder([nn.ReLU(), Holder(nn.ReLU())])
    replace_layers(model, "*", lambda path, module: Holder([nn.Tanh(), shared]))
    assert [model.a.training, model.b.training, model.c.training] == [True, False, True]
    assert {module.training for module in shared.modules()} == {True}
    assert [one.inner[0].training for one in (model.a, model.b, model.c)] == [True, False, True]


def test_a_factory_that_deletes_part_of_the_model():
    model = build(a=nn.Identity(), junk=[nn.Identity() for _ in range(50)])
    model.eval()

    def deleting(path: str, module: nn.Module) -> nn.Module:
        del model.junk
        return nn.Sequential(*[nn.Identity() for _ in range(60)])

    replace_layers(model, "a", deleting)
    assert not any(module.training for _, module in model.named_modules())


def test_frozen_state_is_not_copied():
    model = Model()
    model.freeze()
    replace_layers(model, "layers.0.mlp", around)
    assert [name for name, _ in tree_flatten(model.trainable_parameters())] == [
        "layers.0.mlp.weight"
    ]


def test_a_new_module_that_is_frozen_stays_frozen():
    model = Model()
    frozen = nn.Linear(4, 4)
    frozen.freeze()
    replace_layers(model, "layers.0.mlp", lambda path, module: frozen)
    assert frozen._no_grad == {"weight", "bias"}
