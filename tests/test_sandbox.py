"""What the calculator computes and refuses, and what becomes of programs that a model wrote."""

import os
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.sandbox import OUTPUT_BYTES, calculator, run_python


@pytest.mark.parametrize(
    "expression, value",
    [
        ("48/2", "24"),
        ("2*2.5", "5"),
        ("(1 + 2) * -3", "-9"),
        ("7//2", "3"),
        ("7%4", "3"),
        ("7/2", "3.5"),
        ("20*.01", "0.2"),
        ("0.1+0.2", "0.3"),
        ("2/3", "0.6666666667"),
        ("1,250*2", "2500"),
        ("12,345,678.5+1", "12345679.5"),
        ("999999999999999999/3", "333333333333333333"),
        ("'strawberry'.count('r')", "3"),
        ('"directory open input".count("open")', "1"),
        ("'a,b,c'.count(',') + 1", "3"),
    ],
)
def test_calculator_prints_values_as_the_training_data_has_them(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        "",
        "(",
        "1/0",
        "2**3",
        "1,2",
        "1e5",
        "1 < 2",
        "x",
        "True",
        "'a'",
        "'a'*3",
        "'a' in 'b'",
        "'a'.upper()",
        "'a'.count",
        "'a'.count('a', 0)",
        "'a'.count(*'a')",
        "(1).count(1)",
        "f'{1}'.count('1')",
        "'\\x61'.count('a')",
        "__import__('os').getcwd()",
        "(lambda: 1)()",
        "10" * 10,
        "9" * 400 + ".0",
        "1+" * 120 + "1",
        "(" * 240 + "1" + ")" * 240,
        "1" * 10_000,
        "\x00",
        "\ud800",
    ],
)
def test_calculator_refuses_everything_else(expression):
    assert calculator(expression) is None


@given(st.one_of(st.text(), st.text("0123456789.,+-*/%()' \"count\\\n", max_size=60)))
@settings(max_examples=300, deadline=None, database=None)
def test_calculator_never_raises(expression):
    assert calculator(expression) is None or isinstance(calculator(expression), str)


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


def test_program_lives_in_its_own_folder_which_goes_with_it():
    outcome = run_python("import os; open('mine', 'w').write('x'); os.mkdir('d'); os.chmod('d', 0); print(os.getcwd())")
    assert outcome.status == "ok"
    assert outcome.stdout.strip() != os.getcwd() and not os.path.exists(outcome.stdout.strip())


def test_program_writes_no_file_larger_than_the_bound():
    assert run_python(f"open('big', 'wb').write(b'x' * {2 * OUTPUT_BYTES})").status == "error"


@pytest.mark.skipif(os.geteuid() != 0, reason="the process limit lets only root have children")
def test_children_do_not_outlive_the_program(tmp_path):
    mark = tmp_path / "mark"
    code = f"import os, time\nif os.fork() == 0:\n    time.sleep(1)\n    open({str(mark)!r}, 'w').close()"
    assert run_python(code).status == "ok"
    time.sleep(1.5)
    assert not mark.exists()
