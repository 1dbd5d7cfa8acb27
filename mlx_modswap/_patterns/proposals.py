"""Propose patterns that may have been meant by a text that is wrong or matches nothing.

People write what they know from elsewhere: globs, regular expressions, f-strings, JSONPath. Each
row of the tables below translates one such habit into the pattern language. The proposals are not
tried here: the code that shows a proposal tries it. Nothing here depends on MLX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress

Proposal = str | re.Pattern[str] | list[str]  # a list is a union, as everywhere

_LONGEST = 200  # characters of a text that is worth correcting, and of a readable proposal


class Mistake(Exception):
    """What is wrong with a text, and where.

    Attributes:
        start, length (int): The place in the text.
        condition (str): When the proposed form is right; empty if it always is.
        otherwise (str): What to advise if no form can be proposed.
    """

    def __init__(
        self, reason: str, start: int, length: int, condition: str = "", otherwise: str = ""
    ):
        super().__init__(reason)
        self.start, self.length = start, length
        self.condition, self.otherwise = condition, otherwise

    def shown_in(self, text: str) -> str:
        """Return the text around the place, with carets below the place on a second line."""
        window = slice(max(0, self.start - 50), self.start)
        after = slice(self.start + min(self.length, 20), self.start + 50)
        before, wrong, rest = (
            repr(text[part])[1:-1] for part in (window, slice(self.start, after.start), after)
        )
        carets = " " * len(before) + "^" * max(1, len(wrong))
        return f"    {before}{wrong}{rest}\n    {carets}"


def proposals(text: str) -> Iterator[Proposal]:
    """Yield patterns that may have been meant by a text, the likeliest first.

    Some of them do not even parse, since the mistakes in a text are corrected one by one.
    """
    for proposal in _meant(text):
        if not isinstance(proposal, str):
            yield proposal
            yield from widened(proposal)
        elif proposal and not _REGEX_SIGN.search(proposal):
            yield from (one for one in (proposal, *widened(proposal)) if one != text)


def spellings(text: str) -> Iterator[str]:
    """Yield the text as it is, and again after each of its mistakes is corrected."""
    yield from (one for one in _meant(text) if isinstance(one, str))


def as_code(proposal: Proposal) -> str:
    """Write a proposal as Python code; ``''`` if that would be too long to read."""
    code = repr(proposal)
    if isinstance(proposal, re.Pattern):
        text, flags = proposal.pattern, ""
        if not _INLINE_FLAGS.match(text):
            flags = repr(re.compile("", proposal.flags)).removeprefix("re.compile(''")[:-1]
        # No regular expression ends in a single backslash, which a raw string could not.
        is_raw = '"' not in text and text.isprintable()
        code = f're.compile(r"{text}"{flags})' if is_raw else f"re.compile({text!r}{flags})"
    return code if len(code) <= _LONGEST else ""


def widened(proposal: Proposal) -> Iterator[Proposal]:
    """Yield proposals that match the same names further down in a model."""
    if isinstance(proposal, str):
        yield _anywhere(proposal)
    elif isinstance(proposal, list):
        yield list(map(_anywhere, proposal))
    else:
        inner = _INLINE_FLAGS.sub("", proposal.pattern)  # only valid at the start
        inner = inner.removeprefix("^")
        inner = inner if inner.endswith(r"\$") else inner.removesuffix("$")
        yield from _compiled(rf"(.*\.)?({inner})", proposal.flags)
        yield from _compiled(rf".*({inner}).*", proposal.flags)


def _anywhere(text: str) -> str:
    return text if text.startswith("**.") else f"**.{text}"


def _meant(text: str) -> Iterator[Proposal]:
    """Yield what a text may mean, before it is widened."""
    yield text
    if len(text) > _LONGEST:
        return
    regex = _REGEX_PREFIX.sub("", text)
    braced = _GROUP.sub(lambda found: "{" + found[1].replace("|", ",") + "}", text)
    if _REGEX_SIGN.search(braced) or regex != text:
        yield from _compiled(regex)
        yield from _corrected_text(braced)
    else:  # a pattern with braces says the same
        yield from _corrected_text(braced)
        yield from _compiled(regex) if braced != text else ()


# ---------------------------------------------------------------- regular expressions

_INLINE_FLAGS = re.compile(r"\A(\(\?[aimsux]+\))+")
_REGEX_PREFIX = re.compile(r"\A(re|regex):\s*")
_GROUP = re.compile(r"\((?:\?:)?([^()|\\]*(?:\|[^()|\\]*)+)\)(?![+*?{])")  # (q|v)
_REGEX_SIGN = re.compile(r"\\|[()]|(\A|\.)\.[*+?]|\.\+|\A\^|\$\Z|\[\^|\]\+")
# Python warns about nested sets and, up to 3.10, about flags in the middle.
_DISPUTED = re.compile(r"\[\^?\[|--|&&|~~|\|\||(?<!\A)\(\?[a-zA-Z]+\)")
# Matching one of these with a long path might take minutes.
_SLOW = re.compile(r"[+*}].*\)[+*{]|(\.[+*]){2}|([+*}][^+*}]*){6}")


def _compiled(text: str, flags: int = 0) -> Iterator[re.Pattern[str]]:
    if not _DISPUTED.search(text) and not _SLOW.search(text):
        with suppress(re.error, OverflowError, RecursionError):
            yield re.compile(text, flags)


# ---------------------------------------------------------------- everything else

Rows = list[tuple[str, str | Callable[[re.Match[str]], str]]]

_END = r"(?=[.\[,|]|\Z)"  # of a name or an index
_START = r"(?:\A|(?<=\.))"  # of a segment


def _span(found: re.Match[str]) -> str:
    """Write a range that includes both of its ends as a slice."""
    first, last = sorted(int(number) for number in found.groups() if number)
    return f"[{first}:{last + 1}]"


def _characters(found: re.Match[str]) -> str:
    """Write a glob's choice of characters, ``[qk]`` or ``[a-z]``, as braces or ``?``.

    ``[!q]`` stays as it is, since ``?`` would also select ``q``.
    """
    return re.sub(
        r"\[([^\[\]!^][^\[\]]*)\]",
        lambda one: "{" + ",".join(dict.fromkeys(one[1])) + "}" if one[1].isalnum() else "?",
        found[0],
    )


# Each row is applied to the result of the rows before it, and each of the results is proposed.
_SPELLINGS: Rows = [
    # "'q_proj' " -> "q_proj"
    (r"\A[\s'\"`]+|[\s'\"`]+\Z", ""),
    # "layers[0 : 4]" -> "layers[0:4]", "{q, k}" -> "{q,k}"
    (r"\s*([\[\]{},:])\s*", r"\1"),
    # "layers/0/mlp" -> "layers.0.mlp"
    (r"/", "."),
    # "keyed['gate']" -> "keyed.gate"
    (r"\[(['\"])([^'\"\[\]]+)\1\]", r".\2"),
    # "layers[*]", "layers[i]", "layers[]" -> "layers.*"
    (rf"(?<=[^.\[])\[(\*|[A-Za-z_]\w*)?\]{_END}", ".*"),
    # "layers.{}" -> "layers.*"
    (r"\{\}", "*"),
    # "layers.[01][0-9]" -> "layers.{0,1}?", "[0-9]*" -> "?*"
    (rf"{_START}((\[[^\[\].]+\]){{2,}}|\[[^\[\].]+\](?=[^.]))", _characters),
    # "q[ab]_proj" -> "q{a,b}_proj"
    (r"\[[^\[\].]*[A-Za-z_!^][^\[\].]*\]", _characters),
    # "layers[0-3]", "layers.[0-3]", "layers.{0..3}" -> "layers[0:4]"
    (rf"\.?[\[{{(](\d{{1,9}})(?:-|\.\.+)(\d{{1,9}})[\]}})]{_END}", _span),
    # "layers.0..3" -> "layers[0:4]"
    (r"\.(\d{1,9})\.\.+(\d{1,9})(?=\.|\Z)", _span),
    # "layers[0,3]" -> "layers.{0,3}"
    (rf"\.?\[(\d+(,\d+)+)\]{_END}", r".{\1}"),
    # "layers[-0:]" -> "layers[0:]"
    (r"(?<=[\[:])-0+(?!\d)", "0"),
    # "layers.[0:4]" -> "layers[0:4]"
    (rf"(?<=[^.])\.(?=\[[-\d:]+\]{_END})", ""),
    # "[0].mlp" -> "*[0].mlp"
    (rf"\A(?=\[[-\d:]+\]{_END})", "*"),
    # "layers[0]mlp" -> "layers[0].mlp"
    (r"\](?=[\w*?{])", "]."),
    # "***" -> "**"
    (r"\*{3,}", "**"),
    # "a**b" -> "a*b"
    (r"(?<=[^.*])\*\*(?=[^.*\[])", "*"),
    # "layers**" -> "layers.**"
    (r"(?<=[^.*])\*\*", ".**"),
    # "**_proj" -> "**.*_proj", "**[0]" -> "**.*[0]"
    (r"\*\*(?=[-_\[])", "**.*"),
    # "**q_proj" -> "**.q_proj"
    (r"\*\*(?=[^.*])", "**."),
]
_LEFTOVERS: Rows = [
    # "layers[0.mlp" -> "layers[0].mlp"
    (r"\[([-\d:]+)(?=\.|\Z)", r"[\1]"),
    # "{q,k" -> "{q,k}"
    (r"\{([^{}.]+)(?=\.|\Z)", r"{\1}"),
    # "layers]" -> "layers"
    (r"(\[[^\[\]]*\]|\{[^{}]*\})|[\[\]{}]", lambda found: found[1] or ""),
    # ".q_proj" -> "**.q_proj"
    (r"\A\.+", "**."),
    # "layers." -> "layers"
    (r"\.+\Z", ""),
    # "a..b" -> "a.b"
    (r"\.{2,}", "."),
    # From here on the texts already parse. "layers.0-3", "layers.{0-3}" -> "layers[0:4]"
    (r"\.\{?(\d{1,9})-(\d{1,9})\}?(?=\.|\Z)", _span),
    # "layers.0:4", "layers.{0:4}" -> "layers[0:4]"
    (r"\.\{?(-?\d*:-?\d*)\}?(?=\.|\Z)", r"[\1]"),
    # "layers.-1" -> "layers[-1]"
    (r"\.(-\d+)(?=\.|\Z)", r"[\1]"),
    # "layers{0,3}" -> "layers.{0,3}"
    (r"(?<=[A-Za-z_])\{(\d+(,\d+)*)\}", r".{\1}"),
    # "layers.%d", "layers.{i}", "layers.<i>", "layers.$i" -> "layers.*"
    (rf"%[ds]|<\w+>|\$\w+|{_START}\{{[A-Za-z_]\w*\}}{_END}", "*"),
    # r"**.layers.\d+.mlp" -> "**.layers.*.mlp"
    (r"\\[dw][+*]?", "*"),
    # r"**.layers\.0" -> "**.layers.0"
    (r"\\\.", "."),
]
_SEVERAL = re.compile(r"[,;|\s]+(?![^{]*\})")  # q_proj, v_proj
_DEEP_BRACES = re.compile(r"\{[^{}]*[.{]")  # {a.b,c}, {a,{b,c}}
_INNERMOST = re.compile(r"\{([^{}]*)\}")
_MOST_COMMAS = 7  # in a text whose braces are expanded: at most 128 alternatives


def _corrected_text(text: str) -> Iterator[Proposal]:
    # Before a `**` after a comma is taken for one that is not a segment of its own.
    yield from _expanded(text)
    yield from _divided(text)
    *_, text = texts = _after_each_row(_SPELLINGS, text)
    yield from texts
    yield from _expanded(text)
    *_, text = texts = _after_each_row(_LEFTOVERS, text)
    yield from texts[1:]
    yield from _divided(text)


def _expanded(text: str) -> Iterator[Proposal]:
    if _DEEP_BRACES.search(text) and text.count(",") <= _MOST_COMMAS:
        alternatives = list(dict.fromkeys(_alternatives(text)))
        yield alternatives if alternatives[1:] else alternatives[0]


def _divided(text: str) -> Iterator[Proposal]:
    parts = [part for part in _SEVERAL.split(text) if part]
    if parts and parts != [text]:
        yield parts if parts[1:] else parts[0]


def _after_each_row(rows: Rows, text: str) -> list[str]:
    """List the text, and the result of each row that changes it."""
    texts = [text]
    for wrong, right in rows:
        corrected = re.sub(wrong, right, texts[-1])
        if corrected != texts[-1]:
            texts.append(corrected)
    return texts


def _alternatives(text: str) -> Iterator[str]:
    """Yield the texts to which a shell would expand braces."""
    found = _INNERMOST.search(text)
    if not found:
        yield text
        return
    for option in found[1].split(","):
        yield from _alternatives(text[: found.start()] + option + text[found.end() :])
