"""Python that a model wrote, run in a process of its own behind the walls that the machine can build."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from nanochat.sandbox_launcher import MACHINES

OUTPUT_BYTES = 1 << 20  # of stdout, of stderr, and of any file that the program writes
PARTS = Path(__file__).parent
LIMITS = "limits on time, memory, file size, open files and processes"
FILTERED = sys.platform == "linux" and os.uname().machine in MACHINES  # some system calls are refused
REST = "" if FILTERED else "the network, "
WALLS = {  # from the strongest: name -> what holds
    "namespaces": f"no network, no files but Python's own and a small folder, no other processes, {LIMITS}",
    "user": f"an unused user's rights, {LIMITS}; NOT kept off: {REST}files that everyone may read or write",
    "limits": f"{LIMITS}; NOT kept off: {REST}this user's files and environment, of an answer its tests",
}


class SandboxError(RuntimeError):
    """No program can be run here, or not behind the walls that could be built before."""


@dataclass(frozen=True)
class Outcome:
    status: str  # ok | error | timeout | memory | output_limit
    stdout: str
    stderr: str


@lru_cache
def walls() -> str:
    """The strongest of WALLS that this machine can build: tried out once. Where it is not the strongest, a line says so
    and why."""
    why = []
    for name in WALLS if sys.platform == "linux" else ("user", "limits"):
        if name == "user" and os.geteuid() != 0:
            continue
        try:
            with _running("print(6 * 7)", name, 10.0, 256) as program:
                outcome = program.outcome(10.0)
        except SandboxError as error:
            why.append(f"{name}: {error}")
            continue
        if outcome.stdout == "42\n":
            if why or sys.platform == "darwin":
                no_memory = "; no limit on memory on macOS" if sys.platform == "darwin" else ""
                print(f"sandbox: {WALLS[name]}{no_memory} ({'; '.join(why)})", file=sys.stderr, flush=True)
            return name
        why.append(f"{name}: {outcome.stderr.strip()[-200:]}")
    raise SandboxError(f"no program can be run in a process of its own here: {'; '.join(why)}")


def run_python(code: str, timeout: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Run `code` in a fresh, isolated interpreter with an empty environment and a folder of its own; after `timeout`
    seconds it is killed with all that it started. What else it is kept from, `WALLS[walls()]` says."""
    with _running(code, walls(), timeout, memory_mb) as program:
        return program.outcome(timeout)


def run_tests(answer: str, tests: str, name: str, timeout: float = 5.0, memory_mb: int = 256) -> Outcome:
    """Whether a program passes tests that call its function `name`. The two run in processes of their own, and plain
    data go between them: whatever an answer does, only right values make it pass. stderr is the tests', or the answer's
    where its own program failed."""
    head = (PARTS / "sandbox_calls.py").read_text(encoding="utf-8")
    with contextlib.ExitStack() as ends:
        calls, values = os.pipe(), os.pipe()
        for end in (*calls, *values):
            ends.callback(os.close, end)
        answering = f"{head}\nanswer_calls({answer!r}, {calls[0]}, {values[1]})\n"
        testing = f"{head}\ntest_answer({tests!r}, {name!r}, {values[0]}, {calls[1]})\n"
        with (
            _running(answering, walls(), timeout, memory_mb, (calls[0], values[1])) as program,
            _running(testing, walls(), timeout, memory_mb, (values[0], calls[1])) as judge,
        ):
            ends.close()  # else neither would see the other's end
            verdict = judge.outcome(timeout)
            own = program.outcome(0 if verdict.status == "timeout" else 0.5)  # with its tests gone, it ends by itself
    status = own.status if verdict.status != "ok" and own.status in ("memory", "output_limit") else verdict.status
    return Outcome(status, own.stdout, own.stderr if own.status == "error" else verdict.stderr)


class _Program:
    """A program under way, behind `wall`."""

    def __init__(self, wall: str, process: subprocess.Popen, stdout, stderr, report: int, lifeline: int):
        self.wall, self.process, self.stdout, self.stderr = wall, process, stdout, stderr
        self.report, self.lifeline, self.expired = report, lifeline, False

    def outcome(self, timeout: float) -> Outcome:
        """What became of it, after `timeout` seconds at the latest. SandboxError where its walls could not be built."""
        deadline = threading.Timer(timeout, self.expire)  # Popen.wait would look only every 50 ms
        deadline.daemon = True
        deadline.start()
        try:
            code = self.process.wait()
        finally:
            deadline.cancel()
        self.kill_group()
        try:
            failure = os.read(self.report, 4096)
        except BlockingIOError:  # nothing, and a process that was forked from this one meanwhile has the other end, too
            failure = b""
        if failure:
            raise SandboxError(failure.decode("utf-8", "replace"))
        out, err = _read(self.stdout), _read(self.stderr)
        last_line = err.rstrip().rpartition(b"\n")[2]
        if max(len(out), len(err)) >= OUTPUT_BYTES:
            status = "output_limit"
        elif self.expired or code == -signal.SIGXCPU:
            status = "timeout"
        elif code and last_line.startswith(b"MemoryError"):
            status = "memory"
        else:
            status = "error" if code else "ok"
        return Outcome(status, out.decode("utf-8", "replace"), err.decode("utf-8", "replace"))

    def expire(self) -> None:
        """In a namespace its launcher, which stands outside, ends it with all that it started; else its group is it."""
        self.expired = True
        if self.wall != "namespaces":
            self.kill_group()
            return
        try:
            os.write(self.lifeline, b".")
        except BrokenPipeError:  # it has just ended by itself
            return

    def kill_group(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # everyone has left; macOS says so of zombies with the latter
            return

    def end(self) -> None:
        if self.process.poll() is None:
            self.expire()
            self.process.wait()


@contextlib.contextmanager
def _running(code: str, wall: str, timeout: float, memory_mb: int, pipes: tuple = ()) -> Iterator[_Program]:
    """A program in a fresh interpreter, ended when the block is left; pipes: descriptors that it has, too."""
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:
        raise SandboxError("SIGCHLD is ignored in this process: it would not learn how a program ended")
    limits = {"CORE": 0, "CPU": math.ceil(timeout) + 1, "FSIZE": OUTPUT_BYTES, "NOFILE": 64, "NPROC": 0}
    if sys.platform != "darwin":
        limits["AS"] = memory_mb << 20
    interpreter = {os.path.realpath(sys.executable + "/../.."), sys.prefix, sys.base_prefix}
    text = code.encode("utf-8", "replace")
    with _folder() as folder, _file() as source, _file() as stdout, _file() as stderr, contextlib.ExitStack() as ends:
        (report, reported), (lifeline, lifeline_end) = os.pipe(), os.pipe()
        ends.callback(os.close, report)
        ends.callback(os.close, lifeline_end)
        with contextlib.ExitStack() as its_ends:
            its_ends.callback(os.close, reported)
            its_ends.callback(os.close, lifeline)
            os.set_blocking(report, False)
            source.write(text)
            source.seek(0)
            config = {
                "walls": wall, "folder": folder, "visible": sorted(interpreter, key=len), "limits": limits,
                "filter": FILTERED, "pipes": pipes, "report": reported, "lifeline": lifeline, "parent": os.getpid(),
            }  # fmt: skip
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(PARTS / "sandbox_launcher.py"), json.dumps(config)],
                stdin=source,
                stdout=stdout,
                stderr=stderr,
                cwd=folder,
                env={},
                pass_fds=(reported, lifeline, *pipes),
                start_new_session=True,  # so that its process group is its own, and can be killed whole
            )
        program = _Program(wall, process, stdout, stderr, report, lifeline_end)
        try:
            yield program
        finally:
            program.end()


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    folder = tempfile.TemporaryDirectory(prefix="nanochat_", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:  # thousands of folders within each other
            subprocess.run(["rm", "-rf", folder.name], check=False)


def _file():
    """On Linux a file in memory: of one on a disk a program may reserve space past its end, whatever its limit, or ask
    for access that this process then cannot read by."""
    return open(os.memfd_create("nanochat"), "w+b") if sys.platform == "linux" else tempfile.TemporaryFile()


def _read(file) -> bytes:
    file.seek(0)
    return file.read(OUTPUT_BYTES)
