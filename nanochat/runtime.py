"""The machine that a command runs on: device, compute dtype, ranks; and how its processes talk to each other."""

import base64
import contextlib
import ctypes
import datetime
import glob
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

# Imported when a group exists already, this module holds it for ever by its default arguments (torch 2.13). The group's
# threads then outlive the interpreter, and one process in ten ends with an abort.
import torch.distributed.nn.functional  # noqa: F401

from nanochat import machines, paths

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# What torchrun tells its workers, and what a lone process is.
RANK_VARIABLES = (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"))


@dataclass(frozen=True)
class Runtime:
    """What a function needs to know of the machine. Passed on, never global."""

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    attention: str = ""  # the attention backend that is forced by name; empty = the best for the device
    disabled: tuple[str, ...] = ()  # what scripts.doctor found not to work on this machine, by name
    store: dist.Store | None = field(default=None, repr=False, compare=False)  # where the ranks met

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *values, **kwargs) -> None:
        if self.is_main:
            print(*values, **kwargs, flush=True)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value) -> list:
        """The values of all ranks, in order of rank, on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def silent_ranks(self, patience: float = 2.0) -> list[int]:
        """After a collective has failed: the ranks that do not say within `patience` seconds that they are here."""
        silent = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline = time.monotonic() + patience
        try:
            self.store.set(f"here/{self.rank}", "")
            while silent and time.monotonic() < deadline:
                silent = [rank for rank in silent if not self.store.check([f"here/{rank}"])]
                time.sleep(0.1)
        except dist.DistError:  # the store is gone: unless it is torchrun's, it lives in the process of rank 0
            return [0] if 0 in silent else silent
        return silent

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def rng_state(self) -> dict[str, str]:
        """torch's generators on this rank, in base64."""
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state()
        return {name: base64.b64encode(bytes(state.tolist())).decode() for name, state in states.items()}

    def set_rng_state(self, states: dict[str, str]) -> None:
        tensors = {name: torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8) for name, text in states.items()}
        torch.set_rng_state(tensors["cpu"])
        if self.device.type == "cuda" and "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"])

    def free_memory(self) -> int:
        return free_memory(self.device)

    def device_memory(self) -> int | None:
        """Bytes of the whole GPU; elsewhere None."""
        return torch.cuda.mem_get_info(self.device)[1] if self.device.type == "cuda" else None

    def peak_memory(self) -> int:
        """Bytes: of the GPU where there is one, else of the process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        try:
            import resource
        except ImportError:  # no such module outside Unix
            return 0
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return kilobytes if os.uname().sysname == "Darwin" else kilobytes * 1024


def free_memory(device: torch.device) -> int:
    """Bytes that a run may take: what is free on the GPU, or kept by torch for what comes; elsewhere half of the
    machine's memory."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


class StopSignals:
    """`with StopSignals() as signals`: SIGTERM, SIGINT and SIGUSR1 are only remembered, in signals.received, so that
    a run can save first. A second SIGINT ends the process at once."""

    def __init__(self):
        self.received: signal.Signals | None = None

    def __enter__(self):
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
        self.before = {number: signal.signal(number, self._remember) for number in numbers}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _remember(self, number, frame):
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which is what torchrun makes of a second Ctrl-C
        if self.received is None:
            self.received = signal.Signals(number)
            # print() may be under way where the signal struck, and would refuse
            os.write(2, f"\n{self.received.name}: this step, then saving (Ctrl-C: at once, unsaved)\n".encode())
        elif number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGINT)


def start(device_type: str = "", training: bool = False) -> Runtime:
    """Choose device and dtype, join the process group that torchrun made, set the numeric switches.

    device_type: cuda, cpu or mps; empty = the best there is. `NANOCHAT_DTYPE` overrides the compute dtype.
    """
    if not device_type:
        mps = torch.backends.mps.is_available()
        device_type = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    if device_type not in ("cuda", "cpu", "mps"):
        raise SystemExit(f"--device-type is {device_type!r}; expected cuda, cpu or mps")
    if device_type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device-type cuda: torch sees no CUDA device here; run nvidia-smi, or use --device-type cpu")

    rank, local_rank, world_size = (int(os.environ.get(*item)) for item in RANK_VARIABLES)
    device = torch.device(device_type, local_rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32 for the products that stay in float32
    if device.type == "cpu" and training:
        keep_freed_memory()
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))  # 0 without torchrun
        if ranks_here and os.environ.get("OMP_NUM_THREADS") == "1":  # which is torchrun's, however many cores there are
            torch.set_num_threads(max(1, usable_cores() // ranks_here))
    # compiled code is found again by the next run; flash-attn 4 compiles, too, and must be told before its import
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(paths.compile_cache_dir()))
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(paths.compile_cache_dir() / "flash-attn"))
    store = None
    if world_size > 1:
        timeout = datetime.timedelta(minutes=60)  # ranks compile at different speeds
        store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
        backend = "nccl" if device.type == "cuda" else "gloo"
        device_id = device if device.type == "cuda" else None
        meeting = dict(store=dist.PrefixStore("group", store), rank=rank, world_size=world_size)
        dist.init_process_group(backend, timeout=timeout, device_id=device_id, **meeting)
    dtype = compute_dtype(device, training)
    attention, disabled = os.environ.get("NANOCHAT_ATTENTION", ""), tuple(disabled_here(device, dtype))
    if disabled and rank == 0:
        print(f"disabled on this machine by scripts.doctor: {', '.join(disabled)}", flush=True)
    return Runtime(device, dtype, rank, local_rank, world_size, attention, disabled, store)


def keep_freed_memory() -> None:
    """glibc gives large pieces of memory back to the system, and gets them again page by page at every step: a quarter
    of the time of a training step on a CPU, a tenth of a decoding one with many rows. Other C libraries have no such
    setting."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)  # never


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_key(device: torch.device, dtype: torch.dtype) -> str:
    """What the findings of scripts.doctor hold for: another card, dtype or version may behave otherwise."""
    name = f"cpu ({torch.backends.cpu.get_cpu_capability()})" if device.type == "cpu" else device_name(device)
    packages = [package for package in ("torch", "triton", "flash-attn-4", "flash-attn") if _version(package)]
    return ", ".join([name, str(dtype).removeprefix("torch."), *(f"{each} {_version(each)}" for each in packages)])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def disabled_here(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """What scripts.doctor found not to work, or not to pay, on this machine: name -> why."""
    file = paths.machine_file()
    try:
        findings = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise SystemExit(f"{file} is damaged; delete it, then make it anew: python -m scripts.doctor") from error
    return findings.get(machine_key(device, dtype), {}).get("disabled", {})


def missing_compiler(device: torch.device) -> str:
    """What torch.compile lacks here, or nothing."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "Triton needs a GPU of compute capability 7.0 or later"
        if not importlib.util.find_spec("triton"):
            return "there is no Triton (pip install triton)"
        return "" if any(map(shutil.which, ("cc", "gcc", "clang"))) else "Triton needs a C compiler (apt install gcc)"
    if device.type == "cpu":
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return "there is no C++ compiler (Debian, Ubuntu: apt install g++; macOS: xcode-select --install)"
        return ""
    return f"it is not used on {device.type}"


def close(runtime: Runtime) -> None:
    if runtime.world_size > 1 and dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def stage(device_type: str = "", mistakes: tuple = (ValueError,), training: bool = False):
    """The machine for as long as a stage runs. A user's mistake ends the stage with its message, which says what mends
    it; the death of another rank with a line that names it."""
    machine = start(device_type, training)
    try:
        yield machine
    except mistakes as error:
        raise SystemExit(str(error)) from error
    except RuntimeError as error:
        if machine.world_size == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, until the line below is said
        if machine.device.type == "cpu":  # gloo: ranks that wait for this one find out when its connections close
            traceback.clear_frames(error.__traceback__)
            close(machine)
        silent = machine.silent_ranks()
        if not silent:
            raise
        others = ", ".join(map(str, silent))
        raise SystemExit(
            f"rank {machine.rank}: rank {others} of {machine.world_size} does not answer any more. "
            "The same command with --resume goes on from the last checkpoint, on any number of ranks"
        ) from error
    finally:
        close(machine)


def processes() -> list[tuple[int, int]]:
    """(process, parent) of all there are: from /proc, or where there is none from ps."""
    found = []
    for file in glob.glob("/proc/[0-9]*/stat"):
        try:
            with open(file) as stat:
                found.append((int(file.split("/")[2]), int(stat.read().rpartition(")")[2].split()[1])))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    if found:
        return found
    table = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True).stdout
    return [tuple(map(int, line.split())) for line in table.splitlines()]


def kill_family(pid: int) -> None:
    """kill -9 of a process and all that descend from it: torchrun's workers would outlive it."""
    children: dict[int, list[int]] = {}
    for child, parent in processes():
        children.setdefault(parent, []).append(child)
    family = [pid]
    for member in family:
        family += children.get(member, [])
    for member in family:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:  # it has ended meanwhile
            continue


def colours(stream) -> bool:
    """Whether to write in colour: to a terminal, unless NO_COLOR is set (no-color.org); anywhere if FORCE_COLOR is."""
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def api_key() -> str:
    """What `NANOCHAT_API_KEY` asks of whoever chats with the server, or nothing."""
    return os.environ.get("NANOCHAT_API_KEY", "")


def compute_dtype(device: torch.device, training: bool = False) -> torch.dtype:
    """bfloat16 on GPUs that multiply it, and for training on CPUs and Apple's GPUs that do; float32 elsewhere. What is
    trained in bfloat16 there is examined and served in float32: decoding is bound by memory, not by products."""
    name = os.environ.get("NANOCHAT_DTYPE")
    if name:
        if name not in DTYPES:
            raise SystemExit(f"NANOCHAT_DTYPE is {name!r}; expected one of {', '.join(DTYPES)}")
        return DTYPES[name]
    wanted = device.type == "cuda" or training
    return torch.bfloat16 if wanted and multiplies_bfloat16(device) else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for bfloat16 products: GPUs of compute capability 8.0 and later; Apple's from macOS
    14 on; x86 CPUs with AMX or AVX-512 BF16 (3 to 5 times the rate of float32 where measured, dev/LOG.md). Other CPUs
    count as without."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak in FLOP/s; None where it is not known."""
    if device.type != "cuda":
        return None
    known = machines.find(torch.cuda.get_device_name(device))
    return known.peak_flops if known else None


def git_commit() -> str | None:
    """The commit of the working tree, with a + when files were changed since; None outside a repository."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    if commit.returncode:
        return None
    return commit.stdout.strip() + ("+" if dirty.stdout.strip() else "")
