"""Makes each of the small changes to the library that mutmut knows, and sees that the tests notice.

    python tests/programs/mutants.py                    # all of them
    python tests/programs/mutants.py _pattern _select   # those of some files
    python tests/programs/mutants.py _pattern._advance  # those of one function

mutmut puts the mutants into the folder `mutants`, and this file runs the tests, on Linux only. They
are collected once. Each mutant gets a fork of that process, and in it the tests that call its
function, fast ones first, until one of them fails. (MLX has computed nothing before the fork: a
process that is forked later hangs.)

`equivalent_mutants.txt` lists the mutants that nobody could notice, with the reasons. One that
survives and is not listed there is printed, and makes this fail.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from mmap import mmap
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from mutmut.__main__ import create_mutants
from mutmut.mutation import trampoline
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.diff_apply import get_diff_for_mutant
from mutmut.utils.file_utils import copy_also_copy_files, copy_src_dir, setup_source_paths
from mutmut.utils.format_utils import (
    mangled_name_from_mutant_name as function_key,
)
from mutmut.utils.format_utils import (
    orig_function_and_class_names_from_key,
)

ROOT = Path(__file__).parents[2]
FILES = (
    "patterns lists errors guarantees properties report tree memory capture wrapper fuzz pitfalls"
)
FILES += " command_line blocks hooks observe wrapper_own proposals refused tuple_keys rules_text"
FILES += " judged_after_where leaving_alone untying misuse"
# For the functions of lm, and for these alone: they take long.
LM_FILES = "quantize save save_refused save_compared outline convert convert_stopped damaged_models"
LM_FILES += " layers_path lm_package adapters adapters_bad_folders adapters_bad_models"
LM_FILES += " adapters_exactness adapters_on_disk adapters_peft"
# Left out: what fails for no reason when each function counts its calls, and what is slow.
SLOW = "hard_pattern or cache_is_recorded"
AT_ONCE = int(os.environ.get("AT_ONCE", os.cpu_count() or 2))
SPARE_SECONDS = 3  # of computing, for a test
MOST_SECONDS = 300  # for all tests of a mutant
SPARE_BYTES = 4 << 30
KILLED, SURVIVED = 1, 0

Change = tuple[str, tuple[str, ...], tuple[str, ...]]  # function, lines before, lines after


def main(wanted: list[str]) -> int:
    os.chdir(ROOT)
    os.environ["MUTANT_UNDER_TEST"] = "mutant_generation"
    Path("mutants").mkdir(exist_ok=True)
    copy_src_dir()
    copy_also_copy_files()
    setup_source_paths()
    create_mutants(AT_ONCE)
    made = [name for file in sorted(Path("mlx_modswap").rglob("*.py")) for name in made_of(file)]
    names = [name for one in wanted for name in made if is_of(name, one)] if wanted else made
    changes = {name: change_of(name) for name in names}
    known = read_equivalent()

    os.chdir("mutants")
    runs = Runs(changes, known)
    tests = [path_of(name) for name in FILES.split()]
    if any(file_of(name).startswith("lm.") for name in names):
        tests += [path_of(name) for name in LM_FILES.split()]
    options = ["-q", "-s", "-p", "no:cacheprovider", "--hypothesis-profile=mutants"]
    pytest.main([*options, "-k", f"not ({SLOW})", *tests], plugins=[runs])
    os.chdir(ROOT)
    return report(changes, runs.killed, known)


def path_of(name: str) -> str:
    (path,) = Path("tests").rglob(f"test_{name}.py")
    return str(path)


def made_of(file: Path) -> list[str]:
    data = SourceFileMutationData(path=file)
    data.load()
    return list(data.exit_code_by_key)


def function_of(mutant: str) -> str:
    """``'_pattern._Glob.accepts'`` for a name that mutmut made."""
    function, cls = orig_function_and_class_names_from_key(mutant)
    return ".".join(filter(None, (file_of(mutant), cls, function)))


def file_of(mutant: str) -> str:
    """``'_pattern'`` or ``'_show.tree'`` for a name that mutmut made."""
    return mutant.partition(".")[2].rpartition(".")[0]


def is_of(mutant: str, wanted: str) -> bool:
    return f"{function_of(mutant)}.".startswith(f"{wanted}.")


def change_of(mutant: str) -> Change:
    lines = get_diff_for_mutant(mutant).splitlines()[2:]
    before, after = (
        tuple(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+"
    )
    return function_of(mutant), before, after


def read_equivalent() -> set[Change]:
    """The changes of the list: a function, pairs of ``-`` and ``+`` lines, and the reason."""
    found: set[Change] = set()
    function, before, after = "", [], []
    for line in Path(__file__).with_name("equivalent_mutants.txt").read_text().splitlines():
        if after and not line.startswith("+ "):
            found.add((function, tuple(before), tuple(after)))
            before, after = [], []
        if line.startswith("- "):
            before.append(line[2:])
        elif line.startswith("+ "):
            after.append(line[2:])
        elif line and not line.startswith(("#", " ")):
            function = line
    return found


class Runs:
    """A plugin of pytest that, instead of the tests, runs them for each mutant."""

    def __init__(self, changes: dict[str, Change], known: set[Change]):
        self.changes = changes
        self.known = known
        self.killed: dict[str, str] = {}  # name -> how

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if session.testsfailed:
            raise session.Interrupted("the tests cannot be collected")
        calls, seconds = watched(session.items)
        tests_of: defaultdict[str, list[pytest.Item]] = defaultdict(list)
        for item in sorted(session.items, key=lambda item: seconds[item.nodeid]):
            for function in calls[item.nodeid]:
                # Of lm, only the preview belongs to the command line.
                is_of_lm = ".lm." in function and ".lm._preview." not in function
                if is_of_lm == item.nodeid.startswith("tests/lm/"):
                    tests_of[function].append(item)
        # What is listed as equivalent runs last: all of the tests, as none of them should fail.
        waiting = list(self.changes)[::-1]
        waiting.sort(key=lambda name: self.changes[name] not in self.known)
        running: dict[int, tuple[str, list[pytest.Item], mmap, float]] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop()
                tests = tests_of[function_key(name)]
                shared = mmap(-1, 4)
                pid = os.fork()
                if pid == 0:
                    quietly(name)
                    number = first_failing(tests, seconds)
                    shared[:] = (number or 0).to_bytes(4, "big")
                    os._exit(SURVIVED if number is None else KILLED)
                running[pid] = name, tests[:], shared, time.monotonic() + MOST_SECONDS
            time.sleep(0.002)
            for pid, (name, tests, shared, end) in list(running.items()):
                if time.monotonic() > end:
                    os.kill(pid, 9)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    left = len(waiting) + len(running)
                    if left % 100 == 0:
                        print(f"{left} mutants left", file=sys.stderr, flush=True)
                    del running[pid]
                    if os.WIFEXITED(status) and status:
                        self.killed[name] = "a test"
                        # What has killed one mutant of a function is likely to kill the next.
                        first = tests[int.from_bytes(shared, "big")]
                        tests_of[function_key(name)].sort(key=lambda test: test is not first)
                    elif status:
                        self.killed[name] = "the clock"
                    elif self.changes[name] not in self.known:
                        show(self.changes[name])
        return True


def watched(items: list[pytest.Item]) -> tuple[dict[str, set[str]], dict[str, float]]:
    """The functions that each test calls, and how long it takes; found out in a fork."""
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            broken, calls, seconds = pickle.load(pipe)
        os.wait()
        if broken:
            sys.exit(f"without any mutant these tests fail: {', '.join(broken)}")
        return calls, seconds
    hits: set[str] = set()
    trampoline.__dict__["record_trampoline_hit"] = lambda name, caller=None: hits.add(name)
    quietly("stats")
    broken, calls, seconds = [], {}, {}
    for item in items:
        hits.clear()
        start = time.perf_counter()
        if first_failing([item], {}) is not None:
            broken.append(item.nodeid)
        seconds[item.nodeid] = time.perf_counter() - start
        calls[item.nodeid] = set(hits)
    with os.fdopen(write, "wb") as pipe:
        pickle.dump((broken, calls, seconds), pipe)
    os._exit(0)


def quietly(mutant: str) -> None:
    trampoline.set_mutant_under_test(mutant)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + SPARE_BYTES, taken + SPARE_BYTES))


def first_failing(items: list[pytest.Item], seconds: dict[str, float]) -> int | None:
    """The number of the first test that fails; those after it are not run."""
    for number, item in enumerate(items):
        # A mutant that runs in circles ends by the signal, which nothing handles.
        limit = SPARE_SECONDS + 5 * seconds.get(item.nodeid, MOST_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, limit)
        try:
            if any(report.failed for report in runtestprotocol(item, log=False)):
                return number
        except BaseException:
            return number
    return None


def show(change: Change) -> None:
    function, before, after = change
    lines = [*(f"- {line}" for line in before), *(f"+ {line}" for line in after)]
    print("", function, *lines, sep="\n", flush=True)


def report(changes: dict[str, Change], killed: dict[str, str], known: set[Change]) -> int:
    rows: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, change in changes.items():
        fate = killed.get(name) or ("equivalent" if change in known else "survived")
        rows[file_of(name)].update(["mutants", fate])
    survived = {change for name, change in changes.items() if name not in killed}
    ran = {function for function, _, _ in changes.values()}
    stale = [change for change in sorted(known - survived) if change[0] in ran]
    if stale:
        print("\nIn the list of equivalent mutants, but killed or not made:")
        for change in stale:
            show(change)
    columns = ("mutants", "a test", "the clock", "equivalent", "survived")
    print(f"\n{'file':<14}" + "".join(f"{column:>12}" for column in columns))
    for file, row in sorted(rows.items()):
        print(f"{file:<14}" + "".join(f"{row[column]:>12}" for column in columns))
    return bool(stale or any(row["survived"] for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
