"""Every architecture of mlx-lm: select, swap, wrap, draw, run and put back.

Each model is built once, for all of these tests: none of them leaves it another one.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import oracle
import pytest
import zoo
from mlx.utils import tree_flatten

from mlx_modswap import (
    Wrapper,
    capture,
    observe,
    partial_modules,
    patch,
    select,
    swapped,
    tree,
)

INSTALLED = zoo.installed()
BUILT = [name for name in zoo.ZOO if zoo.ZOO[name].get("module", name) in INSTALLED]
RUNNING = [name for name in BUILT if "no_forward" not in zoo.ZOO[name]]
WITHOUT = {("olmo", "attention"), ("prism_hadamard_qwen35", "embedding")}
# What no hook sees, since nobody calls it: what is used by its weights, by another method or as
# a list, and one expert that gets none of the few tokens.
NEVER_CALLED = {
    "cohere2": ["model.layers[3].self_attn.rope"],
    "dbrx": ["transformer.blocks[2].ffn.experts[0]", "transformer.blocks[2].ffn.experts[0].*"],
    "exaone": ["transformer.h.*.attn"],
    "gemma3n": ["model.language_model.layers.*.altup"],
    "iquestloopcoder": ["model.layers.*", "model.layers.*.self_attn"],
    "kimi_k3": [
        "language_model.model.layers.*.{self_attention,mlp}_res_{proj,norm}",
        "language_model.model.output_attn_res_{proj,norm}",
    ],
    "minimax_m3_vl": ["language_model.model.layers[1:].self_attn.index_q_{proj,norm}"],
    "plamo": ["model.layers"],
    "rwkv7": ["model.layers.*.attn.*_lora.activation"],
}
ATTENTION = re.compile(r".*(attn|attention|mixer|temporal_block|self_attn\.\d+)")
every_model = pytest.mark.parametrize("name", BUILT)


class Recorder(Wrapper):
    """Stands in for a layer, and counts its calls."""

    def __init__(self, layer: nn.Module):
        super().__init__(layer)
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return super().__call__(*args, **kwargs)


class Frame:
    """All that a model holds, by container and key, to see later where it has changed."""

    def __init__(self, model: nn.Module):
        self.then = list(contents(model))

    def changes(self, model: nn.Module) -> set[tuple[int, Any]]:
        """The place ``(id(container), key)`` of everything that is another object than before.

        Whatever else has changed fails here: which containers there are, the order and number of
        keys, what is frozen, plain attributes and training flags.
        """
        replaced = set()
        for container, items, state in self.then:
            now, state_now = items_of(container), state_of(container)
            assert state_now == state
            assert [key for key, _ in now] == [key for key, _ in items]
            for (key, old), (_, new) in zip(items, now):
                if new is not old:
                    replaced.add((id(container), key))
        if not replaced:
            assert [id(c) for c, *_ in contents(model)] == [id(c) for c, *_ in self.then]
        return replaced


def contents(container: Any) -> Iterator[tuple[Any, list[tuple[Any, Any]], Any]]:
    """Every container of a model, with what it holds, once for each way to it."""
    yield container, items_of(container), state_of(container)
    for _, value in items_of(container):
        if isinstance(value, (dict, list)):
            yield from contents(value)


def items_of(container: Any) -> list[tuple[Any, Any]]:
    return list(container.items() if isinstance(container, dict) else enumerate(container))


def state_of(container: Any) -> Any:
    if not isinstance(container, nn.Module):
        return type(container)
    attributes = {key: id(value) for key, value in vars(container).items()}
    return type(container), attributes, set(vars(container).get("_no_grad", ()))


def places(container: Any, prefix: str = "") -> Iterator[tuple[str, nn.Module, Any, Any]]:
    """The path, module, container and key of each place, as the model is written."""
    for key, value in items_of(container):
        if isinstance(value, nn.Module):
            yield f"{prefix}{key}", value, container, key
        if isinstance(value, (dict, list)):
            yield from places(value, f"{prefix}{key}.")


@pytest.fixture(autouse=True, scope="module")
def on_the_cpu():
    with mx.stream(mx.cpu):
        yield


@functools.cache
def model_of(name: str) -> Any:
    return zoo.build(name)


@functools.cache
def output_of(name: str) -> mx.array:
    return zoo.run(name, model_of(name))


def is_leaf(path: str, module: nn.Module) -> bool:
    return not module.children()


def is_linear_leaf(path: str, module: nn.Module) -> bool:
    return is_leaf(path, module) and "Linear" in type(module).__name__


def is_attention(path: str, module: nn.Module) -> bool:
    outermost = not path.endswith("attn.attention")
    return outermost and not is_leaf(path, module) and ATTENTION.fullmatch(path) is not None


# What the zoo holds


def test_the_zoo_knows_every_architecture_of_the_mlx_lm_that_it_was_made_for():
    if version("mlx-lm") != zoo.MADE_FOR:
        pytest.skip(f"the zoo was made for mlx-lm {zoo.MADE_FOR}, this is {version('mlx-lm')}")
    assert set(INSTALLED) == set(zoo.ARCHITECTURES)


def test_at_least_120_architectures_are_built_and_118_run():
    built = [name for name in BUILT if name in zoo.ARCHITECTURES and model_of(name)]
    ran = [name for name in RUNNING if name in built and output_of(name).size]

    assert len(built) >= 120
    assert len(ran) >= 118


def test_the_architectures_that_cannot_run_here_are_known_by_name():
    reasons = {name: zoo.ZOO[name]["no_forward"] for name in BUILT if name not in RUNNING}

    assert reasons == {
        "bitnet": "its BitLinear is a Metal kernel",
        "deepseek_v3@pipeline": "a pipeline sends its output to the next machine",
        "muse_spark": "it runs a Metal kernel",
        "qwen3_next@pipeline": "a pipeline sends its output to the next machine",
    }


# What the library does with each


@every_model
def test_select_finds_every_leaf_in_definition_order(name):
    model = model_of(name)
    leaves = [(path, module) for path, module, *_ in places(model) if is_leaf(path, module)]

    assert by_identity(select(model, "**").items()) == modules_in(model)
    assert by_identity(select(model, "**", where=is_leaf).items()) == by_identity(leaves)


@every_model
def test_every_path_used_as_a_pattern_selects_its_own_place(name):
    model = model_of(name)
    for path, module, *_ in places(model):
        selected = select(model, path)

        assert selected[path] is module
        assert list(selected) == [path] or "*" in path or "?" in path


@every_model
def test_a_swap_and_its_undo_touch_no_other_place(name):
    model = model_of(name)
    frame = Frame(model)
    targets = linear_places(model)

    with swapped(model, "**", record, where=is_linear_leaf) as news:
        assert list(news) == [path for path, *_ in targets]
        assert frame.changes(model) == {(id(c), key) for *_, c, key in targets}
        assert all(c[key] is news[path] for path, _, c, key in targets)
    assert frame.changes(model) == set()


@every_model
def test_selected_modules_are_put_in_and_back_by_hand(name):
    model = model_of(name)
    frame = Frame(model)
    targets = linear_places(model)
    originals = select(model, "**", where=is_linear_leaf)
    recorders = {path: Recorder(layer) for path, layer in originals.items()}

    model.update_modules(partial_modules(model, recorders))
    assert frame.changes(model) == {(id(c), key) for *_, c, key in targets}
    model.update_modules(partial_modules(model, originals))
    assert frame.changes(model) == set()


@pytest.mark.parametrize("name", RUNNING)
def test_the_output_is_the_same_with_every_linear_layer_wrapped(name):
    model = model_of(name)
    modules = modules_in(model)

    with swapped(model, "**", record, where=is_linear_leaf) as news:
        assert zoo.same(zoo.run(name, model), output_of(name))
        assert any(layer.calls for layer in news.values())
        assert_weights_are_loaded(model, parameters_of(name))
    assert modules_in(model) == modules


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (name, kind)
        for name in RUNNING
        for kind in ("embedding", "attention", "block")
        if (name, kind) not in WITHOUT
    ],
)
def test_the_output_is_the_same_with_wrapped_parts_of_other_kinds(name, kind):
    model = model_of(name)
    modules = modules_in(model)
    blocks = set(map(id, model.layers))
    where = {
        "embedding": nn.Embedding,
        "attention": is_attention,
        "block": lambda path, module: id(module) in blocks,
    }[kind]

    with swapped(model, "**", lambda path, layer: Wrapper(layer), where=where):
        assert zoo.same(zoo.run(name, model), output_of(name))
        assert_weights_are_loaded(model, parameters_of(name))
    assert modules_in(model) == modules


@pytest.mark.parametrize("name", RUNNING)
def test_the_output_is_the_same_while_every_module_is_listened_to(name):
    model = model_of(name)
    modules = modules_in(model)

    with capture(model, "**") as outputs:
        assert zoo.same(zoo.run(name, model), output_of(name))
    assert list(outputs) == [path for path, _ in modules]
    assert any(outputs.values())
    assert modules_in(model) == modules


@pytest.mark.parametrize("name", RUNNING)
def test_hooks_of_every_module_leave_the_output_and_count_what_is_called(name):
    model = model_of(name)
    modules = modules_in(model)

    with (
        capture(model, "**", where=is_linear_leaf) as outputs,
        patch(model, "**", lambda path, output: output),
        observe(model, "**", lambda path, output, *args, **kwargs: None) as calls,
    ):
        assert zoo.same(zoo.run(name, model), output_of(name))
    assert modules_in(model) == modules
    assert {path: len(of_one) for path, of_one in outputs.items()} == {
        path: count for path, count in calls.items() if path in outputs
    }
    never_called = [path for path, count in calls.items() if count == 0]
    assert never_called == list(select(model, NEVER_CALLED.get(name, ()), strict=False))


@every_model
def test_hooks_that_never_run_touch_nothing(name):
    model = model_of(name)
    frame = Frame(model)
    with capture(model, "**", strict=False):
        pass

    assert frame.changes(model) == set()


@every_model
def test_the_picture_of_a_swap_selects_what_has_changed(name):
    model, chance = model_of(name), random.Random(name)

    def some_leaves(path: str, layer: nn.Module) -> bool:
        return is_leaf(path, layer) and bool(layer.parameters()) and chance.random() < 0.7

    with swapped(model, "**", lambda path, layer: nn.Identity(), where=some_leaves) as replacement:
        changes = replacement.changes
        found = [path for change in changes for path in select(model, change.pattern)]
        assert sorted(found) == sorted(replacement)


@every_model
def test_its_picture_fits_on_a_screen_and_counts_every_parameter(name):
    model = model_of(name)
    picture = tree(model)
    lines = str(picture).splitlines()

    assert len(lines) <= 40
    assert max(map(len, lines)) <= 180
    assert picture._rows[0].measure.params == oracle.parameters(model)


def test_after_all_of_this_each_model_computes_what_it_did():
    for name in RUNNING:
        assert zoo.same(zoo.run(name, model_of(name)), output_of(name)), name


@functools.cache
def parameters_of(name: str) -> list[str]:
    return [path for path, _ in tree_flatten(model_of(name).parameters())]


def assert_weights_are_loaded(model: nn.Module, names: list[str]) -> None:
    """The names of the parameters are still these, and such weights are strictly loaded."""
    weights: Any = tree_flatten(model.parameters())
    assert [path for path, _ in weights] == names
    model.load_weights(weights, strict=True)


def record(path: str, layer: nn.Module) -> nn.Module:
    return Recorder(layer)


def linear_places(model: nn.Module) -> list[tuple[str, nn.Module, Any, Any]]:
    return [place for place in places(model) if is_linear_leaf(*place[:2])]


def modules_in(model: nn.Module) -> list[tuple[str, int]]:
    """What a run of the model leaves alone: some of them keep new arrays each time."""
    return by_identity((path, module) for path, module, *_ in places(model))


def by_identity(modules: Iterable[tuple[str, nn.Module]]) -> list[tuple[str, int]]:
    return [(path, id(module)) for path, module in modules]
