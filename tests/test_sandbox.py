"""What becomes of programs that a model wrote."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import sandbox
from nanochat.sandbox import OUTPUT_BYTES, run_python, run_tests


@pytest.mark.parametrize(
    "code, status",
    [
        ("print('hello')", "ok"),
        ("1/0", "error"),
        ("def f(:", "error"),
        ("raise SystemExit(3)", "error"),
        ("print('\ud800')", "ok"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("while True: print('x' * 1000)", "output_limit"),
        pytest.param(
            "x = [0] * 10**9",
            "memory",
            marks=pytest.mark.skipif(sys.platform == "darwin", reason="macOS has no limit on a process's memory"),
        ),
    ],
)
def test_every_program_gets_its_verdict(code, status):
    assert run_python(code, timeout=1.0 if status == "timeout" else 20.0).status == status


def test_program_sees_its_output_kept_and_nothing_of_this_environment(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "1")
    outcome = run_python("import os, sys; print(sorted(os.environ), sys.flags.isolated); print('no', file=sys.stderr)")
    assert outcome.status == "ok"
    assert "SECRET_OF_THE_PARENT" not in outcome.stdout and outcome.stdout.endswith("1\n")
    assert outcome.stderr == "no\n"


def test_program_has_a_folder_of_its_own_which_goes_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = run_python("import os; open('mine', 'w').write('x'); os.mkdir('d'); os.chmod('d', 0); print(os.getcwd())")
    assert outcome.status == "ok" and outcome.stdout.strip() != os.getcwd()
    assert not list(tmp_path.iterdir())


def test_program_writes_no_file_larger_than_the_bound():
    assert run_python(f"open('big', 'wb').write(b'x' * {2 * OUTPUT_BYTES})").status == "error"


def test_children_do_not_outlive_the_program(tmp_path, wall):
    mark = tmp_path / "mark"
    code = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w').close()"
    assert run_python(code).status in ("ok", "error")  # the limit of processes does not bind root
    time.sleep(1.5)
    assert not mark.exists()


@pytest.fixture(params=sandbox.WALLS)
def wall(request, monkeypatch):
    """Each kind of walls that can be built here."""
    monkeypatch.setattr(sandbox, "walls", lambda: request.param)
    try:
        outcome = run_python("print(1)", timeout=20.0)
    except sandbox.SandboxError as error:
        pytest.skip(f"cannot be built here: {error}")
    assert outcome == sandbox.Outcome("ok", "1\n", "")


def test_weaker_walls_come_to_the_same_verdicts(wall):
    assert run_python("1/0").status == "error"
    assert run_python("while True: pass", timeout=1.0).status == "timeout"
    assert run_python("while True: print('x' * 1000)").status == "output_limit"
    assert run_python("import os; print(len(os.environ))").stdout == "1\n"  # LC_CTYPE is Python's own
    assert run_tests("def f(x): return x + 1", "assert f(1) == 2", "f").status == "ok"
    assert run_tests("def f(x): return x", "assert f(1) == 2", "f").status == "error"
    assert run_tests("def f(x):\n    while True: pass", "assert f(1) == 2", "f", timeout=1.0).status == "timeout"


def test_where_no_strong_walls_can_be_built_the_next_are_and_a_line_says_so(monkeypatch, capsys):
    def running(code, wall, *args):
        if wall != "limits":
            raise sandbox.SandboxError("not permitted")
        return real(code, wall, *args)

    real = sandbox._running
    monkeypatch.setattr(sandbox, "_running", running)
    sandbox.walls.cache_clear()
    assert [sandbox.walls(), sandbox.walls()] == ["limits"] * 2
    sandbox.walls.cache_clear()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and "NOT kept off" in said[0] and "not permitted" in said[0]


# --- an answer and its tests


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "10**50", "2.5", "float('inf')", "'a\\u20ac\\n'", "b'\\x00\\xff'", "1 + 2j",
        "[1, [2, ()]]", "(1, (2.0,))", "{1, 2}", "frozenset({(1, 2)})", "{'a': {1: None}, (1, 2): [True]}",
        "[{'dict': []}, {}]",
    ],
)  # fmt: skip
def test_plain_data_cross_unchanged_both_ways(value):
    tests = f"x = {value}\ny = f(x, key=x)\nassert y == x and type(y) is type(x) and repr(y) == repr(x), y"
    assert run_tests("def f(x, key):\n    assert x == key\n    return x", tests, "f", 20.0).stderr == ""


@pytest.mark.parametrize(
    "raised, seen",
    [
        ("KeyError(3)", "KeyError"), ("type('Mine', (ValueError,), {})('x')", "ValueError"),
        ("type('Own', (Exception,), {})('x')", "Exception"), ("StopIteration", "RuntimeError"),
        ("UnicodeDecodeError('utf-8', b'x', 0, 1, 'y')", "RuntimeError"),
    ],
)  # fmt: skip
def test_what_an_answer_raises_reaches_its_tests_and_what_it_prints_is_kept(raised, seen):
    answer = f"def f(x):\n    print('tried', x)\n    raise {raised}"
    tests = f"try:\n    f(3)\nexcept Exception as error:\n    assert type(error) is {seen}\nelse:\n    assert False"
    outcome = run_tests(answer, tests, "f", 20.0)
    assert (outcome.status, outcome.stdout, outcome.stderr) == ("ok", "tried 3\n", "")


def test_what_an_answer_gives_piece_by_piece_arrives_so():
    tests = "assert tuple(f(3)) == (0, 1, 4)\nassert f(range(3)) == range(3)\nassert next(f({}), 0) == 0"
    answer = "def f(n): return (i * i for i in range(n)) if isinstance(n, int) else n if n else n.keys()"
    assert run_tests(answer, tests, "f", 20.0).stderr == ""


@pytest.mark.parametrize("name", ["pack", "send", "list", "json", "isinstance"])
def test_an_answer_may_be_called_like_anything_here(name):
    answer = f"def {name}(x):\n    return [x + 1]\nif __name__ == '__main__':\n    raise SystemExit(1)"
    assert run_tests(answer, f"assert {name}(1) == [2]", name, 20.0).stderr == ""


def test_an_answer_is_a_module_as_dataclasses_want_it():
    answer = """from __future__ import annotations
from dataclasses import dataclass
import typing
@dataclass
class A:
    x: typing.ClassVar[int] = 1
    y: int = 2
def f():
    return typing.get_type_hints(A)["y"] is int and A(3).y == 3
"""
    assert run_tests(answer, "assert f()", "f", 20.0).stderr == ""


# --- what happens to the process that runs them


def test_many_at_a_time_leave_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    descriptors = len(os.listdir("/dev/fd"))
    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(lambda i: run_python(f"print({i})", timeout=30.0), range(40)))
        assert [outcome.stdout for outcome in outcomes] == [f"{i}\n" for i in range(40)]
        assert [run_tests("def f(): return 1", "assert f() == 1", "f", 30.0).status for _ in range(4)] == ["ok"] * 4
    with pytest.raises(AttributeError):
        run_python(b"1")
    assert len(os.listdir("/dev/fd")) == descriptors
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", [0.0001, 0.005, 0.02, 0.05])
def test_a_deadline_may_fall_at_any_moment(seconds):
    assert run_python("import time; time.sleep(1000)", timeout=seconds).status == "timeout"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's death")
@pytest.mark.parametrize("delay", [0.01, 0.03, 0.3])
def test_programs_die_with_a_parent_that_is_killed(delay, tmp_path):
    before = programs()
    code = "import os, sys; sys.path[:0] = [sys.argv[1]]; from nanochat import sandbox; sandbox.walls()\n"
    code += "print('ready', flush=True); sandbox.run_python('import time; time.sleep(1000)', timeout=900.0)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(Path(sandbox.__file__).parents[1])], stdout=subprocess.PIPE
    )
    assert parent.stdout.readline() == b"ready\n"
    time.sleep(delay)
    parent.kill()
    parent.wait()
    ends = time.monotonic() + 20
    while left := programs() - before:
        assert time.monotonic() < ends, left
        time.sleep(0.05)


def programs():
    """Ids of the processes of sandboxes, launchers and programs."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes()
        except OSError:  # it ended while we looked
            line = b""
        if line.split(b"\0")[1:3] == [b"-I", b"-"] or b"sandbox_launcher.py" in line:
            found.add(entry.name)
    return found


def test_a_parent_that_ignores_its_children_is_told(monkeypatch):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(sandbox.SandboxError, match="SIGCHLD"):
            run_python("1/0")
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.skipif(not Path("/usr/include/asm-generic/unistd.h").is_file(), reason="no kernel headers here")
def test_the_numbers_of_refused_system_calls_are_those_of_the_kernel():
    from nanochat.sandbox_launcher import REFUSED

    text = Path("/usr/include/asm-generic/unistd.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    assert {name: number for name, (_, number) in REFUSED.items() if number is not None}.items() <= numbers.items()
