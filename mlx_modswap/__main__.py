"""Draw a language model, or quantize it by rules into a folder that mlx-lm loads."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx.utils import tree_flatten

from . import NoMatchError, PatternError, SelectionError, tree
from ._cli.rules import MODES, RulesError, read_rules
from ._words import size

_DETAILS = """\
MODEL is a folder, or the id of a model on the Hugging Face hub, as for mlx_lm.load.
A PATTERN is matched with the whole path of a module; put it in quotes.

Exit status: 0, 1 if what was asked for cannot be done, 2 if the arguments are wrong.
"""
_DTYPES = ("float16", "bfloat16", "float32")  # as in mlx_lm.convert

# What the library's errors say, as regular expressions -> what the command line says instead.
_OPTIONS = {
    "trust_remote_code=True": "--trust-remote-code",
    "a group_size": "a --q-group-size",
    "alone with None": "alone with 'keep'",
    r"; (for a regular expression write )?re\.compile\(.*": "; regular expressions work only in "
    "Python: write * for a name, ** for any path, [0:2] for a slice of a list, {a,b} for a choice",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status."""
    given = _parse(arguments)
    try:
        with _interrupted_when_ended():
            _print(given.run(given))
    except (RulesError, PatternError, NoMatchError, SelectionError, TypeError) as error:
        return _refuse(error, 2)
    except (ImportError, OSError, ValueError) as error:
        return _refuse(error, 1)
    except KeyboardInterrupt:
        return _refuse("interrupted", 1)
    return 0


@contextmanager
def _interrupted_when_ended() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C, so that a conversion removes what it has written."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    ending = [one for one in signal.Signals if one.name in ("SIGTERM", "SIGHUP")]
    # A signal that is ignored, as with nohup, stays ignored.
    replaced = [one for one in ending if signal.getsignal(one) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        replaced = []  # Python changes handlers in the main thread only
    for one in replaced:
        signal.signal(one, interrupt)
    try:
        yield
    finally:
        for one in replaced:
            signal.signal(one, signal.SIG_DFL)


def _refuse(why: object, status: int) -> int:
    line = str(why).partition("\n")[0]
    for argument, option in _OPTIONS.items():
        line = re.sub(argument, option, line)
    print(f"mlx_modswap: {line}", file=sys.stderr)
    return status


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except OSError as error:
        # Python flushes stdout again when it exits, and would print another error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):  # `| head` has read enough
            raise OSError(f"cannot print: {error.strerror}") from None


# ---------------------------------------------------------------- arguments


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("mlx_modswap", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_tree(commands)
    _add_convert(commands)
    given, left = parser.parse_known_args(arguments)
    # argparse refuses these after an option: `convert MODEL FOLDER --dtype float16 '**=4'`.
    if left and not any(text.startswith("-") for text in left):
        if "rules" in given:
            given.rules, left = [*given.rules, *left], []
        elif given.pattern is None:
            given.pattern, *left = left
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return given


def _add_tree(commands: Any) -> None:
    parser = _added(commands, "tree", _tree, "draw the model that mlx_lm.load would build")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="what to mark")
    parser.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="what not to mark"
    )


def _add_convert(commands: Any) -> None:
    parser = _added(commands, "convert", _convert, "quantize a model by rules into a new folder")
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="must not exist yet")
    parser.add_argument(
        "rules",
        metavar="PATTERN=BITS",
        nargs="*",
        help="the first pattern that matches a layer decides; PATTERN=keep leaves layers alone",
    )
    parser.add_argument(
        "--rules",
        dest="files",
        metavar="FILE.json",
        type=Path,
        action="append",
        default=[],
        help="more rules, after those above: {PATTERN: VALUE}, or [[PATTERN or PATTERNS, VALUE], "
        "...]; can be given several times; a VALUE is a number of bits, "
        '{"bits": 4, "group_size": 32}, or null to leave alone',
    )
    parser.add_argument(
        "--q-group-size", metavar="N", type=_positive, help="weights that share a scale"
    )
    parser.add_argument("--q-mode", choices=MODES, default="affine", help="default: affine")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of the unquantized rest; default: config's"
    )
    parser.add_argument(
        "--max-shard-mb",
        metavar="N",
        type=_positive,
        default=1000,
        help="size of a file; default: %(default)s",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the plan and write nothing")


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _added(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a folder, or the id of a model on the hub")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python file that a model may come with",
    )
    return parser


# ---------------------------------------------------------------- the commands


def _tree(given: argparse.Namespace) -> str:
    from ._cli.preview import preview

    model, note = preview(given.model, trust_remote_code=given.trust_remote_code)
    pattern = "**" if given.pattern is None else given.pattern
    picture = tree(model, pattern, exclude=given.exclude)
    return f"{picture}\n{note}" if note else str(picture)


def _convert(given: argparse.Namespace) -> str:
    rules = read_rules(given.rules, given.files)
    from .lm._folders.convert import convert, plan
    from .lm._folders.write import check_free
    from .lm._source import load

    settings = {
        "group_size": given.q_group_size,
        "mode": given.q_mode,
        "dtype": given.dtype,
        "strict": True,
        "trust_remote_code": given.trust_remote_code,
    }
    if given.dry_run:
        check_free(given.folder)
        planned = plan(given.model, rules, **settings)
        return f"{planned.report}\n{_size(given, planned.model)}; nothing was written"
    report = convert(given.model, given.folder, rules, max_shard_mb=given.max_shard_mb, **settings)
    model, _ = load(given.folder, trust_remote_code=given.trust_remote_code)
    return f"{report}\n{_size(given, model)}"


def _size(given: argparse.Namespace, model: nn.Module) -> str:
    from mlx_lm.utils import compute_bits_per_weight

    arrays: Any = tree_flatten(model.parameters())
    nbytes = size(sum(array.nbytes for _, array in arrays))
    return f"{given.folder}: {nbytes}, {compute_bits_per_weight(model):.2f} bits per weight"


if __name__ == "__main__":
    sys.exit(main())
