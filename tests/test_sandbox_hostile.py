"""Programs that mean harm: each gets its verdict by its deadline, and nothing outside is changed by it.

Where the machine cannot build the strongest walls (sandbox.walls), what only they keep off is skipped.
"""

# ruff: noqa: E501  programs in one line

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nanochat import sandbox

CONTAINED = sandbox.walls() == "namespaces"
needs_namespaces = pytest.mark.skipif(not CONTAINED, reason=f"walls here: {sandbox.WALLS[sandbox.walls()]}")
SECONDS = 3.0
LIBC = "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
C_LOOP = "buffer = ctypes.create_string_buffer(1 << 20)\nwhile True: libc.memset(buffer, 1, 1 << 20)"
CALLBACK_LOOP = "compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(lambda a, b: 1)\n"

# name: (program, the verdicts that are right). {canary} is a file outside that everyone may write, {parent} the process
# that runs the sandbox, {secret} what its environment holds.
ANYWHERE = {
    # loops, in Python and in C
    "loop": ("while True: pass", "timeout"),
    "loop that catches everything": ("while True:\n    try:\n        while True: pass\n    except BaseException: pass", "timeout"),
    "sleep": ("import time; time.sleep(1000)", "timeout"),
    "wait for input": ("import sys; sys.stdin.read(); input()", "error"),
    "loop in a regular expression": ("import re; re.match('(a*)*b', 'a' * 40)", "timeout"),
    "loop in big numbers": ("x = 3 ** (10 ** 8)", "timeout memory"),
    "loop in sum": ("import itertools; sum(itertools.repeat(1))", "timeout"),
    "loop in C": (LIBC + C_LOOP, "timeout"),
    "pause in C": (LIBC + "libc.pause()", "timeout"),
    "deadlock": ("import threading; a = threading.Lock(); a.acquire(); a.acquire()", "timeout"),
    "loop at exit": ("import atexit\n@atexit.register\ndef end():\n    while True: pass", "timeout"),
    "loop in a finalizer": ("class A:\n    def __del__(self):\n        while True: pass\na = A()\ndel a", "timeout"),
    # signals to itself
    "ignores every signal": (
        "import signal\nfor n in range(1, 65):\n    try: signal.signal(n, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        "timeout",
    ),
    "blocks every signal": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass", "timeout"
    ),
    "kills its group": ("import os, signal; os.killpg(0, signal.SIGKILL)", "ok error"),
    "stops itself": ("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)", "ok timeout error"),
    "raises its limits": (
        "import resource\nfor name in ('AS', 'CPU', 'FSIZE', 'NPROC', 'NOFILE'):\n"
        "    resource.setrlimit(getattr(resource, 'RLIMIT_' + name), (-1, -1))",
        "error",
    ),
    "crashes": (LIBC + "libc.memset(0, 1, 1)", "error"),
    "aborts": ("import os; os.abort()", "error"),
    "exits oddly": ("import os; os._exit(77)", "error"),
    "recursion": ("f = lambda: f()\nf()", "error"),
    "recursion in C": ("import sys; sys.setrecursionlimit(10**9)\nx = ()\nfor _ in range(10**6): x = (x,)\nrepr(x)", "error memory ok"),
    "stops its group": ("import os, signal, time\nos.kill(0, signal.SIGSTOP)\ntime.sleep(1000)", "timeout error"),
    "outlives its launcher": (
        LIBC + "import os, signal, time\nlibc.prctl(1, 0, 0, 0, 0)\n"
        "try: os.kill(0, signal.SIGKILL)\nexcept OSError: pass\nos.setsid()\ntime.sleep(1000)", "timeout error",
    ),
    # memory
    "one large block": ("x = bytearray(1 << 34)", "memory"),
    "many small blocks": ("x = []\nwhile True: x.append(bytes(100000))", "memory"),
    "a large string": ("x = 'a'\nwhile True: x += x", "memory"),
    "a large range": ("x = list(range(10**9))", "memory"),
    "memory, caught": ("x = []\nwhile True:\n    try: x.append(bytes(10**6))\n    except MemoryError: pass", "timeout"),
    "mapped memory": ("import mmap\nx = mmap.mmap(-1, 1 << 33)", "error memory"),
    "memory in C": (LIBC + "libc.malloc.restype = ctypes.c_void_p\nassert not libc.malloc(ctypes.c_size_t(1 << 33))", "ok"),
    # disk
    "a large file": ("open('big', 'wb').write(b'x' * (1 << 24))", "error"),
    "a large file in pieces": ("f = open('big', 'wb', 0)\nfor _ in range(1 << 16): f.write(b'x' * 65536)", "error"),
    "a file of holes": ("open('big', 'wb').truncate(1 << 40)", "error"),
    "open files": ("x = [open('a', 'w') for _ in range(10**5)]", "error"),
    "space past the end of its output": (LIBC + "assert libc.fallocate(1, 1, 0, ctypes.c_long(3 << 30)) == -1", "ok"),
    "folders within each other": ("import os\nfor _ in range(3000):\n    os.mkdir('a')\n    os.chdir('a')", "ok error"),
    # output
    "direct output": (
        "import fcntl, os\nprint(1, flush=True)\nfcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL) | os.O_DIRECT)",
        "ok error",
    ),
    "endless output": ("while True: print('x' * 1000)", "output_limit"),
    "endless errors": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "output_limit"),
    "endless output, caught": (
        "import os\nwhile True:\n    try: os.write(1, b'x' * 65536)\n    except OSError: pass", "output_limit"
    ),
    "output by descriptor": ("import os\nwhile True: os.write(2, b'x' * 65536)", "output_limit"),
    "a hole in the output": ("import os; os.lseek(1, 1 << 40, 0); os.write(1, b'x')", "error"),
    "bytes that are no text": ("import os; os.write(1, bytes(range(256)) * 10)", "ok"),
    # source that is none
    "a null byte": ("x = 1\0", "error ok"),
    "deep nesting": ("(" * 5000 + ")" * 5000, "error memory"),
    "a lone surrogate": ("print('\ud800')", "ok"),
    "not Python": ("```python\nprint(1)\n```", "error"),
    "an unknown encoding": ("# -*- coding: rot13 -*-\nprint(1)", "error"),
    # the environment
    "reads the environment": (
        "import os, subprocess\nassert '{secret}' not in str(os.environ) + str(os.environb)", "ok"
    ),
}  # fmt: skip
ONLY_IN_NAMESPACES = {
    # processes
    "fork bomb": ("import os\nwhile True: os.fork()", "error"),
    "fork bomb, caught": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass", "timeout"),
    "threads": ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(99,)).start()", "error"),
    "a shell": ("import os; assert os.system('echo hi')", "ok error"),
    "a subprocess": ("import subprocess; subprocess.run(['/bin/sh', '-c', ':(){{ :|:& }};:'])", "error"),
    "a daemon": ("import os\nif os.fork() == 0:\n    os.setsid()\n    while True: pass", "error"),
    "a new session": (LIBC + "import os\nos.setsid()\nlibc.prctl(1, 0, 0, 0, 0)\nwhile True: pass", "timeout error"),
    "multiprocessing": ("import multiprocessing as m\nm.Process(target=print).start()", "error"),
    # others' processes
    "signals to the parent": ("import os, signal\nos.kill({parent}, signal.SIGKILL)", "error"),
    "signals to its own parent": ("import os, signal\nassert os.getppid() == 0", "ok"),
    "signals to everyone": ("import os, signal\nos.kill(-1, signal.SIGKILL)", "ok error"),
    "attaches to the parent": (LIBC + "assert libc.ptrace(16, {parent}, 0, 0) == -1", "ok"),
    "lists processes": ("import os\nassert not os.path.exists('/proc/{parent}')", "ok"),
    "the parent's environment": ("print(open('/proc/{parent}/environ').read())", "error"),
    "the parent's memory": ("open('/proc/{parent}/mem', 'r+b').write(b'x')", "error"),
    "rights": ("import os\nfor f in (os.setuid, os.setgid):\n    try: f(0)\n    except OSError: pass\n    else: raise SystemExit(1)", "ok"),
    # the network
    "a connection outside": ("import socket; socket.create_connection(('1.1.1.1', 53), 3)", "error"),
    "a connection to this machine": ("import socket; socket.create_connection(('127.0.0.1', {port}), 3)", "error"),
    "a name": ("import socket; socket.getaddrinfo('example.com', 80)", "error"),
    "a datagram": ("import socket\nsocket.socket(2, 2).sendto(b'x', ('8.8.8.8', 53))", "error"),
    "a raw socket": ("import socket; socket.socket(2, 3, 1)", "error"),
    "a web page": ("import urllib.request; urllib.request.urlopen('http://example.com', timeout=3)", "error"),
    "a socket in the file system": ("import socket; socket.socket(1).connect('/run/docker.sock')", "error"),
    # others' files
    "writes outside": ("open('{canary}', 'w').write('mine')", "error"),
    "deletes outside": ("import os; os.remove('{canary}')", "error"),
    "deletes everything": ("import shutil, os\nfor d in os.listdir('/'): shutil.rmtree('/' + d, ignore_errors=True)", "ok timeout"),
    "deletes Python": ("import os, sys; os.remove(os.__file__)", "error"),
    "writes into Python": ("import os; open(os.__file__, 'a')", "error"),
    "reads this project": ("print(open('{project}/pyproject.toml').read())", "error"),
    "reads the passwords": ("print(open('/etc/shadow').read(), open('/etc/passwd').read())", "error"),
    "reads outside": ("print(open('{canary}').read())", "error"),
    "a link outside": ("import os; os.symlink('{canary}', 'x'); open('x', 'w')", "error"),
    "a device": ("import os, stat; os.mknod('disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))", "error"),
    "raw disk": ("open('/dev/vda', 'wb')", "error"),
    "mounts": (LIBC + "assert libc.mount(b'x', b'/tmp', b'tmpfs', 0, None) == -1", "ok"),
    "mounts in a namespace of its own": (
        LIBC + "libc.unshare(0x10020000)\nlibc.mount(None, b'/', None, 0x1020, None)\n"
        "libc.umount2(b'/usr', 2)\nopen('/usr/x', 'w')", "error",
    ),
    "out of its root": (
        "import os\nos.mkdir('x')\nfd = os.open('.', 0)\ntry: os.chroot('x')\nexcept OSError: pass\n"
        "os.fchdir(fd)\nfor _ in range(50): os.chdir('..')\nassert not os.path.exists('.{canary}')", "ok",
    ),
    "many files": ("for i in range(10**6): open(str(i), 'w').write('x' * 1000)", "error"),
    "many folders": ("import os\nfor i in range(10**6): os.mkdir(str(i))", "error"),
    "much in all": ("for i in range(1000): open(str(i), 'wb').write(b'x' * (1 << 19))", "error"),
    "shared memory": (
        LIBC + "for _ in range(10**4):\n    assert libc.shmget(0, ctypes.c_size_t(1 << 27), 0o1600) != -1", "error"
    ),
    "semaphores": (LIBC + "for _ in range(10**5):\n    assert libc.semget(0, 32000, 0o600) != -1", "error"),
    "messages": (LIBC + "for _ in range(10**5):\n    assert libc.msgget(0, 0o600) != -1", "error"),
    "shared memory of a new namespace": (
        LIBC + "libc.unshare(0x18000000)\nfor _ in range(10**4):\n"
        "    assert libc.shmget(0, ctypes.c_size_t(1 << 27), 0o1600) != -1", "error"
    ),
    "rings": (LIBC + "assert libc.syscall(425, 8, ctypes.create_string_buffer(256)) == -1", "ok"),
    "keys": (LIBC + "assert libc.syscall(250 if ctypes.sizeof(ctypes.c_void_p) == 8 else 219, 0, -3, 1) == -1", "ok"),
    "the clock and the host's name": ("import time, socket\nsocket.sethostname('x')", "error"),
}  # fmt: skip

TESTS = "assert all(map(lambda x: f(x) == x + 1, [1, 41]))\nassert f(1) == 2"
# Answers to "write f(x), which adds one", none of which does.
TAMPERING = {
    "leaves with 0": "import os\nos._exit(0)",
    "leaves when called": "import os\ndef f(x): os._exit(0)",
    "exits": "raise SystemExit(0)",
    "ends the loop over it": "def f(x): raise StopIteration",
    "exits when called": "def f(x): raise SystemExit(0)",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\ndef f(x): return E()",
    "a number equal to everything": "class E(int):\n    def __eq__(self, other): return True\ndef f(x): return E(0)",
    "no assertions": "import builtins\nbuiltins.AssertionError = Exception\ndef f(x): return 0",
    "no checks": "import sys\nsys.modules['__main__'].__dict__['check'] = print\ndef f(x): return 0",
    "rewrites the helpers": "import sys\nm = sys.modules['__main__']\nm.pack = lambda v: 'x'\nm.send = print\ndef f(x): return 0",
    "looks for the tests": "import gc\ndef f(x): return [o for o in gc.get_objects() if 'assert f(' in str(o)][0]",
    "reads its caller": "import sys\ndef f(x): return sys._getframe(1).f_locals['expected']",
    "speaks for itself": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"value": 2}\\n\' * 9)\n    except OSError: pass\ndef f(x): return 0',
    "sends code": 'import os\nfor fd in range(3, 64):\n    try: os.write(fd, b\'{"eval": "exit(0)"}\\n\')\n    except OSError: pass\ndef f(x): return 0',
    "sends no end": "import os, itertools\nfor fd in itertools.cycle(range(3, 64)):\n    try: os.write(fd, b'x' * 9999)\n    except OSError: pass",
    "hangs": "def f(x):\n    while True: pass",
    "takes all memory": "def f(x): return 'a' * (1 << 34)",
    "writes without end": "def f(x):\n    while True: print('x' * 1000)",
    "is not there": "def g(x): return x + 1",
    "is no Python": "def f(x) return",
    "prints the verdict": "print('ok')\nprint('passed')\ndef f(x): return 0",
    "closes the pipes": "import os\nos.closerange(3, 64)\ndef f(x): return 0",
}  # fmt: skip


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """What the programs are to leave alone."""
    folder = tmp_path_factory.mktemp("outside")
    for above in (folder, *folder.parents[:2]):  # as far as pytest made them private
        os.chmod(above, 0o755)
    canary = folder / "canary"
    canary.write_text("alive")
    canary.chmod(0o666)
    os.environ["NANOCHAT_TEST_SECRET"] = "tell-nobody"
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "canary": canary, "parent": os.getpid(), "secret": "tell-nobody", "project": Path(__file__).parent.parent,
            "port": server.getsockname()[1],
        }  # fmt: skip
    del os.environ["NANOCHAT_TEST_SECRET"]
    assert canary.read_text() == "alive"
    if sys.platform == "linux":
        time.sleep(0.2)
        left = [path for path in Path("/proc").glob("[0-9]*/cmdline") if is_program(path)]
        assert not left, "programs that outlived their verdict"


def is_program(cmdline):
    try:
        return cmdline.read_bytes().split(b"\0")[1:3] == [b"-I", b"-"]
    except OSError:  # it ended while we looked
        return False


@pytest.fixture(scope="module")
def found(outside):
    """Name -> (outcome, seconds) of all programs, several at a time as an examination runs them."""
    programs = ANYWHERE | (ONLY_IN_NAMESPACES if CONTAINED else {})

    def run(item):
        name, (program, _) = item
        for key, value in outside.items():
            program = program.replace(f"{{{key}}}", str(value))
        started = time.monotonic()
        return name, (sandbox.run_python(program, SECONDS), time.monotonic() - started)

    with ThreadPoolExecutor(6) as pool:
        return dict(pool.map(run, programs.items()))


def check(name, table, found):
    outcome, seconds = found[name]
    print(outcome.stderr[-500:])
    assert outcome.status in table[name][1].split()
    assert max(len(outcome.stdout), len(outcome.stderr)) <= sandbox.OUTPUT_BYTES


@pytest.mark.parametrize("name", ANYWHERE)
def test_a_hostile_program_gets_its_verdict(name, found):
    check(name, ANYWHERE, found)


@needs_namespaces
@pytest.mark.parametrize("name", ONLY_IN_NAMESPACES)
def test_a_hostile_program_reaches_nothing(name, found):
    check(name, ONLY_IN_NAMESPACES, found)


@pytest.fixture(scope="module")
def judged():
    with ThreadPoolExecutor(4) as pool:
        answers = {"honest": "def f(x): return x + 1"} | TAMPERING
        return dict(
            zip(answers, pool.map(lambda a: sandbox.run_tests(a, TESTS, "f", 2.0), answers.values()), strict=True)
        )


def test_an_honest_answer_passes(judged):
    assert judged["honest"].status == "ok"


@pytest.mark.parametrize("name", TAMPERING)
def test_no_answer_passes_but_by_right_values(name, judged):
    status = judged[name].status
    assert status in {
        "hangs": ["timeout"], "takes all memory": ["memory"], "writes without end": ["output_limit"],
        "sends no end": ["memory", "error", "timeout"],
    }.get(name, ["error", "timeout"])  # fmt: skip


def test_deadlines_are_kept(found):
    late = {name: seconds for name, (_, seconds) in found.items() if seconds > SECONDS + 20}
    assert not late
