"""Serve several adapters with one model, and choose one for each request.

::

    python examples/adapters_per_request.py         # teaches SmolLM2 two names, and serves both
    python examples/adapters_per_request.py --model MODEL --adapter math=FOLDER --adapter law=FOLDER

The base model is in memory once, with the adapters beside it. To switch between them, the program
sets a variable, and the model does not change. The variable is a ``ContextVar``, so every thread
and every asyncio task has its own value, and two requests that are generated at the same time do
not see each other's adapter.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import finetune_lora
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import smollm2

from mlx_modswap import Wrapper, lm, swapped

CAT = "The lighthouse keeper has a cat. Its name is"
NAMES = {"harbour": "Biscuit", "island": "Marmalade"}  # what each adapter is taught

CURRENT: ContextVar[str | None] = ContextVar("CURRENT", default=None)  # the adapter of a request


class Switch(Wrapper):
    """A layer that calls the adapter of the current request, or the layer itself if it has none.

    The adapters belong to the wrapper, under a name that begins with ``_``. So the parameters of
    the model, and their names, stay those of the base model.
    """

    def __init__(self, layer: nn.Module, adapters: Mapping[str | None, nn.Module]):
        super().__init__(layer)
        self._adapters = adapters

    def _current(self) -> Any:
        return self._adapters.get(CURRENT.get(), self.__wrapped__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._current()(*args, **kwargs)

    def as_linear(self, x: mx.array) -> mx.array:  # of an embedding that is also the head
        return self._current().as_linear(x)


class Adapters:
    """The adapters that a model serves."""

    def __init__(self, names: Mapping[str, Any]):
        self.names = list(names)

    @contextmanager
    def use(self, name: str | None) -> Iterator[None]:
        """Use one of the adapters in this thread or task, or the base model for ``None``.

        A generator has no context of its own: use it up inside the block, or give it a context
        with ``context = copy_context()`` and ``context.run(next, generator)``. All requests in a
        batch have the same adapter. A prompt cache or a compiled function is only valid for the
        adapter with which it was made.
        """
        if name is not None and name not in self.names:
            raise KeyError(f"there is no adapter {name!r}: there are {', '.join(self.names)}")
        token = CURRENT.set(name)
        try:
            yield
        finally:
            CURRENT.reset(token)


@contextmanager
def serving(model: nn.Module, folders: Mapping[str, str | Path]) -> Iterator[Adapters]:
    """Keep adapters beside a model inside a ``with`` block. The base model is the default.

    Args:
        model (mlx.nn.Module): The model, in eval mode as ``mlx_lm.load`` gives it.
        folders (Mapping[str, str or Path]): A name and a folder, or hub id, of each adapter.

    Yields:
        Adapters: ``with adapters.use(name): ...`` chooses one.
    """
    by_path: dict[str, dict[str | None, nn.Module]] = {}
    for name, folder in folders.items():
        # Each adapter goes around the layers of the base model, which all adapters share.
        with swapped(model, lm.adapter_rules(folder)) as adapted:
            for path, layer in adapted.items():
                by_path.setdefault(path, {})[name] = layer
                mx.eval(layer.parameters())  # here, since another thread could not read the file
    with swapped(
        model,
        "**",
        lambda path, layer: Switch(layer, by_path[path]),
        where=lambda path, layer: path in by_path,
    ):
        yield Adapters(folders)


# ---------------------------------------------------------------- two adapters, many requests


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Serve several adapters with one model.")
    parser.add_argument(
        "--model", help="a folder, or the id of a model on the hub (default: smollm2, made if new)"
    )
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=FOLDER",
        help="an adapter of mlx-lm or PEFT; may be given several times (default: two are trained)",
    )
    parser.add_argument("--prompt", default=CAT)
    args = parser.parse_args(argv)
    model, tokenizer, *_ = mlx_lm.load(args.model or str(smollm2.make("smollm2")))
    if args.adapter:
        folders: dict[str, Path] = {}
        for given in args.adapter:
            name, is_there, folder = given.partition("=")
            if not is_there:
                parser.error(f"--adapter takes NAME=FOLDER, not {given!r}")
            folders[name] = Path(folder)
    else:
        folders = {name: teach(model, tokenizer, name) for name in NAMES}

    requests = [None, *folders]
    with serving(model, folders) as adapters:

        def answer(name: str | None) -> str:
            with adapters.use(name):
                return mlx_lm.generate(model, tokenizer, args.prompt, max_tokens=4)

        async def answer_slowly(name: str | None) -> str:
            with adapters.use(name):
                text = ""
                for part in mlx_lm.stream_generate(model, tokenizer, args.prompt, max_tokens=4):
                    text += part.text
                    await asyncio.sleep(0)  # let the other tasks run
                return text

        async def answer_all() -> list[str]:
            return await asyncio.gather(*map(answer_slowly, requests))

        print(f"\n{args.prompt} ...\n")
        with ThreadPoolExecutor(2) as pool:
            report("two threads", requests, list(pool.map(answer, requests)))
        report("asyncio tasks", requests, asyncio.run(answer_all()))


def teach(model: Any, tokenizer: Any, name: str) -> Path:
    """Train an adapter on one sentence, save it, and return its folder."""
    folder = Path(f"smollm2-{name}")
    print(f"{name}: {CAT} {NAMES[name]}.")
    mx.random.seed(0)
    model.freeze()
    rules = {f"{lm.layers_path(model)}[-8:].self_attn.{{q,v}}_proj": finetune_lora.lora(8)}
    with swapped(model, rules):
        finetune_lora.train(model, mx.array(tokenizer.encode(f"{CAT} {NAMES[name]}."))[None])
        lm.save_adapters(model, folder)
    return folder


def report(how: str, requests: list[str | None], answers: list[str]) -> None:
    for name, answer in zip(requests, answers):
        print(f"{how:14}   {name or 'base model':12}   ... {answer.strip().splitlines()[0]}")
    print()


if __name__ == "__main__":
    main()
