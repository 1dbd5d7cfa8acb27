"""Random text as a pattern: it is understood as the reference understands it, or a PatternError.

A few thousand texts are tried with the other tests. For many more, from a new seed every time:

    python tests/patterns/test_fuzz.py 1000000
"""

from __future__ import annotations

import random
import re
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import mlx.nn as nn
import oracle
import pytest

from mlx_modswap import NoMatchError, PatternError, select

NAMES = ["a", "b", "ab", "q_proj", "k_proj", "layers", "0", "1", "10", "2-1", "A", "é", "st*r"]
PIECES = [*NAMES[:10], "*", "**", "?", ".", ".", ".", "[", "]", "{", "}", ",", ":", "-", "[0]"]
PIECES += ["[-1]", "[1:]", "[::2]", "{a,b}", "{q,k}_proj", "layers[", "[0:", "{a", " ", "\n", "\\"]
MODELS = 40
DEEPER = 12  # one text in so many goes into the slower checks


class Fuzz:
    """Random models and texts, and what became of the texts."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.models = [self.model(3) for _ in range(MODELS)]
        self.paths = [[place.path for place in oracle.places(model)] for model in self.models]
        self.counts = Counter[str]()

    # ------------------------------------------------------------ what is made

    def model(self, depth: int) -> nn.Module:
        model = nn.Module()
        for name in self.random.sample(NAMES, self.random.randint(1, 4)):
            dict.__setitem__(model, name, self.thing(depth - 1))
        dict.__setitem__(model, "layers", [nn.ReLU() for _ in range(self.random.randint(1, 4))])
        return model

    def thing(self, depth: int) -> Any:
        kind = self.random.choice(["module", "module", "list", "dict"]) if depth else "leaf"
        if kind == "module":
            return self.model(depth)
        if kind == "list":
            return [self.thing(depth - 1) for _ in range(self.random.randint(1, 3))]
        if kind == "dict":
            return {name: self.thing(depth - 1) for name in self.random.sample(NAMES, 2)}
        return nn.ReLU()

    def text(self, paths: list[str]) -> str:
        makers = [self.well_formed, self.damaged, self.pieces, self.unicode]
        return self.random.choice([lambda: self.derived(paths), *makers])()

    def derived(self, paths: list[str]) -> str:
        """A path with some of its segments in other words."""
        return ".".join(map(self.reworded, self.random.choice(paths).split(".")))

    def reworded(self, name: str) -> str:
        ways = ["*", "**", "?" * len(name), f"{{x,{name}}}", f"{name[:1]}*", f"*{name[1:]}"]
        return self.random.choice([*ways, *[name] * 12])

    def well_formed(self) -> str:
        return ".".join(self.segment() for _ in range(self.random.randint(1, 5)))

    def segment(self) -> str:
        if self.random.random() < 0.2:
            return "**"
        name = self.random.choice([*NAMES, "*", "?", "*_proj", "{q,k}_proj", "{a,b}*", "?{b,}"])
        return name + "".join(self.subscript() for _ in range(self.random.choice([0, 0, 0, 1, 2])))

    def subscript(self) -> str:
        numbers = ["", "", "0", "1", "-1", "2", "-3", "007", "99999"]
        length = self.random.choice([1, 2, 2, 3])
        inside = [self.random.choice(numbers) for _ in range(length)]
        return f"[{':'.join(inside)}]"

    def damaged(self) -> str:
        text = list(self.well_formed())
        for _ in range(self.random.randint(1, 3)):
            at = self.random.randrange(len(text) + 1)
            text[at : at + self.random.randint(0, 2)] = self.random.choice(PIECES)
        return "".join(text)

    def pieces(self) -> str:
        return "".join(self.random.choices(PIECES, k=self.random.randint(0, 12)))

    def unicode(self) -> str:
        largest = self.random.choice([0x7F, 0x3FF, 0xFFFF, sys.maxunicode])
        return "".join(
            chr(self.random.randint(0, largest)) for _ in range(self.random.randint(0, 12))
        )

    # ------------------------------------------------------------ what is checked

    def run(self, texts: int) -> Counter[str]:
        for number in range(texts):
            which = self.random.randrange(MODELS)
            model, text = self.models[which], self.text(self.paths[which])
            try:
                self.counts[self.check(model, text, deeper=number % DEEPER == 0)] += 1
            except Exception as error:
                raise AssertionError(f"{text!r}: {error!r}") from error
        return self.counts

    def check(self, model: nn.Module, text: str, deeper: bool) -> str:
        try:
            found = select(model, text, strict=False)
        except PatternError as error:
            check_message(str(error))
            if deeper:
                for pattern, _ in oracle.proposed_by(error):
                    select(model, pattern, strict=False)
            return "refused"
        if deeper:
            places = oracle.chosen(model, [text])
            assert list(found) == [place.path for place in places]
            assert all(found[place.path] is place.module for place in places)
            if not found:
                check_no_match(model, text)
        return "matched" if found else "matched nothing"


def check_message(message: str) -> None:
    """The last two lines show the pattern and, with carets, a place in it."""
    if message.startswith("''"):
        return
    *_, shown, carets = message.split("\n")
    assert re.fullmatch(" +[\\^]+", carets), message
    assert len(carets) <= len(shown) + 1, message  # one behind the end if something is missing


def check_no_match(model: nn.Module, text: str) -> None:
    """The error proposes nothing, or a pattern that matches as many as it says."""
    try:
        select(model, text)
    except NoMatchError as error:
        for pattern, number in oracle.proposed_by(error):
            assert len(select(model, pattern)) == number
    else:
        raise AssertionError("nothing matched, and strict mode said nothing")


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("seed", range(3))
def test_random_text_is_understood_or_refused_with_a_pattern_error(seed):
    counts = Fuzz(seed).run(2000)
    assert counts["matched"] > 100
    assert counts["matched nothing"] > 100
    assert counts["refused"] > 100


def chain(depth: int) -> nn.Module:
    """A model whose one path is `a.a.a...a` with so many names."""
    model = deep = nn.Module()
    for _ in range(depth):
        deep.a = nn.Module()
        deep = deep.a
    return model


def named(length: int) -> nn.Module:
    """A model with one long name."""
    model = nn.Module()
    dict.__setitem__(model, "a" * length, nn.Module())
    return model


def listed(length: int) -> nn.Module:
    """A model with a long list."""
    model = nn.Module()
    model.a = [nn.Module() for _ in range(length)]
    return model


GROWTH: dict[str, tuple[Callable[[int], nn.Module], str, list[int]]] = {
    "'**.' 50 times, then a name": (chain, "**." * 50 + "x", [125, 250, 500, 1000]),
    "'**.a.' 25 times, then a name": (chain, "**.a." * 25 + "x", [125, 250, 500, 1000]),
    "1,000 alternatives, deep": (
        chain,
        "**.{" + ",".join(f"n{i}" for i in range(1000)) + "}",
        [125, 250, 500, 1000],
    ),
    "1,000 alternatives, a long list": (
        listed,
        "a.{" + ",".join(map(str, range(1000))) + "}x",
        [5000, 10000, 20000, 40000],
    ),
    "'*a*a*a*b', a long name": (named, "*a*a*a*b", [1250, 2500, 5000, 10000]),
    "'*a' 20 times, then 'b', a long name": (named, "*a" * 20 + "b", [1250, 2500, 5000, 10000]),
    "'{a,aa,aaa}' 20 times, then 'b', a long name": (
        named,
        "*" + "{a,aa,aaa}" * 20 + "b",
        [1250, 2500, 5000, 10000],
    ),
    "'?' 5,000 times, a long name": (named, "?" * 5000, [1250, 2500, 5000, 10000]),
}


EASY = "**.x"


def steps(model: nn.Module, pattern: str) -> int:
    """How many functions a match calls, of Python and of C: the same on any machine."""
    count = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    select(model, pattern, strict=False)  # what is imported or cached once is not counted
    sys.setprofile(profile)
    try:
        select(model, pattern, strict=False)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("case", GROWTH)
def test_the_steps_of_a_match_grow_with_the_path_and_not_with_its_square(case):
    build, pattern, sizes = GROWTH[case]
    small, large = (steps(build(size), pattern) for size in (sizes[1], sizes[-1]))
    assert large < 1.5 * sizes[-1] / sizes[1] * small + 100


@pytest.mark.parametrize("case", [case for case in GROWTH if GROWTH[case][0] is chain])
def test_a_hard_pattern_takes_about_as_many_steps_2000_deep_as_an_easy_one(case):
    model = chain(2000)
    assert steps(model, GROWTH[case][1]) < 4 * steps(model, EASY)


def test_paths_of_2000_names_and_names_of_10000_characters_are_matched():
    assert list(select(chain(2000), "**." * 50 + "a[0:]", strict=False)) == []
    assert len(select(chain(2000), "**." * 50 + "a")) == 2000
    assert len(select(chain(2000), "a." * 1999 + "a")) == 1
    assert len(select(named(10_000), "*a*a*a*")) == 1
    assert len(select(named(10_000), "a" * 10_000)) == 1
    assert not select(named(10_000), "a" * 9_999, strict=False)


def main(texts: int, seed: int) -> None:
    counts = Fuzz(seed).run(texts)
    print(f"seed {seed}: {texts:,} texts,", end=" ")
    print(", ".join(f"{count:,} {what}" for what, count in counts.most_common()))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(10**9))
