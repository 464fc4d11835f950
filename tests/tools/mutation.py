"""Put faults into the code at random, one at a time, and see which of them the tests catch.

    python tests/tools/mutation.py [--count 100] [--seed 0] [--jobs 2]

cosmic-ray makes the faults, in copies of the repository, so the files here stay as they are. A
fault is tried with the tests of its own package first. One that makes the tests hang is caught.
"""

import argparse
import contextlib
import difflib
import itertools
import multiprocessing
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import hypothesis  # noqa: F401 - so that no run of the tests has to load it
import pytest
import torch  # noqa: F401 - likewise
from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec

# The tests tried for the faults in a folder: its own first, then those of what is made with it.
TESTS = {
    "patterns": "patterns api explain testing".split(),
    "fxrewrite/engine": "engine patterns pipeline api explain".split(),
    "fxrewrite/ir": "ir engine patterns".split(),
    "fxrewrite/verification": "verification testing".split(),
    "fxrewrite/testing": "testing patterns".split(),
}
# Left out: `|`, which is nearly always in an annotation; decorators, without which hardly anything
# can be imported; what merely exchanges `is` and `==`; making a number smaller, not larger; and
# numbers in `testing`, nearly all of which say what sizes may be drawn.
KINDS = re.compile(
    r"core/(ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Add|Div_Mul|FloorDiv_Add|Mod_Add|BitAnd_Add)"
    r"|ReplaceComparisonOperator_(Eq_NotEq|NotEq_Eq|Lt_LtE|LtE_Lt|Gt_GtE|GtE_Gt|Is_IsNot|IsNot_Is)"
    r"|ReplaceUnaryOperator_Delete_(Not|USub)|AddNot|Replace(True|False|And|Or|Break|Continue)With.*"
    r"|ExceptionReplacer|NumberReplacer|ZeroIterationForLoop)"
)


def possible_faults() -> list[MutationSpec]:
    """All faults that may be tried, in an order that is always the same."""
    paths = sorted(path for folder in TESTS for path in Path(folder).glob("*.py"))
    with use_db(":memory:", WorkDB.Mode.create) as found:
        init(paths, found, {})
        faults = [fault for item in found.work_items for fault in item.mutations]
    faults = [each for each in faults if KINDS.fullmatch(each.operator_name)]
    return sorted(faults, key=lambda it: (it.module_path, it.operator_name, it.occurrence))


def is_of_interest(fault: MutationSpec) -> bool:
    """Whether Python can read the file with the fault, and it changes more than how things look."""
    source, operator = fault.module_path.read_text(), get_operator(fault.operator_name)()
    try:
        compile(mutate_code(source, operator, fault.occurrence), fault.module_path, "exec")
    except (SyntaxError, AttributeError):  # the latter is cosmic-ray's, at `except torch.Error:`
        return False
    if "Number" in fault.operator_name and (
        fault.occurrence % 2 == 1 or fault.module_path.parent.name == "testing"
    ):
        return False
    line = source.splitlines()[fault.start_pos[0] - 1]
    return fault.definition_name != "__repr__" and "strict=True" not in line


def copy_repository(folder: Path) -> None:
    """Copy what git knows or would add; `patterns` is put where it is once installed."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, text=True).split("\0"):
        if Path(name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(name, folder / name)
    (folder / "fxrewrite/patterns").symlink_to(folder / "patterns")


def run_tests(folder: Path, packages: list[str]) -> None:
    """In a process of its own: run the tests in a copy, and end with what pytest returns."""
    sys.path.insert(0, str(folder))
    os.environ |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    options = ["-x", "-p", "no:cacheprovider", "-m", "not slow"]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        code = pytest.main([*options, *(f"tests/{each}" for each in packages)])
    sys.exit(code)


def do_tests_pass(folder: Path, packages: list[str], seconds: float) -> bool:
    """Whether tests pass in a copy within some time; torch is loaded already, as it is here."""
    run = multiprocessing.get_context("fork").Process(target=run_tests, args=(folder, packages))
    run.start()
    run.join(seconds)
    run.kill()
    return run.exitcode == 0


def time_without_fault(folder: Path) -> float:
    """How many seconds all tests take as things are; they must pass."""
    os.chdir(folder)
    start = time.monotonic()
    if not do_tests_pass(folder, sorted(set(itertools.chain(*TESTS.values()))), 3600):
        raise SystemExit("The tests fail without any fault.")
    return time.monotonic() - start


def try_faults(folder: Path, faults: list[MutationSpec], seconds: float) -> list[str]:
    """Try some faults in a copy; what is given are those that no test caught."""
    os.chdir(folder)
    sys.dont_write_bytecode = True
    missed = []
    for fault in faults:
        path, start = fault.module_path, time.monotonic()
        with use_mutation(path, get_operator(fault.operator_name)(), fault.occurrence) as versions:
            is_missed = do_tests_pass(folder, TESTS[str(path.parent)], seconds)
        place = f"{path}:{fault.start_pos[0]}: {fault.operator_name}"
        taken = f"{time.monotonic() - start:4.0f} s"
        print("missed" if is_missed else "caught", taken, place, flush=True)
        if is_missed:
            before, after = (each.splitlines() for each in versions)
            missed += [place, *difflib.unified_diff(before, after, lineterm="", n=1), ""]
    return missed


def main() -> None:
    """Draw a sample, try it in as many copies as there are jobs, and say what was missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="how many faults to try")
    parser.add_argument("--seed", type=int, default=0, help="which faults to draw")
    parser.add_argument("--jobs", type=int, default=2, help="how many to try at the same time")
    options = parser.parse_args()

    faults = possible_faults()
    random.Random(options.seed).shuffle(faults)
    sample = list(itertools.islice(filter(is_of_interest, faults), options.count))
    print(f"{len(sample)} of fewer than {len(faults)} faults, seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as work, ProcessPoolExecutor(options.jobs) as pool:
        copies = [Path(work).resolve() / str(job) for job in range(options.jobs)]
        for each in copies:
            copy_repository(each)
        seconds = max(pool.map(time_without_fault, copies))
        print(f"without any fault the tests pass in {seconds:.0f} s", flush=True)
        parts = [sample[job :: options.jobs] for job in range(options.jobs)]
        limits = [60 + 3 * seconds] * options.jobs
        missed = [each for part in pool.map(try_faults, copies, parts, limits) for each in part]
    print("\n".join(["", *missed]))
    print(f"{len(sample) - len(missed)} of {len(sample)} caught, seed {options.seed}")


if __name__ == "__main__":
    main()
