"""The two ways in which text written by a model is computed: a calculator, and Python in a process of its own."""

import ast
import math
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass

# --- the calculator: an AST walk, never `eval` ---

MAX_LENGTH, MAX_DEPTH, MAX_VALUE = 500, 100, 10**18
STRING = r"'[^'\\\n]*'|\"[^\"\\\n]*\""  # no escapes: a backslash is refused
ARITHMETIC = re.compile(r"(?:[\d\s.,+\-*/%()]|\.count\b)*")  # what may stand outside string literals
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def calculator(expression: str) -> str | None:
    """The value of an arithmetic expression, or of `.count()` on a string literal; None if it is anything else.

    Numbers with + - * / // % and parentheses; commas between thousands are dropped; no power.
    Whole values print without a decimal point, others rounded to 10 decimals. Never raises; takes microseconds.
    """
    if len(expression) > MAX_LENGTH:
        return None
    pieces = re.split(f"({STRING})", expression.strip())  # the odd pieces are string literals
    pieces[::2] = [THOUSANDS.sub("", piece) for piece in pieces[::2]]
    if not all(ARITHMETIC.fullmatch(piece) for piece in pieces[::2]):
        return None
    try:
        value = round(_value(ast.parse("".join(pieces), mode="eval").body, MAX_DEPTH), 10)
    except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
        return None
    return str(int(value)) if value == int(value) else str(value)


def _value(node, depth):
    """The number that the tree stands for; ValueError for a node, a size or a depth that is not allowed."""
    if depth == 0:
        raise ValueError("too deep")
    match node:
        case ast.Constant(value=int() | float() as value):
            pass
        case ast.UnaryOp(op=ast.UAdd() | ast.USub() as sign):
            value = _value(node.operand, depth - 1) * (-1 if isinstance(sign, ast.USub) else 1)
        case ast.BinOp(op=ast.Div()):
            left, right = _value(node.left, depth - 1), _value(node.right, depth - 1)
            value = left // right if left % right == 0 else left / right  # whole quotients stay exact
        case ast.BinOp() if type(node.op) in BINARY:
            value = BINARY[type(node.op)](_value(node.left, depth - 1), _value(node.right, depth - 1))
        case ast.Call(
            func=ast.Attribute(value=ast.Constant(value=str() as text), attr="count"),
            args=[ast.Constant(value=str() as part)],
            keywords=[],
        ):
            value = text.count(part)
        case _:
            raise ValueError(f"{type(node).__name__} is not arithmetic")
    if not abs(value) <= MAX_VALUE:
        raise ValueError("too large")
    return value


# --- Python in a process of its own ---

OUTPUT_BYTES = 1 << 20  # of stdout, of stderr, and of any file that the program writes

# Runs in the fresh interpreter and becomes the program: the limits are set there and not by `preexec_fn`, which would
# run Python in a fork of this process, threads and all.
LAUNCHER = """
import os, resource, sys
program, seconds, memory, file_size = sys.argv[1], *map(int, sys.argv[2:])
limits = {"CORE": 0, "CPU": seconds, "FSIZE": file_size, "NOFILE": 64, "NPROC": 0}
if sys.platform != "darwin":
    limits["AS"] = memory
for name, limit in limits.items():
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (limit, limit))
os.execv(sys.executable, [sys.executable, "-I", program])
"""


@dataclass(frozen=True)
class Outcome:
    status: str  # ok | error | timeout | memory | output_limit
    stdout: str
    stderr: str


def run_python(code: str, timeout: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Run `code` in a fresh, isolated interpreter, and kill it with all of its process group after `timeout` seconds.

    It gets an empty environment, an own temporary folder, and limits on processor time, memory, file size, open files
    and processes (the last does not bind root). The network and the files that this user may touch stay within reach:
    this is a guard against accidents of model-written code, not against an attacker.
    """
    if sys.platform == "darwin":
        warnings.warn("macOS has no limit on a process's memory: programs run without one", stacklevel=1)
    with (
        tempfile.TemporaryDirectory(prefix="nanochat_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as stdout,
        tempfile.TemporaryFile() as stderr,
    ):
        program = os.path.join(folder, "program.py")
        with open(program, "w", encoding="utf-8", errors="replace") as file:
            file.write(code)
        limits = [math.ceil(timeout) + 1, memory_mb << 20, OUTPUT_BYTES]
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", LAUNCHER, program, *map(str, limits)],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            cwd=folder,
            env={},
            start_new_session=True,  # so that its process group is its own, and can be killed whole
        )
        try:
            exit_code, timed_out = process.wait(timeout), False
        except subprocess.TimeoutExpired:
            exit_code, timed_out = None, True
        finally:
            _kill_group(process.pid)
            process.wait()
        out, err = _read(stdout), _read(stderr)
    last_line = err.rstrip().rpartition(b"\n")[2]
    if max(len(out), len(err)) >= OUTPUT_BYTES:
        status = "output_limit"
    elif timed_out or exit_code == -signal.SIGXCPU:
        status = "timeout"
    elif exit_code and last_line.startswith(b"MemoryError"):
        status = "memory"
    else:
        status = "error" if exit_code else "ok"
    return Outcome(status, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))


def _kill_group(group):
    try:
        os.killpg(group, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):  # everyone has left; macOS says so of zombies with the latter
        return


def _read(file):
    file.seek(0)
    return file.read(OUTPUT_BYTES)
