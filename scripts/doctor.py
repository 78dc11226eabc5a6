"""Does everything that nanochat needs compute the right numbers on this machine, and how fast? Every part is compared
with float64 on the CPU, in about a minute. What is wrong, or slower than its replacement, is disabled by name for this
machine; later runs say so and take the next best. The last line is JSON.

python -m scripts.doctor
"""

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
import threading
from datetime import datetime, timezone

import torch

from nanochat import attention, fp8, paths, runtime
from nanochat.checks import CHECKS, check_names
from nanochat.optim import orthogonalization_dtype
from nanochat.runtime import Runtime, missing_compiler

# What is done without where it fails. Anything else has no replacement.
REPLACED_BY = {
    "flash": "the next attention backend",
    "flex": "the next attention backend",
    "blocked": "the next attention backend",
    "compile": "uncompiled code",
    "graphs": "decoding without CUDA graphs",
    "fp8": "the usual dtype",
    "fp8_head": "the usual dtype in the loss",
}
PATIENCE = 600  # seconds that one check may take; the first time on a GPU it compiles
MARGIN = 1.1  # slower by less than this is not slower


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    add("--checks", help="only these, by name, separated by commas; nothing is disabled then")
    add("--in-this-process", action="store_true", help=argparse.SUPPRESS)  # what the doctor starts for itself
    return parser.parse_args(argv)


def main(args):
    with runtime.stage(args.device_type, training=True) as machine:
        names = args.checks.split(",") if args.checks else check_names(machine)
        if unknown := set(names) - set(check_names(machine)):
            raise ValueError(f"--checks {','.join(unknown)}: here there are {', '.join(check_names(machine))}")
        if args.in_this_process:
            return run_checks(names, machine)
        print(f"{runtime.machine_key(machine.device, machine.dtype)}")
        flags = ["--in-this-process", "--device-type", machine.device.type, "--checks"]
        results = watch(names, [sys.executable, "-m", "scripts.doctor", *flags])
        disabled, broken = judge(results, by_speed=machine.device.type == "cuda")
        chosen = choices(machine, disabled)
        for name, reason in disabled.items():
            does = "would be" if args.checks else "is"
            print(f"{name} {does} disabled on this machine ({reason}); in its place: {REPLACED_BY[name]}")
        for name in broken:
            print(f"{name} is wrong here, and nothing replaces it: do not train on this machine")
        for what, why in chosen.items():
            print(f"{what}: {why}")
        if not args.checks:
            remember(machine, disabled, results)
        said = {"ok": not broken, "disabled": disabled, "broken": broken, "chosen": chosen, "checks": results}
        print(json.dumps(said))
    if broken:
        raise SystemExit(1)


# -- running the checks, each at the mercy of a kernel that may hang or take the process with it


def watch(names: list[str], command: list[str]) -> dict:
    """name -> what its check found. The checks run in a process of their own, the command with the names after it;
    where it dies, a new one goes on with the next."""
    results, remaining = {}, list(names)
    while remaining:
        with tempfile.TemporaryFile("w+") as errors:
            child = subprocess.Popen([*command, ",".join(remaining)], stdout=subprocess.PIPE, stderr=errors, text=True)
            clock = threading.Timer(PATIENCE, child.kill)
            clock.start()
            for line in child.stdout:
                if line.startswith("{"):
                    clock.cancel()
                    found = json.loads(line)
                    remaining.remove(found["check"])
                    results[found.pop("check")] = found
                    show(list(results)[-1], found)
                    clock = threading.Timer(PATIENCE, child.kill)
                    clock.start()
            clock.cancel()
            if remaining and child.wait() != RESTART:
                errors.seek(0)
                said = ([line for line in errors.read().splitlines() if line.strip()] or ["nothing said"])[-1]
                how = f"no answer in {PATIENCE} s" if child.returncode == -signal.SIGKILL else said[:200]
                results[remaining[0]] = {"failed": f"its process ended with {child.returncode}: {how}"}
                show(remaining[0], results[remaining.pop(0)])
    return results


RESTART = 17  # the exit code of a process whose GPU answers no more


def run_checks(names: list[str], machine: Runtime) -> None:
    for name in names:
        try:
            found = CHECKS[name](machine)
        except torch.OutOfMemoryError:
            found = {"not_judged": "out of memory: is somebody else using this GPU?"}
        except Exception as error:  # whatever it is, it is what the doctor was called for
            found = {"failed": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}
        print(json.dumps({"check": name, **found}), flush=True)
        try:
            machine.synchronize()
        except RuntimeError:  # after some errors a CUDA process can do nothing more
            raise SystemExit(RESTART) from None


def show(name: str, found: dict) -> None:
    wrong = "failed" in found or found.get("error", 0) > found.get("tolerance", math.inf)
    numbers = ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in found.items()
    )
    print(f"  {'WRONG' if wrong else 'ok   '} {name:10} {numbers}", flush=True)


def judge(results: dict, by_speed: bool) -> tuple[dict, list]:
    """What is to be disabled, with the reason; and what is wrong without replacement. by_speed: also what is slower
    than its replacement, for devices that nobody else is using meanwhile."""
    disabled, broken = {}, []
    for name, found in results.items():
        if found.get("error", 0) > found.get("tolerance", math.inf):
            reason = f"error {found['error']:.2g}, at most {found['tolerance']:.2g} is expected"
        elif "failed" in found:
            reason = found["failed"]
        elif by_speed and found.get("ms", 0) > MARGIN * found.get("ms_without", math.inf):
            reason = f"{found['ms']:.1f} ms with it, {found['ms_without']:.1f} ms without"
        else:
            continue
        if name in REPLACED_BY:
            disabled[name] = reason
        elif name != "rates":
            broken.append(name)
    # of the attention backends that are right, the fastest; a small difference does not count
    right = {
        name: results[name]["ms"]
        for name in attention.BACKENDS
        if "ms" in results.get(name, {}) and name not in disabled
    }
    fastest = min(right, key=right.get, default=None)
    for name, ms in right.items():
        if name == fastest or not by_speed:
            break
        if ms > MARGIN * right[fastest]:
            disabled[name] = f"{ms:.1f} ms, {fastest} takes {right[fastest]:.1f} ms"
    return disabled, broken


def choices(machine: Runtime, disabled: dict) -> dict:
    """What later runs on this machine will take."""
    judged = Runtime(machine.device, machine.dtype, attention=machine.attention, disabled=tuple(disabled))
    lacking = missing_compiler(machine.device)
    backend = attention.choose_backend(judged, head_dim=128)
    return {
        "dtype": str(machine.dtype).removeprefix("torch."),
        "orthogonalization": str(orthogonalization_dtype(machine.device, machine.dtype)).removeprefix("torch."),
        "attention": f"{backend}, "
        + ("by NANOCHAT_ATTENTION" if machine.attention else "the first that is right here"),
        "compile": "no: disabled"
        if "compile" in disabled
        else f"no: {lacking}"
        if lacking
        else "yes, on GPUs, or with --compile 1",
        "fp8": "no"
        if not fp8.available(judged)
        else "yes, with --fp8" + (", the head without" if "fp8_head" in disabled else ""),
    }


def remember(machine: Runtime, disabled: dict, results: dict) -> None:
    file = paths.machine_file()
    findings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    findings[runtime.machine_key(machine.device, machine.dtype)] = {
        "checked": now,
        "disabled": disabled,
        "checks": results,
    }
    paths.write_json(file, findings)
    print(f"kept in {file}")


if __name__ == "__main__":
    main(parse_args())
