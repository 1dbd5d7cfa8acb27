"""The pattern language, as a table that a person can read."""

import re

import mlx.nn as nn
import pytest

from mlx_modswap import PatternError, select


def attention() -> nn.Module:
    module = nn.Module()
    module.q_proj, module.k_proj, module.v_proj = (nn.Linear(2, 2) for _ in range(3))
    return module


def build() -> nn.Module:
    """Twelve blocks, a list of lists, dicts with all kinds of keys, and a few odd names."""
    model = nn.Module()
    model.q_proj = nn.Linear(2, 2)
    model.layers = [attention() for _ in range(12)]
    model.grid = [[nn.ReLU(), nn.Tanh()], [nn.GELU(), nn.SiLU(), nn.Mish()]]
    model.keyed = {
        "0": nn.ReLU(),
        7: nn.ReLU(),
        "2-1": nn.ReLU(),
        "a.b": nn.ReLU(),
        "st*r": nn.ReLU(),
        "star": nn.ReLU(),
        "wh?t": nn.ReLU(),
        "x,y": nn.ReLU(),
    }
    model._private = nn.ReLU()
    model.encoder = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    return model


def layers(*indices: int) -> list[str]:
    return [f"layers.{index}" for index in indices]


TABLE = [
    # A path is itself and nothing else.
    ("q_proj", ["q_proj"]),
    ("layers.1", layers(1)),
    ("layers.1.q_proj", ["layers.1.q_proj"]),
    ("_private", ["_private"]),
    ("Q_proj", []),
    ("layers.01", []),
    ("layers", []),
    # '*' and '?' stay inside one segment.
    ("layers.*", layers(*range(12))),
    ("layers.?", layers(*range(10))),
    ("layers.1?", layers(10, 11)),
    ("layers.1*", layers(1, 10, 11)),
    ("layers.0.?_proj", ["layers.0.q_proj", "layers.0.k_proj", "layers.0.v_proj"]),
    ("*_proj", ["q_proj"]),
    ("*", ["q_proj", "_private", "encoder"]),
    ("*.q_proj", []),
    ("l*s.*1.*q*", ["layers.1.q_proj", "layers.11.q_proj"]),
    ("q_p*proj", []),
    # Braces choose inside one segment.
    ("layers.0.{q,v}_proj", ["layers.0.q_proj", "layers.0.v_proj"]),
    ("layers.{0,11}", layers(0, 11)),
    ("layers.{0,1?}", layers(0, 10, 11)),
    ("layers.0.{v,q}{_,-}proj", ["layers.0.q_proj", "layers.0.v_proj"]),
    ("{,q}_proj", ["q_proj"]),
    ("layers.0.{q_proj}", ["layers.0.q_proj"]),
    # '**' is any number of segments, none included; at the end it means what is inside.
    ("**.q_proj", ["q_proj", *(f"layers.{i}.q_proj" for i in range(12))]),
    ("layers.**.q_proj", [f"layers.{i}.q_proj" for i in range(12)]),
    ("encoder.**", ["encoder.layers.0", "encoder.layers.1"]),
    ("**.encoder.**", ["encoder.layers.0", "encoder.layers.1"]),
    ("encoder.**.**", ["encoder.layers.0", "encoder.layers.1"]),
    ("**.layers.0", ["layers.0", "encoder.layers.0"]),
    ("**.layers.**.1", ["layers.1", "encoder.layers.1"]),
    # Indices and slices of lists, as in Python.
    ("layers[0]", layers(0)),
    ("layers[-1]", layers(11)),
    ("layers[-12]", layers(0)),
    ("layers[12]", []),
    ("layers[-13]", []),
    ("layers[-4:]", layers(8, 9, 10, 11)),
    ("layers[:2]", layers(0, 1)),
    ("layers[2:4]", layers(2, 3)),
    ("layers[::5]", layers(0, 5, 10)),
    ("layers[::-5]", layers(1, 6, 11)),
    ("layers[9:100]", layers(9, 10, 11)),
    ("layers[100:]", []),
    ("layers[:]", layers(*range(12))),
    ("layers[-1].{q,k}_proj", ["layers.11.q_proj", "layers.11.k_proj"]),
    ("grid[0]", []),
    ("grid[0][1:]", ["grid.0.1"]),
    ("grid[1][-2:]", ["grid.1.1", "grid.1.2"]),
    ("grid[:][0]", ["grid.0.0", "grid.1.0"]),
    ("grid.*[0]", ["grid.0.0", "grid.1.0"]),
    ("*[0]", layers(0)),
    ("{grid,layers}[0]", layers(0)),
    ("**.layers[0]", ["layers.0", "encoder.layers.0"]),
    ("keyed[0]", []),
    # Keys of dicts: digits, ints, dots, and names that hold signs of the language.
    ("keyed.0", ["keyed.0"]),
    ("keyed.7", ["keyed.7"]),
    ("keyed.2-1", ["keyed.2-1"]),
    ("keyed.a.b", ["keyed.a.b"]),
    ("keyed.*.b", ["keyed.a.b"]),
    ("keyed.a.*", ["keyed.a.b"]),
    ("keyed.?", ["keyed.0", "keyed.7"]),
    ("keyed.st*r", ["keyed.st*r", "keyed.star"]),
    ("keyed.wh?t", ["keyed.wh?t"]),
    ("keyed.x,y", ["keyed.x,y"]),
    ("keyed.{x,z},y", ["keyed.x,y"]),
    # Regular expressions match the whole path.
    (re.compile(r"layers\.\d\.q_proj"), [f"layers.{i}.q_proj" for i in range(10)]),
    (re.compile(r"q_proj"), ["q_proj"]),
    (re.compile(r"(?i)ENCODER"), ["encoder"]),
    (re.compile(re.escape("keyed.st*r")), ["keyed.st*r"]),
    # Several patterns are a union, in the order of the model.
    (["layers[1]", "q_proj", "layers[0:2]"], ["q_proj", *layers(0, 1)]),
    (("layers[1]", re.compile("q_proj")), ["q_proj", *layers(1)]),
]


@pytest.mark.parametrize(("pattern", "paths"), TABLE, ids=str)
def test_a_pattern_matches_these_paths(pattern, paths):
    assert list(select(build(), pattern, strict=False)) == paths


def test_two_stars_match_everything_but_the_model_itself():
    model = build()
    everything = select(model, "**")
    named = dict(model.named_modules())
    del named[""]
    assert everything.keys() == named.keys()
    assert all(everything[path] is named[path] for path in named)


def test_every_path_is_a_pattern_that_selects_its_place():
    model = build()
    for path, module in select(model, "**").items():
        assert select(model, path)[path] is module


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [("**." * 50 + "x", 0), ("*a" * 50, 1), ("{" + ",".join("abc" * 400) + "}z", 0)],
)
def test_a_hard_pattern_is_no_harder_to_match(pattern, matches):
    model = nn.Module()
    model["a" * 10_000] = nn.ReLU()
    inner = model
    for _ in range(200):
        inner.a = nn.Module()
        inner = inner.a
    assert len(select(model, pattern, strict=False)) == matches


PARSE_ERRORS = [
    (
        "layers[0-9]",
        "[0-9] is not a valid index or slice; write 'layers[0:10]'\n"
        "    layers[0-9]\n"
        "          ^^^^^",
    ),
    (
        "layers.0.[qk]_proj",
        "[qk] is not a valid index or slice; write 'layers.0.{q,k}_proj'\n"
        "    layers.0.[qk]_proj\n"
        "             ^^^^",
    ),
    (
        "layers[0,3]",
        "[0,3] is not a valid index or slice; write 'layers.{0,3}'\n"
        "    layers[0,3]\n"
        "          ^^^^^",
    ),
    (
        "layers[::0]",
        "[::0] is not a valid index or slice; "
        "[0], [-1], [2:6], [-4:] and [::2] are, as for a Python list\n"
        "    layers[::0]\n"
        "          ^^^^^",
    ),
    (
        "layers[-0:]",
        "-0 counts from the start, not from the end; if you mean that, write 'layers[0:]'\n"
        "    layers[-0:]\n"
        "          ^^^^^",
    ),
    ("layers[]", "[] is not a valid index or slice; write 'layers.*'\n    layers[]\n          ^^"),
    (
        "layers.[!0].mlp",
        "[!0] is not a valid index or slice; write a pattern that matches more, and leave out the "
        "rest with exclude\n    layers.[!0].mlp\n           ^^^^",
    ),
    ("a**", "'**' must be a segment of its own; write '**.a.**'\n    a**\n    ^^^"),
    (
        "x.**proj",
        "'**' must be a segment of its own; write 'x.**.proj'\n    x.**proj\n      ^^^^^^",
    ),
    ("***", "'**' must be a segment of its own; write '**'\n    ***\n    ^^^"),
    ("", "'' is an empty pattern; '**' matches every module of the model"),
    ("a..b", "a segment is empty; write '**.a.b'\n    a..b\n      ^"),
    ("a.", "a segment is empty; write 'a'\n    a.\n      ^"),
    (".", "a segment is empty; write '**'\n    .\n    ^"),
    ("a.b[0", "unmatched '['; write 'a.b[0]'\n    a.b[0\n       ^"),
    ("a]", "unmatched ']'; write 'a'\n    a]\n     ^"),
    ("[0]", "an index must follow the name of a list; write '*[0]'\n    [0]\n    ^^^"),
    ("a[0]b", "an index must end its segment; write 'a[0].b'\n    a[0]b\n        ^"),
    ("a[0][1]b", "an index must end its segment; write 'a[0][1].b'\n    a[0][1]b\n           ^"),
    ("a[0]b[1]", "an index must end its segment; write 'a[0].b[1]'\n    a[0]b[1]\n        ^^^^"),
    ("{q,k", "unmatched '{' in this segment; write '{q,k}'\n    {q,k\n    ^"),
    ("a.{b.c,d}", "unmatched '{' in this segment; write ['a.b.c', 'a.d']\n    a.{b.c,d}\n      ^"),
    (
        "x.{q, k}_proj",
        "an alternative in braces starts or ends with a space; write 'x.{q,k}_proj'\n"
        "    x.{q, k}_proj\n"
        "      ^^^^^^^^^^^",
    ),
    (
        "{a,b}{q ,k}*",
        "an alternative in braces starts or ends with a space; write '{a,b}{q,k}*'\n"
        "    {a,b}{q ,k}*\n"
        "    ^^^^^^^^^^^^",
    ),
    ("a}", "unmatched '}'; write 'a'\n    a}\n     ^"),
    ("{a,{b}}", "braces cannot be nested; write ['a', 'b']\n    {a,{b}}\n    ^"),
    ("a{}", "braces without alternatives; write 'a*'\n    a{}\n     ^^"),
    ("x.a{}b", "braces without alternatives; write 'x.a*b'\n    x.a{}b\n       ^^"),
    ("x.a}b", "unmatched '}'; write 'x.ab'\n    x.a}b\n       ^"),
    ("{a,b}c}d", "unmatched '}'; write '{a,b}cd'\n    {a,b}c}d\n          ^"),
    ("x.a{b{c}}", "braces cannot be nested; write 'x.abc'\n    x.a{b{c}}\n       ^"),
    ("ab[0]c]", "unmatched ']'; write 'ab[0].c'\n    ab[0]c]\n          ^"),
    ("a[0]bc.d", "an index must end its segment; write 'a[0].bc.d'\n    a[0]bc.d\n        ^^"),
    ("x.a{b", "unmatched '{' in this segment; write 'x.a{b}'\n    x.a{b\n       ^"),
    (
        "layers[" + "1," * 50 + "1]",
        "[" + "1," * 38 + "... is not a valid index or slice; "
        "write 'layers.{" + "1," * 50 + "1}'\n"
        "    layers[" + "1," * 24 + "1\n"
        "          " + "^" * 20,
    ),
    (
        "b" * 60 + ".[" + "a" * 30 + "]" + "c" * 60,
        "[" + "a" * 30 + "] is not a valid index or slice; "
        "write '" + "b" * 60 + ".{a}" + "c" * 60 + "'\n"
        "    " + "b" * 49 + ".[" + "a" * 30 + "]" + "c" * 18 + "\n"
        "    " + " " * 50 + "^" * 20,
    ),
    (
        "layers[\n]",
        "[\\n] is not a valid index or slice; write 'layers.*'\n    layers[\\n]\n          ^^^^",
    ),
]


@pytest.mark.parametrize(("pattern", "message"), PARSE_ERRORS, ids=[p for p, _ in PARSE_ERRORS])
def test_a_wrong_pattern_shows_the_place_and_the_right_form(pattern, message):
    with pytest.raises(PatternError) as error:
        select(build(), pattern)
    assert str(error.value) == message


@pytest.mark.parametrize(("length", "advice"), [(198, f"; write '{'x' * 198}'"), (199, "")])
def test_a_form_of_more_than_200_characters_is_not_proposed(length, advice):
    with pytest.raises(PatternError) as error:
        select(build(), "x" * length + ".")
    assert str(error.value).split("\n")[0] == f"a segment is empty{advice}"


@pytest.mark.parametrize(("length", "shown"), [(80, f"[{'é' * 78}]"), (81, f"[{'é' * 76}...")])
def test_a_wrong_index_of_more_than_80_characters_is_cut_short(length, shown):
    with pytest.raises(PatternError) as error:
        select(build(), f"x[{'é' * (length - 2)}]")
    assert str(error.value).startswith(f"{shown} is not a valid index or slice")


@pytest.mark.parametrize("pattern", ["x" * 10_000 + "**", "a[" + "9" * 10_000 + "]", "a." * 5000])
def test_a_long_wrong_pattern_has_a_short_message(pattern):
    with pytest.raises(PatternError) as error:
        select(build(), pattern)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("pattern", "what"),
    [
        (3, "int: 3"),
        (None, "NoneType: None"),
        (b"layers", "bytes: b'layers'"),
        (["layers.*", 3], "int: 3"),
        (re.compile(b"x"), "Pattern: re.compile(b'x')"),
        ([("x" * 100,)], "tuple: ('" + "x" * 75 + "..."),
    ],
    ids=str,
)
def test_anything_but_text_and_regexes_is_a_type_error(pattern, what):
    with pytest.raises(TypeError) as error:
        select(build(), pattern)
    assert (
        str(error.value)
        == f"a pattern is a str or a compiled regular expression of str, not {what}"
    )
