"""Draw a language model, or quantize it by rules into a folder that mlx-lm loads."""

from __future__ import annotations

import argparse
import os
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
_COMMANDS = """\
commands:
  tree      draw the model that mlx_lm.load would build
  convert   quantize a model by rules into a new folder

examples:
  mlx_modswap tree my_model '**.self_attn.{q,v}_proj'
  mlx_modswap convert my_model my_model_4bit '**.embed_tokens=8' '**=4'
"""
_NO_REGEX = (
    "; but regular expressions work only in Python: write * for a name, ** for any path, [0:2] for "
    "a slice of a list, {a,b} for a choice"
)
_LOADERS = ("mlx-lm", "mlx-vlm")
_DTYPES = ("float16", "bfloat16", "float32")  # as in mlx_lm.convert


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
    line, _, _ = str(why).partition("\n")
    if "re.compile(" in line:
        line += _NO_REGEX
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
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands = {"tree": _tree_parser, "convert": _convert_parser}
    if given[:1] and given[0] in commands:
        # Rules may follow an option: `convert MODEL FOLDER --dtype float16 '**=4'`. The parsers of
        # argparse's own subcommands refuse that.
        return commands[given[0]]().parse_intermixed_args(given[1:])
    parser = argparse.ArgumentParser(
        "mlx_modswap",
        usage="mlx_modswap {tree,convert} ...",
        description=__doc__,
        epilog=_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mlx_modswap {_version()}")
    parser.add_argument("command", choices=commands, help="its options: mlx_modswap tree --help")
    return parser.parse_args(given)


def _version() -> str:
    from importlib.metadata import version  # here, since it takes longer than all of the rest

    return version("mlx-modswap")


def _tree_parser() -> argparse.ArgumentParser:
    parser = _parser("tree", _tree, "draw the model that mlx_lm.load would build")
    parser.add_argument("pattern", metavar="PATTERN", nargs="?", help="what to mark")
    parser.add_argument(
        "--exclude", metavar="PATTERN", action="append", default=[], help="what not to mark"
    )
    return parser


def _convert_parser() -> argparse.ArgumentParser:
    parser = _parser("convert", _convert, "quantize a model by rules into a new folder")
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
    return parser


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _parser(name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        f"mlx_modswap {name}",
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=_DETAILS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", metavar="MODEL", help="a folder, or the id of a model on the hub")
    parser.add_argument(
        "--loader",
        choices=_LOADERS,
        default="mlx-lm",
        help="the package that loads the model; mlx-vlm keeps vision; default: %(default)s",
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the Python file that a model may come with",
    )
    return parser


# ---------------------------------------------------------------- the commands


def _tree(given: argparse.Namespace) -> str:
    from .lm._loaders import loader_named  # first: it says what to install if mlx-lm is missing

    loader = loader_named(given.loader)
    from ._cli.preview import preview

    model, note = preview(given.model, loader, trust_remote_code=given.trust_remote_code)
    pattern = "**" if given.pattern is None else given.pattern
    picture = tree(model, pattern, exclude=given.exclude)
    return f"{picture}\n{note}" if note else str(picture)


def _convert(given: argparse.Namespace) -> str:
    rules = read_rules(given.rules, given.files)
    from .lm._folders.convert import convert, plan
    from .lm._folders.write import check_free
    from .lm._loaders import loader_named
    from .lm._source import Source

    settings = {
        "group_size": given.q_group_size,
        "mode": given.q_mode,
        "dtype": given.dtype,
        "strict": True,
        "loader": given.loader,
        "trust_remote_code": given.trust_remote_code,
    }
    if given.dry_run:
        check_free(given.folder)
        planned = plan(given.model, rules, **settings)
        return f"{planned.report}\n{_size(given, planned.model)}; nothing was written"
    report = convert(given.model, given.folder, rules, max_shard_mb=given.max_shard_mb, **settings)
    source = Source(given.folder, loader_named(given.loader), given.trust_remote_code)
    model = source.load().model
    return f"{report}\n{_size(given, model)}"


def _size(given: argparse.Namespace, model: nn.Module) -> str:
    from mlx_lm.utils import compute_bits_per_weight

    arrays: Any = tree_flatten(model.parameters())
    nbytes = size(sum(array.nbytes for _, array in arrays))
    return f"{given.folder}: {nbytes}, {compute_bits_per_weight(model):.2f} bits per weight"


if __name__ == "__main__":
    sys.exit(main())
