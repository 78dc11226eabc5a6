"""What becomes of programs that a model wrote."""

import os
import sys
import tempfile
import time

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
    assert run_tests("def f(x): return x + 1", "assert f(1) == 2", ["f"]).status == "ok"
    assert run_tests("def f(x): return x", "assert f(1) == 2", ["f"]).status == "error"
    assert run_tests("def f(x):\n    while True: pass", "assert f(1) == 2", ["f"], timeout=1.0).status == "timeout"


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
    assert len(said) == 1 and "NOT kept off: the network" in said[0] and "not permitted" in said[0]


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
    assert run_tests("def f(x, key):\n    assert x == key\n    return x", tests, ["f"], 20.0).stderr == ""


def test_what_an_answer_raises_reaches_its_tests_and_what_it_prints_is_kept():
    answer = "def f(x):\n    print('tried', x)\n    raise KeyError(x)"
    tests = "try:\n    f(3)\nexcept KeyError as error:\n    assert error.args == ('3',)\nelse:\n    assert False"
    outcome = run_tests(answer, tests, ["f"], 20.0)
    assert (outcome.status, outcome.stdout) == ("ok", "tried 3\n")


def test_what_an_answer_gives_piece_by_piece_arrives_so():
    tests = "assert tuple(f(3)) == (0, 1, 4)\nassert sum(g(3)) == 3 and g(3) == range(3)\nassert sorted(h()) == ['a']"
    answer = "def f(n): return (i * i for i in range(n))\ndef g(n): return range(n)\ndef h(): return {'a': 1}.keys()"
    assert run_tests(answer, tests, ["f", "g", "h"], 20.0).status == "ok"


def test_helpers_of_an_answer_can_be_called_too():
    answer = "def double(x): return 2 * x\ndef f(x): return double(x) + 1"
    assert run_tests(answer, "assert f(double(2)) == 9", ["double", "f"], 20.0).status == "ok"
