"""A pattern that matches nothing: what was given, what was there, what would match."""

from __future__ import annotations

import re
from functools import partial
from string import ascii_lowercase
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from models import Block, build, identity

from mlx_modswap import NoMatchError, replace_layers, select


def net() -> Any:
    """A model with what a path may lead to besides modules: arrays, functions, tuples, numbers."""
    model = build(
        embed=nn.Embedding(8, 4),
        layers=[Block() for _ in range(4)],
        pair=(nn.Linear(4, 4), nn.ReLU()),
        sizes=[1, 2, 3],
        keyed={"0": nn.ReLU(), "1": nn.ReLU()},
        lm_head=nn.Linear(4, 8),
    )
    for block in model.layers:
        block.act, block.dropout = nn.gelu, None
    return model


NO_MATCH = [
    # A path that is not the whole path.
    ("q_proj", "'q_proj' matches nothing; '**.q_proj' matches 4"),
    ("self_attn.*", "'self_attn.*' matches nothing; '**.self_attn.*' matches 8"),
    # A typo, or a level left out, in some segment.
    (
        "attn.q_proj",
        "'attn.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'**.self_attn.q_proj' matches 4",
    ),
    (
        "layers.self_attn.q_proj",
        "'layers.self_attn.q_proj' matches nothing: 'layers' is a list of 4; "
        "'layers.**.self_attn.q_proj' matches 4",
    ),
    (
        "Layers.0.MLP",
        "'Layers.0.MLP' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.0.mlp' matches 1",
    ),
    (
        "layers.0.self_attn.zzz",
        "'layers.0.self_attn.zzz' matches nothing: "
        "'layers.0.self_attn' holds '{q,v}_proj' (2 Linear)",
    ),
    ("layers.**.mpl", "'layers.**.mpl' matches nothing; 'layers.**.mlp' matches 4"),
    ("embed.**.zzz", "'embed.**.zzz' matches nothing"),
    ("layers.**.7", "'layers.**.7' matches nothing"),
    ("**.layers[7]", "'**.layers[7]' matches nothing; '**.layers[-1]' matches 1"),
    ("**.layers.7", "'**.layers.7' matches nothing; '**.layers[-1]' matches 1"),
    ("**.lm_head[0]", "'**.lm_head[0]' matches nothing"),
    (
        "layer[0].mpl",
        "'layer[0].mpl' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers[0].mlp' matches 1",
    ),
    (
        "layers[5].mpl",
        "'layers[5].mpl' matches nothing: 'layers' is a list of 4; 'layers[-1].mlp' matches 1",
    ),
    (
        "keyd",
        "'keyd' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'keyed.*' matches 2",
    ),
    (
        "siezs",
        "'siezs' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    (
        "layer.*.self_attn.q_proj",
        "'layer.*.self_attn.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.*.self_attn.q_proj' matches 4",
    ),
    (
        "layer.*.q_proj",
        "'layer.*.q_proj' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'layers.*.**.q_proj' matches 4",
    ),
    (
        "layers.*.self_atn.{q,v}_proj",
        "'layers.*.self_atn.{q,v}_proj' matches nothing: 'layers.0' holds 'self_attn', 'norm', "
        "'mlp', 'acts.0'; 'layers.*.self_attn.{q,v}_proj' matches 8",
    ),
    ("**.q_prjo", "'**.q_prjo' matches nothing; '**.q_proj' matches 4"),
    (
        "LM_HEAD",
        "'LM_HEAD' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'; "
        "'lm_head' matches 1",
    ),
    (
        "zzz",
        "'zzz' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    # An index that is not there.
    ("layers[99]", "'layers[99]' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("layers[9:]", "'layers[9:]' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("layers.7", "'layers.7' matches nothing: 'layers' is a list of 4; 'layers[-1]' matches 1"),
    ("keyed[0]", "'keyed[0]' matches nothing: 'keyed' is a dict, not a list; 'keyed.0' matches 1"),
    ("lm_head[0]", "'lm_head[0]' matches nothing: 'lm_head' is a module (Linear), not a list"),
    ("layers.mlp[0]", "'layers.mlp[0]' matches nothing: 'layers' is a list of 4"),
    ("layers[0][1]", "'layers[0][1]' matches nothing: 'layers.0' is a module (Block), not a list"),
    ("keyed.5", "'keyed.5' matches nothing: 'keyed' holds '{0,1}' (2 ReLU)"),
    ("keyed[1:]", "'keyed[1:]' matches nothing: 'keyed' is a dict, not a list"),
    (
        "zzz.0",
        "'zzz.0' matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    ("**.7", "'**.7' matches nothing"),
    # What is there is no module.
    ("layers", "'layers' matches nothing: it is a list of 4, not a module; 'layers.*' matches 4"),
    ("keyed", "'keyed' matches nothing: it is a dict, not a module; 'keyed.*' matches 2"),
    (
        "lm_head.weight",
        "'lm_head.weight' matches nothing: it is an array, not a module; 'lm_head' matches 1",
    ),
    (
        "layers.0.act",
        "'layers.0.act' matches nothing: it is a function, not a module; 'layers.0' matches 1",
    ),
    (
        "layers[0].dropout",
        "'layers[0].dropout' matches nothing: 'layers.0.dropout' is None, not a module; "
        "'layers[0]' matches 1",
    ),
    (
        "layers[1].self_attn.q_proj.weight",
        "'layers[1].self_attn.q_proj.weight' matches nothing: "
        "'layers.1.self_attn.q_proj.weight' is an array, not a module; "
        "'layers[1].self_attn.q_proj' matches 1",
    ),
    (
        "layers.*.act",
        "'layers.*.act' matches nothing: 'layers.0.act' is a function, not a module; "
        "'layers.*' matches 4",
    ),
    ("layers.0.act.x", "'layers.0.act.x' matches nothing: 'layers.0.act' holds no modules"),
    ("lm_head.0", "'lm_head.0' matches nothing: 'lm_head' holds no modules"),
    ("lm_head.wieght", "'lm_head.wieght' matches nothing: 'lm_head' holds no modules"),
    ("lm_head._training", "'lm_head._training' matches nothing: 'lm_head' holds no modules"),
    ("sizes", "'sizes' matches nothing: it is a list of 3, not a module"),
    ("sizes.0", "'sizes.0' matches nothing: it is an int, not a module"),
    ("sizes[1]", "'sizes[1]' matches nothing: 'sizes.1' is an int, not a module"),
    ("sizes[7]", "'sizes[7]' matches nothing: 'sizes' is a list of 3"),
    ("pair.2", "'pair.2' matches nothing: 'pair' is a tuple of 2"),
    ("pair[2]", "'pair[2]' matches nothing: 'pair' is a tuple of 2"),
    ("pair", "'pair' matches nothing: it is a tuple of 2, not a module"),
    (
        "pair.0",
        "'pair.0' matches nothing: it is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    (
        "pair[1]",
        "'pair[1]' matches nothing: "
        "'pair.1' is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    (
        "pair.0.weight",
        "'pair.0.weight' matches nothing: "
        "it is in a tuple, and MLX sees modules in lists and dicts only",
    ),
    ("**.act", "'**.act' matches nothing: 'layers.0.act' is a function, not a module"),
    (
        "lm_head.**",
        "'lm_head.**' matches nothing: 'lm_head' holds no modules; 'lm_head' matches 1",
    ),
    # Many segments, of which one could not be told so shortly.
    (
        39 * "a." + "a",
        "'" + 38 * "a." + "... matches nothing: "
        "the model holds 'embed', 'layers[0:4]' (4 Block), 'keyed.{0,1}' (2 ReLU), 'lm_head'",
    ),
    (40 * "a." + "a", "'" + 38 * "a." + "... matches nothing"),
    # Regular expressions.
    (
        re.compile("q_proj"),
        "re.compile('q_proj') does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(q_proj)") matches 4',
    ),
    (
        re.compile("attn"),
        "re.compile('attn') does not match any complete path (fullmatch); "
        're.compile(r".*(attn).*") matches 12',
    ),
    (
        re.compile("ATTN", re.IGNORECASE),
        "re.compile('ATTN', re.IGNORECASE) does not match any complete path (fullmatch); "
        're.compile(r".*(ATTN).*", re.IGNORECASE) matches 12',
    ),
    (
        re.compile('q_proj"?'),
        "re.compile('q_proj\"?') does not match any complete path (fullmatch); "
        "re.compile('(.*\\\\.)?(q_proj\"?)') matches 4",
    ),
    (
        re.compile("q_proj\n?"),
        "re.compile('q_proj\\n?') does not match any complete path (fullmatch); "
        "re.compile('(.*\\\\.)?(q_proj\\n?)') matches 4",
    ),
    (re.compile("zzz"), "re.compile('zzz') does not match any complete path (fullmatch)"),
    (
        re.compile("(?i)Q_PROJ"),
        "re.compile('(?i)Q_PROJ', re.IGNORECASE) does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.IGNORECASE | re.DOTALL),
        "re.compile('Q_PROJ', re.IGNORECASE|re.DOTALL) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.DOTALL) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.ASCII | re.IGNORECASE),
        "re.compile('Q_PROJ', re.IGNORECASE|re.ASCII) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.ASCII) matches 4',
    ),
    (
        re.compile("Q_PROJ", re.IGNORECASE | re.MULTILINE | re.VERBOSE),
        "re.compile('Q_PROJ', re.IGNORECASE|re.MULTILINE|re.VERBOSE) "
        "does not match any complete path (fullmatch); "
        're.compile(r"(.*\\.)?(Q_PROJ)", re.IGNORECASE|re.MULTILINE|re.VERBOSE) matches 4',
    ),
    (
        re.compile("(?x)zzz #"),
        "re.compile('(?x)zzz #', re.VERBOSE) does not match any complete path (fullmatch)",
    ),
    # No pattern at all.
    ([], "no pattern was given; '**' matches every module of the model"),
]


@pytest.mark.parametrize(("pattern", "message"), NO_MATCH, ids=[str(p) for p, _ in NO_MATCH])
def test_what_is_missing_and_what_matches(pattern, message):
    model = net()
    with pytest.raises(NoMatchError) as error:
        replace_layers(model, pattern, identity)
    assert str(error.value) == message
    with pytest.raises(NoMatchError) as error:
        select(model, pattern)
    assert str(error.value) == message
    assert not replace_layers(model, pattern, identity, strict=False)


@pytest.mark.parametrize("message", [message for _, message in NO_MATCH])
def test_the_suggestion_matches_as_many_as_it_says(message):
    found = re.search(r"; (re\.compile\(.*\)|'.*') matches (\d+)$", message)
    if found is None:
        assert "; " not in message or message.startswith("no pattern")
        return
    assert len(select(net(), eval(found[1]))) == int(found[2])


@pytest.mark.parametrize(
    ("names", "more"),
    [("abcdefgh", ""), ("abcdefghi", " and 1 more"), (ascii_lowercase, " and 18 more")],
)
def test_eight_of_many_modules_are_named(names, more):
    model = nn.Module()
    for name in names:
        setattr(model, name, type(name.upper(), (nn.Module,), {})())
    with pytest.raises(NoMatchError) as error:
        select(model, "zzz")
    assert str(error.value) == (
        "'zzz' matches nothing: the model holds 'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'" + more
    )


def test_a_callable_list_is_a_list():
    class Chain(list[nn.Module]):
        def __call__(self, x: Any) -> Any:
            return x

    model = nn.Module()
    model.layers = Chain([nn.ReLU(), nn.Tanh()])
    with pytest.raises(NoMatchError) as error:
        select(model, "layers[7]")
    assert str(error.value) == (
        "'layers[7]' matches nothing: 'layers' is a Chain of 2; 'layers[-1]' matches 1"
    )


def test_a_typo_among_thousands_of_names():
    model = nn.Module()
    model.wide, model.last = nn.Module(), nn.Module()
    for number in range(2000):
        setattr(model.wide, f"n{number}", nn.Module())
    model.last.target = nn.ReLU()
    with pytest.raises(NoMatchError) as error:
        select(model, "tarqet")
    assert str(error.value) == (
        "'tarqet' matches nothing: the model holds '{wide,last}' (2 Module); '**.target' matches 1"
    )


@pytest.mark.parametrize("typo", ["y" + 99 * "x", "y" + 100 * "x"], ids=["100", "101"])
def test_a_name_of_100_characters_is_suggested_in_full(typo):
    model = nn.Module()
    setattr(model, 100 * "x", nn.ReLU())
    with pytest.raises(NoMatchError) as error:
        select(model, typo)
    assert str(error.value) == (
        f"'y{75 * 'x'}... matches nothing: the model holds '{100 * 'x'}'; '{100 * 'x'}' matches 1"
    )


def test_a_name_after_a_tied_module_is_suggested():
    model = nn.Module()
    model.first = model.again = nn.Linear(4, 4)
    model.block = Block()
    with pytest.raises(NoMatchError) as error:
        select(model, "q_prjo")
    assert str(error.value) == (
        "'q_prjo' matches nothing: the model holds '{first,again}' (2 Linear), 'block'; "
        "'**.q_proj' matches 1"
    )


@pytest.mark.parametrize("pattern", ["*", "**"])
def test_a_model_without_modules(pattern):
    with pytest.raises(NoMatchError) as error:
        select(nn.ReLU(), pattern)
    assert str(error.value) == f"'{pattern}' matches nothing: the model holds no modules"


def test_not_strict_skips_what_matches_nothing():
    model, several = net(), ["nothing", "layers.*.mlp"]
    assert len(select(model, several, exclude=["embed", "no"], strict=False)) == 4
    assert not select(model, "embed", where=nn.ReLU, strict=False)
    assert not replace_layers(model, {"nothing": identity}, strict=False)


def test_an_alternative_beyond_a_list_matches_nothing():
    assert list(select(net(), "layers.{0,4}")) == ["layers.0"]


# ---------------------------------------------------------------- not a pattern, not a model


@pytest.mark.parametrize("base", [list, tuple])
def test_a_model_that_is_a_list_of_another_class(base):
    class Odd(base):
        def __len__(self):
            raise AssertionError("what is no module is described without its own methods")

    with pytest.raises(TypeError) as error:
        select(Odd([nn.ReLU()]), "**")
    assert str(error.value) == "model must be an mlx.nn.Module, not an Odd of 1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": nn.ReLU()}, "pattern must be a path pattern, not a module (ReLU)"),
        (
            {"pattern": "embed", "exclude": mx.array(1)},
            "exclude must be a path pattern, not an array",
        ),
    ],
)
def test_a_bad_pattern_or_exclude(arguments, message):
    for look in (select, partial(replace_layers, factory=identity)):
        with pytest.raises(TypeError) as error:
            look(net(), **arguments)
        assert str(error.value) == message
