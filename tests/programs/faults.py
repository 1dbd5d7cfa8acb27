"""Puts small faults into a copy of the library, one at a time, and sees that the tests notice.

    python tests/programs/faults.py            # all of them
    python tests/programs/faults.py tie order  # those whose names hold one of these words

A fault is a replacement of text that must fit exactly once; one that does not is *stale*: the code
has changed, and the fault has to follow.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
TESTS = ["guarantees", "leaving_alone", "judged_after_where", "tuple_keys", "untying", "refused"]
TESTS += ["misuse", "memory", "patterns", "errors", "fuzz", "report", "blocks", "hooks"]
TESTS += ["observe", "wrapper", "wrapper_own", "stateful"]
AT_ONCE = 2
TIMES_AS_LONG = 10  # as the unharmed library takes: then a fault has made it hang
MOST_MEMORY = 4 << 30  # bytes; a walk without an end takes all that there is
# pytest with less memory, which macOS does not enforce.
START = f"""
import resource, sys, pytest
resource.setrlimit(resource.RLIMIT_AS, ({MOST_MEMORY}, resource.getrlimit(resource.RLIMIT_AS)[1]))
sys.exit(pytest.main())
"""


class Fault(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str


FAULTS = [
    # ---------------------------------------------------------------- selecting
    Fault(
        "match prefixes",
        "_pattern.py",
        "        return len(text) in ends",
        "        return bool(ends)",
    ),
    Fault(
        "two stars at the end match the place itself",
        "_pattern.py",
        "    if items[-1] is _DEEP:\n",
        "    if False:\n",
    ),
    Fault(
        "two stars match at least one segment",
        "_pattern.py",
        "for node in nodes if _DEEP in node.children",
        "for node in nodes if False",
    ),
    Fault(
        "an index counts one too far",
        "_pattern.py",
        "if -length <= self.subscript < length else ()",
        "if -length <= self.subscript <= length else ()",
    ),
    Fault(
        "exclude is ignored",
        "_select.py",
        "if mask <= included}",
        "}",
    ),
    Fault(
        "where is ignored",
        "_select.py",
        "        places.keep(passed)\n",
        "        pass\n",
    ),
    # ---------------------------------------------------------------- walking
    Fault(
        "iterate backwards",
        "_walk.py",
        "steps = zip(count(), held, state.entries(len(held)))",
        "steps = iter(list(zip(count(), held, state.entries(len(held))))[::-1])",
    ),
    Fault(
        "a module without arrays is no module",
        "_plan.py",
        "        if not issubclass(type(new), nn.Module):",
        "        if not new or not issubclass(type(new), nn.Module):",
    ),
    Fault(
        "an empty container ends the walk",
        "_walk.py",
        "            if not kind:\n",
        "            if not kind or not value:\n",
    ),
    Fault(
        "a cycle is no error of the library's own",
        "_sharing.py",
        'raise SelectionError(f"the model contains a cycle',
        'raise RecursionError(f"the model contains a cycle',
    ),
    Fault(
        "ties are not looked for",
        "_sharing.py",
        "    if len(ids) == len(seen):\n        return ids, None\n",
        "    return ids, None\n",
    ),
    Fault(
        "an attribute with an underscore counts as a parameter",
        "_containers.py",
        '            if public_only and str(key).startswith("_"):\n                continue\n',
        "",
    ),
    Fault(
        "a list entry in the partial dict is one too low",
        "_walk.py",
        "            _lengthen(parent, key)\n        parent[key] = module",
        "            _lengthen(parent, key)\n            key = max(key - 1, 0)\n"
        "        parent[key] = module",
    ),
    # ---------------------------------------------------------------- planning
    Fault(
        "modules without parameters are tied",
        "_plan.py",
        "is_shared and has_parameters(module)",
        "is_shared",
    ),
    Fault(
        "nothing is tied",
        "_plan.py",
        "is_shared and has_parameters(module)",
        "False",
    ),
    Fault(
        "half of a tie or of an alias may change",
        "_plan.py",
        "        if len(inside) < sharing.path_counts[shared]:",
        "        if False:",
    ),
    Fault(
        "the aliases of a place are not looked at",
        "_plan.py",
        "        if len(inside) < sharing.path_counts[shared]:",
        "        if isinstance(unit, int) and len(inside) < sharing.path_counts[shared]:",
    ),
    Fault(
        "two rules may share a tie",
        "_plan.py",
        "        if len(numbers) > 1:",
        "        if False:",
    ),
    Fault(
        "factories are called twice",
        "_plan.py",
        "            new = factory(path, module)\n",
        "            new = factory(path, module)\n            new = factory(path, module)\n",
    ),
    Fault(
        "the factory runs for each place of a tie",
        "_plan.py",
        "        news = _make_once(units, places, deciding, factories)\n"
        "        _check_units(units, places, deciding, news, sharing, rules)\n",
        "        each = map(factories.__getitem__, deciding)\n"
        "        news = _make(places.paths, places.modules, each)\n",
    ),
    Fault(
        "the error of a factory is swallowed",
        "_plan.py",
        "_MENDED_FACTORY)\n            raise\n",
        "_MENDED_FACTORY)\n            new = module\n",
    ),
    Fault(
        "partial_modules takes nested paths",
        "_replace.py",
        '    check_nesting(places, "and both are given; leave one of them out")\n',
        "",
    ),
    Fault(
        "partial_modules takes two modules for one place",
        "_replace.py",
        "    check_aliases(places, news)\n",
        "",
    ),
    Fault(
        "unchanged places are reported",
        "_plan.py",
        "    changes = list(map(is_not, news, places.modules))\n",
        "    changes = [True] * len(news)\n",
    ),
    Fault(
        "the training mode is not handed over",
        "_replace.py",
        "        _set_modes(plan.training)\n",
        "        pass\n",
    ),
    Fault(
        "the dropout of a wrapper keeps its training mode",
        "_wrapper.py",
        "        _set_own_modes(self, mode)\n",
        "        pass\n",
    ),
    Fault(
        "the dropout of a new wrapper does not have the mode of the layer",
        "_wrapper.py",
        '        _set_own_modes(wrapper, getattr(wrapper, "_training", True))\n',
        "",
    ),
    Fault(
        "the model changes an output that was captured",
        "_hooks.py",
        "recorded[path].append(_kept(output))",
        "recorded[path].append(output)",
    ),
    Fault(
        "the model changes the vector of a patch",
        "_hooks.py",
        "        return _kept(new)\n",
        "        return new\n",
    ),
    Fault(
        "the model changes an argument that a hook has kept",
        "_hooks.py",
        "        if shared.sees_inputs:\n",
        "        if False:\n",
    ),
    Fault(
        "the training mode is handed to modules of the model as well",
        "_plan.py",
        "    training = _check_cycles(places, news, known)\n",
        "    training = _check_cycles(places, news, set())\n",
    ),
    Fault(
        "frozen state is carried over",
        "_plan.py",
        "    return Plan(places, news, deciding, training)\n",
        "    for old, new in zip(places.modules, news):\n"
        "        new._no_grad |= old._no_grad\n"
        "    return Plan(places, news, deciding, training)\n",
    ),
    Fault(
        "a new module may close a cycle",
        "_plan.py",
        "    if met and not met <= set(map(id, olds)):",
        "    if False:",
    ),
    # ---------------------------------------------------------------- changing
    Fault(
        "a failed update leaves the new modules in another mode",
        "_replace.py",
        "        _set_modes(modes)\n        raise\n",
        "        raise\n",
    ),
    Fault(
        "no rollback",
        "_replace.py",
        "            nn.Module.update_modules(model, nest(places, olds))\n",
        "            pass\n",
    ),
    Fault(
        "rollback for ordinary errors only",
        "_replace.py",
        "    except BaseException as error:\n        # The same partial",
        "    except Exception as error:\n        # The same partial",
    ),
    Fault(
        "what update_modules left alone is not noticed",
        "_replace.py",
        "        if (at := places.first_without(news)) is not None:",
        "        if (at := None) is not None:",
    ),
    Fault(
        "the last report keeps the old modules",
        "_report.py",
        "        self._olds = record(olds)\n",
        "        self._olds = record(olds)\n        Replacement._kept = olds\n",
    ),
    Fault(
        "the module keeps the last plan",
        "_plan.py",
        "    return Plan(places, news, deciding, training)\n",
        "    plan = globals()['_last'] = Plan(places, news, deciding, training)\n    return plan\n",
    ),
    Fault(
        "swapped does not restore on an exception",
        "_replace.py",
        "            _put_back(block)\n        except SelectionError as refusal:",
        "            pass\n        except SelectionError as refusal:",
    ),
    Fault(
        "swapped does not restore at all",
        "_replace.py",
        "        raise\n    _put_back(block)\n",
        "        raise\n    block.close()\n",
    ),
    Fault(
        "swapped overwrites what someone else put in",
        "_blocks.py",
        "            if is_unmoved and not above:",
        "            if not above:",
    ),
    Fault(
        "the refusal of swapped hides the error of its body",
        "_replace.py",
        "            note(error, str(refusal))\n        raise\n    _put_back(block)\n",
        "            raise\n        raise\n    _put_back(block)\n",
    ),
    # ---------------------------------------------------------------- blocks in any order
    Fault(
        "blocks: a block hands nothing to the one above it",
        "_blocks.py",
        "            block._take_over(self, above)\n",
        "            pass\n",
    ),
    Fault(
        "blocks: a block hands its module to the last block instead of the next",
        "_blocks.py",
        "        for block in reversed(later):\n",
        "        for block in later:\n",
    ),
    Fault(
        "blocks: a block does not know what later ones have put in",
        "_blocks.py",
        "        self._tell_others(self.news, {})\n",
        "",
    ),
    Fault(
        "blocks: a block does not know what earlier ones have put back",
        "_blocks.py",
        "        self._tell_others(olds, above)\n",
        "",
    ),
    Fault(
        "blocks: nobody is told that a block ended too early",
        "_blocks.py",
        "                raise SelectionError(_COVERED.format(places.paths[number]))\n",
        "                return\n",
    ),
    Fault(
        "blocks: nobody is told that a place was taken away",
        "_blocks.py",
        "            raise SelectionError(_LOST.format(places.paths[number]))\n",
        "            return\n",
    ),
    Fault(
        "blocks: a wrapper takes away what is inside",
        "_blocks.py",
        "            is_there = unwrapped(now) is places.holders[row]\n",
        "            is_there = now is places.holders[row]\n",
    ),
    Fault(
        "blocks: a block stays open for ever",
        "_blocks.py",
        "            _open.remove(self)\n",
        "            pass\n",
    ),
    Fault(
        "blocks: modules are compared, which may be used again",
        "_blocks.py",
        "            above.update(dict.fromkeys(self._own & block._own, block))\n",
        "            same = set(map(id, self.news)) & set(map(id, block.places.modules))\n"
        "            above.update(dict.fromkeys(self._own if same else [], block))\n",
    ),
    # ---------------------------------------------------------------- hooks
    Fault(
        "hooks: a hook goes on after its block",
        "_hooks.py",
        "        shared.see = None\n",
        "        pass\n",
    ),
    Fault(
        "hooks: a pattern that never ran is quiet",
        "_hooks.py",
        "        if (matched & ~called) >> number & 1:\n",
        "        if not called:\n",
    ),
    Fault(
        "hooks: single layers that were not called are an error",
        "_hooks.py",
        "        if (matched & ~called) >> number & 1:\n",
        "        if matched >> number & 1 and not all(calls.values()):\n",
    ),
    Fault(
        "hooks: a tied layer is counted at one of its paths only",
        "_hooks.py",
        "        for path in paths:\n",
        "        for path in paths[:1]:\n",
    ),
    Fault(
        "hooks: what is set on a hooked layer goes with the hook",
        "_hooks.py",
        "        setattr(self.__wrapped__, name, value)\n",
        "        super().__setattr__(name, value)\n",
    ),
    Fault(
        "hooks: a layer is as deep as its first path",
        "_hooks.py",
        'max(path.count("."), depths.get(id(layer), 0))',
        'depths.get(id(layer), path.count("."))',
    ),
    # ---------------------------------------------------------------- wrappers
    Fault(
        "wrapper: what is set later is set on the layer",
        "_wrapper.py",
        " and hasattr(unwrapped(self), name):",
        ":",
    ),
    Fault(
        "wrapper: a name of a wrapper inside is a name of the layer",
        "_wrapper.py",
        " and hasattr(unwrapped(self), name):",
        " and hasattr(self.__wrapped__, name):",
    ),
    Fault(
        "wrapper: public arrays are taken",
        "_wrapper.py",
        "        _check_own(wrapper)\n",
        "",
    ),
    Fault(
        "wrapper: quantizing takes it off",
        "_wrapper.py",
        "        return _rebuilt(type(self), layer.to_quantized(*args, **kwargs), "
        "own_attributes(self))\n",
        "        return layer.to_quantized(*args, **kwargs)\n",
    ),
    Fault(
        "wrapper: anything can be quantized",
        "_wrapper.py",
        "        return self.__getattribute__(name)\n",
        "        return nn.Module.__getattr__(self, name)\n",
    ),
    # ---------------------------------------------------------------- reporting
    Fault(
        "places of two rules share a line",
        "_report.py",
        "            key = rule, _name",
        "            key = 0, _name",
    ),
    Fault(
        "the figures of a report are read anew each time",
        "_report.py",
        "    @cached_property\n    def _lines",
        "    @property\n    def _lines",
    ),
    Fault(
        "two classes of one name read the same",
        "_errors.py",
        "        names[cls] = ",
        "        names[cls] = cls.__name__ or ",
    ),
    Fault(
        "folding matches more than was given",
        "_fold.py",
        "                key = product[:level], product[level + 1 :], type(product[level][0])",
        "                key = product[:level], product[level + 2 :], type(product[level][0])",
    ),
    Fault(
        "a layer in several places is counted in each",
        "_measure.py",
        "    counted.add(key)\n",
        "",
    ),
]

# ---------------------------------------------------------------- what a request names
OF_A_REQUEST = [
    Fault(
        "regex need not match the whole path",
        "_match.py",
        "        return lambda path: regex.fullmatch(path) is not None",
        "        return lambda path: regex.match(path) is not None",
    ),
    Fault(
        "the last rule decides",
        "_match.py",
        "(mask & -mask).bit_length() - 1",
        "mask.bit_length() - 1",
    ),
    Fault(
        "only the first pattern of a tuple counts",
        "_plan.py",
        "key if isinstance(key, tuple) else (key,))\n",
        "key[:1] if isinstance(key, tuple) else (key,))\n",
    ),
    # To leave a place alone is to leave alone what is inside.
    Fault(
        "what is inside an excluded place is not left alone",
        "_match.py",
        "    return keeps + [True] * len(request.excludes)",
        "    return keeps + [False] * len(request.excludes)",
    ),
    Fault(
        "a rule of None does not leave alone what is inside",
        "_match.py",
        "    keeps = [rule.keeps for",
        "    keeps = [False for",
    ),
    Fault(
        "a regular expression does not leave alone what is inside",
        "_match.py",
        "_regex_test(pattern.source, below)",
        "_regex_test(pattern.source, False)",
    ),
    Fault(
        "a regular expression leaves alone by any beginning of a path",
        "_match.py",
        "            if regex.fullmatch(path) or",
        "            if regex.match(path) or",
    ),
    Fault(
        "what was to be left alone may be lost with the place around it",
        "_plan.py",
        "    _check_left_alone(places, news, left_alone)\n",
        "",
    ),
    Fault(
        "what a rule of None leaves alone may be lost",
        "_select.py",
        "    kept = masks - free | {mask for mask in free if request.rules[rule_of[mask]].keeps}\n",
        "    kept = masks - free\n",
    ),
    Fault(
        "what an exclude leaves alone may be lost",
        "_select.py",
        "    kept = masks - free | {",
        "    kept = {",
    ),
    Fault(
        "what was to be left alone is lost even if the new module holds it",
        "_plan.py",
        "if id(module) in before and id(module) not in after:",
        "if id(module) in before:",
    ),
    Fault(
        "a key with a dot is taken for two steps",
        "_plan.py",
        "if id(module) in before and id(module) not in after:",
        "if id(module) not in after:",
    ),
    Fault(
        "excludes may leave nothing",
        "_strict.py",
        "    if not matched.free:\n",
        "    if False:\n",
    ),
    # Nothing is silent, and that is judged after `where`.
    Fault(
        "a pattern may match nothing",
        "_strict.py",
        "        if not found >> number & 1:\n            raise NoMatchError(_hints",
        "        if False:\n            raise NoMatchError(_hints",
    ),
    Fault(
        "exclude may remove nothing",
        "_strict.py",
        "        if not removed >> number & 1:\n            alone",
        "        if False:\n            alone",
    ),
    Fault(
        "where may reject everything",
        "_strict.py",
        "    if not matched.live & matched.free:\n",
        "    if False:\n",
    ),
    Fault(
        "where may reject all that one of several patterns matches",
        "_strict.py",
        "    _check_patterns(matched)\n",
        "",
    ),
    Fault(
        "a rule may be shadowed",
        "_strict.py",
        "    _check_rules(matched)\n",
        "",
    ),
    Fault(
        "shadowing is judged before where",
        "_strict.py",
        "    deciding = {rule for mask, rule in rule_of.items() if mask in matched.live}\n",
        "    deciding = set(rule_of.values())\n",
    ),
    Fault(
        "where may reject all that an exclude removes",
        "_strict.py",
        "        _check_excludes(matched)\n",
        "        pass\n",
    ),
    Fault(
        "a pattern must not be excluded as a whole",
        "_strict.py",
        "        if masks and all(mask not in self.free for mask in masks):\n",
        "        if False:\n",
    ),
    Fault(
        "where is asked about everything that is excluded",
        "_match.py",
        "mask & unsure:",
        "mask & ~included:",
    ),
    Fault(
        "where is never asked late",
        "_strict.py",
        "        return self._asked_late(masks)\n",
        "        return False\n",
    ),
    Fault(
        "where must bear what is excluded",
        "_match.py",
        "    except Exception:\n        return True\n",
        "    except ZeroDivisionError:\n        return True\n",
    ),
    Fault(
        "what is suggested inside is not narrowed by the rules before",
        "_strict.py",
        "rules=[*request.rules[:rule_number], Rule([wider])]",
        "rules=[*[Rule([])] * rule_number, Rule([wider])]",
    ),
    # What a refused swap leaves as it was.
    Fault(
        "places may lie inside one another",
        "_plan.py",
        "    check_nesting(places, _NESTED)\n",
        "",
    ),
    Fault(
        "the advice is to exclude the outer place",
        "_plan.py",
        "exclude=_excluding([path])",
        "exclude=_excluding([outer[row]])",
    ),
    Fault(
        "a path may mean two places",
        "_plan.py",
        "    _check_names(places)\n",
        "",
    ),
    Fault(
        "a model that the factories changed is not noticed",
        "_plan.py",
        "    check_unmoved(places, places.modules, _MOVED)\n",
        "",
    ),
    Fault(
        "the training mode is set before the last check",
        "_plan.py",
        "    check_unmoved(places, places.modules, _MOVED)\n",
        "    for module, mode in training:\n        module._training = mode\n"
        "    check_unmoved(places, places.modules, _MOVED)\n",
    ),
    Fault(
        "the training mode is not put back when the update fails",
        "_replace.py",
        "    except BaseException:\n        _set_modes(modes)\n",
        "    except BaseException:\n",
    ),
    Fault(
        "the training mode is put back after an ordinary error only",
        "_replace.py",
        "    except BaseException:\n        _set_modes(modes)\n",
        "    except Exception:\n        _set_modes(modes)\n",
    ),
    # What errors advise.
    Fault(
        "half of what is to be excluded is named",
        "_plan.py",
        "select {choice} ({_excluding(chosen)}); to untie",
        "select {choice} ({_excluding(chosen[:1])}); to untie",
    ),
    Fault(
        "any error of a factory is taken for a wrong call",
        "_errors.py",
        "    if not path_was_taken_for_a_module and not _refuses_the_call(function, error):\n",
        "    if False:\n",
    ),
    Fault(
        "a wrong call of a factory is not explained",
        "_errors.py",
        "    if not path_was_taken_for_a_module and not _refuses_the_call(function, error):\n",
        "    if True:\n",
    ),
]
FAULTS += OF_A_REQUEST


def main(words: list[str]) -> int:
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        start = time.perf_counter()
        failed = first_failure(copy(Path(folder) / "unharmed"))
        if failed:
            print(f"without any fault there fails {failed}: nothing can be said")
            return 1
        patience = TIMES_AS_LONG * AT_ONCE * (time.perf_counter() - start)
        folders = [Path(folder) / str(number) for number in range(len(faults))]
        verdicts = list(pool.map(judge, faults, folders, repeat(patience)))
    caught = verdicts.count("caught")
    print(f"{caught} of {len(faults)} faults caught")
    return int(caught < len(faults))


def judge(fault: Fault, folder: Path, patience: float) -> str:
    file = copy(folder) / "mlx_modswap" / fault.file
    text = file.read_text()
    failed = ""
    if text.count(fault.right) == 1:
        file.write_text(text.replace(fault.right, fault.wrong))
        failed = first_failure(folder, patience)
        verdict = "caught" if failed else "NOT CAUGHT"
    else:
        verdict = "STALE"
    shutil.rmtree(folder)
    print(f"{verdict:12}{fault.name}{failed and f'   by {failed}'}", flush=True)
    return verdict


def copy(folder: Path) -> Path:
    """The library, the tests and their settings in a folder of their own."""
    ignore = shutil.ignore_patterns("__pycache__", "data")
    for name in ("mlx_modswap", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def first_failure(folder: Path, patience: float | None = None) -> str:
    """The name of the first test that fails, if one does."""
    command = [sys.executable, "-c", START, "-x", "-q", "-rf", "-p", "no:cacheprovider"]
    files = [next((folder / "tests").rglob(f"test_{name}.py")) for name in TESTS]
    command += ["-o", "addopts=", *map(str, files)]
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        run = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, timeout=patience
        )
    except subprocess.TimeoutExpired:
        return f"taking {TIMES_AS_LONG} times as long"
    output = run.stdout.decode()
    if run.returncode < 0 or "MemoryError" in output:
        return "taking all the memory there is"
    failed = re.search(r"^FAILED \S+::(\w+)", output, re.MULTILINE)
    if bool(run.returncode) != bool(failed):  # nothing was tested: the fault is broken
        raise RuntimeError(output + run.stderr.decode())
    return failed[1] if failed else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
