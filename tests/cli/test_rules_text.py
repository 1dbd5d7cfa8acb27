"""Rules as a user types them, or keeps them in a JSON file."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_modswap._cli.rules import RulesError, read_rules

FORMS = '{"PATTERN": VALUE} or [["PATTERN" or ["PATTERN", ...], VALUE], ...]'
VALUES = 'it must be a number of bits, an object such as {"bits": 4, "group_size": 32}, or "keep"'


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes rules.json into the current folder."""
    monkeypatch.chdir(tmp_path)

    def write(content: Any):
        path = tmp_path / "rules.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return path.relative_to(tmp_path)

    return write


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("**=4", {"**": 4}),
        ("model.layers[0]=keep", {"model.layers[0]": None}),
        ("**.{v,down}_proj=6", {"**.{v,down}_proj": 6}),
        ("experts.a=b=8", {"experts.a=b": 8}),  # the last = counts
        ("=4", {"": 4}),  # the library knows what is wrong with it
    ],
)
def test_a_rule_is_split_at_its_last_equals_sign(text, rule):
    assert read_rules([text]) == rule


@pytest.mark.parametrize(
    ("content", "rules"),
    [
        ({"**.v_proj": 6, "**": 4}, {"**.v_proj": 6, "**": 4}),
        ({"lm_head": None, "embed": "keep"}, {"lm_head": None, "embed": None}),
        ({"**": {"bits": 4, "group_size": 32}}, {"**": {"bits": 4, "group_size": 32}}),
        ({"**": {"mode": "mxfp8"}}, {"**": {"mode": "mxfp8"}}),
        ({"**": {"bits": 1, "group_size": 1}}, {"**": {"bits": 1, "group_size": 1}}),
        ([["**.v_proj", 6], ["**", 4]], {"**.v_proj": 6, "**": 4}),
        ([[["embed", "lm_head"], 8]], {("embed", "lm_head"): 8}),
    ],
)
def test_a_file_holds_a_mapping_or_a_list(file, content, rules):
    assert read_rules([], [file(content)]) == rules


def test_rules_keep_their_order_and_those_of_the_file_come_last(file):
    rules = read_rules(["c=1", "a=2"], [file({"z": 3, "b": 4})])
    assert list(rules.items()) == [("c", 1), ("a", 2), ("z", 3), ("b", 4)]


def test_several_files_are_read_in_their_order(tmp_path):
    (tmp_path / "one.json").write_text('{"b": 1, "a": 2}')
    (tmp_path / "two.json").write_text('[["c", 3]]')
    files = [tmp_path / "two.json", tmp_path / "one.json"]
    assert list(read_rules([], files).items()) == [("c", 3), ("b", 1), ("a", 2)]


@given(st.dictionaries(st.text(), st.integers(1, 32) | st.just("keep")))
def test_any_pattern_can_be_given_a_value(rules):
    texts = [f"{pattern}={value}" for pattern, value in rules.items()]
    expected = {pattern: None if value == "keep" else value for pattern, value in rules.items()}
    if texts:
        assert list(read_rules(texts).items()) == list(expected.items())


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no rules: give at least one, such as '**=4', or --rules FILE.json"),
        (["**"], "the rule '**' has no value: write '**=4', or '**=keep' to leave it alone"),
        *(
            (
                [f"**={value}"],
                f"the rule '**={value}' ends in '{value}', which is neither a number of bits nor "
                "'keep'",
            )
            for value in ("", "4bit", "4.5", "-4", "0", "04", "33", "four", "²", "Keep", "None")
        ),
        (["**=4", "a=8", "**=6"], "two rules for '**': keep one of them"),
    ],
)
def test_a_wrong_argument(texts, message):
    with pytest.raises(RulesError) as error:
        read_rules(texts)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "rules.json is not JSON: Expecting property name enclosed in double quotes: "),
        ("", "rules.json is not JSON: Expecting value: line 1 column 1 (char 0)"),
        ("[" * 200_000, "rules.json is not JSON: "),
        ("4", f"rules.json holds 4; it must be {FORMS}"),
        ('"**=4"', f'rules.json holds "**=4"; it must be {FORMS}'),
        ("{}", "no rules: give at least one, such as '**=4', or --rules FILE.json"),
        ('{"**": 4, "a": 8, "**": 6}', "rules.json: two values for '**': keep one of them"),
        (
            '{"**": {"bits": 4, "bits": 8}}',
            "rules.json: two values for 'bits': keep one of them",
        ),
        ('[["a", 4], ["a", 8]]', "two rules for 'a': keep one of them"),
        (
            '[[["a", "b"], 4], [["a", "b"], 8]]',
            "two rules for 'a', 'b': keep one of them",
        ),
        ('["**=4"]', 'rules.json: "**=4" is not [pattern or patterns, value]'),
        ('[["**", 4, 32]]', 'rules.json: ["**", 4, 32] is not [pattern or patterns, value]'),
        ("[[4, 4]]", "rules.json: 4 is not a pattern or a list of patterns"),
        ("[[[], 4]]", "rules.json: [] is not a pattern or a list of patterns"),
        ('[[["a", 4], 4]]', 'rules.json: ["a", 4] is not a pattern or a list of patterns'),
    ],
)
def test_a_wrong_file(file, content, message):
    path = file(content)
    with pytest.raises(RulesError) as error:
        read_rules([], [path])
    assert str(error.value).startswith(message)
    assert message.endswith(": ") or str(error.value) == message


def test_a_pattern_of_the_file_is_given_as_an_argument_as_well(file):
    with pytest.raises(RulesError) as error:
        read_rules(["**=4"], [file({"**": 8})])
    assert str(error.value) == "two rules for '**': keep one of them"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RulesError) as error:
        read_rules([], [tmp_path.relative_to(tmp_path) / "rules.json"])
    assert str(error.value) == "rules.json cannot be read: No such file or directory"


def test_a_file_that_is_no_text(file, tmp_path):
    path = file({})
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(RulesError, match=r"rules\.json is not JSON: 'utf-8' codec can't decode"):
        read_rules([], [path])
