"""Many runs of base_train, one after another. The driver may be killed at any moment: the same command goes on.

What is done is read from the JSON that each run leaves, results/<tag>/base_train.json; what was asked for stands in
sweeps/<name>/sweep.json, with a digest of each run. Nothing reads a log.
"""

import fcntl
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat import paths, results, terminal
from nanochat.runtime import kill_family

CODE = Path(__file__).resolve().parent.parent
LETTERS = {"depth": "d", "target-flops": "f", "target-param-data-ratio": "r", "seed": "s", "num-iterations": "n"}
ALWAYS = ("--resume", "--save-minutes=5", "--keep=1")  # a run that is killed loses five minutes
WRONG_FLAGS = 2  # argparse's exit code
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LIKELY_ALL = 2  # runs in a row that fail before their first step: the others would, too


@dataclass(frozen=True)
class Run:
    """choice: flag -> value, of what varies; flags: all of them, as base_train gets them."""

    tag: str
    choice: dict[str, str]
    flags: list[str]


def parse_axes(texts: list[str]) -> dict[str, list[str]]:
    """["depth=12,14"] -> {"depth": ["12", "14"]}."""
    axes = {}
    for text in texts:
        flag, equals, values = text.partition("=")
        flag, values = flag.strip().lstrip("-"), [value.strip() for value in values.split(",")]
        if not flag or not equals or not all(values) or len(set(values)) < len(values) or flag in axes:
            raise ValueError(f"{text!r}: expected a flag of base_train once, with its values, as in depth=12,14,16")
        axes[flag] = values
    return axes


def plan_runs(name: str, axes: dict[str, list[str]], fixed: list[str]) -> list[Run]:
    """Every combination of the axes, the first one slowest. fixed: the flags that all runs have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a sweep's name is of letters, digits, '.', '_' and '-'; got {name!r}")
    for flag in fixed:
        if flag.split("=")[0] in ("--model-tag", "--resume", "--resume-from-step", *(f"--{axis}" for axis in axes)):
            raise ValueError(f"{flag} is set by the sweep itself")
    runs = []
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        tag = "-".join([name, *(tag_part(flag, value) for flag, value in choice.items())])
        own = [flag_of(flag, value) for flag, value in choice.items()]
        runs.append(Run(tag, choice, [*ALWAYS, *fixed, *filter(None, own), f"--model-tag={tag}"]))
    return runs


def tag_part(flag: str, value: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "", f"{LETTERS.get(flag, flag)}{value}")


def flag_of(flag: str, value: str) -> str:
    """on and off are for flags without a value: --fp8, or nothing."""
    return {"on": f"--{flag}", "off": ""}.get(value, f"--{flag}={value}")


def command(run: Run, nproc: int) -> list[str]:
    """nproc: processes under torchrun; 1: one process without it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, "-m", "scripts.base_train", *(["--"] if launcher else []), *run.flags]


def shown(run: Run, nproc: int) -> str:
    return shlex.join(["python", *command(run, nproc)[1:]])


# -- what is there


def sweep_file(name: str) -> Path:
    return paths.sweep_dir(name) / "sweep.json"


def finished(run: Run) -> dict | None:
    """The JSON of a run that has come to its end with these flags, or None. Raises ValueError when it had others."""
    found = results.read(run.tag, "base_train")
    if found is None or found["final"]["step"] < found["plan"]["num_iterations"]:
        return None
    flags = shlex.split(found["command"])[3:]  # python -m scripts.base_train
    check_flags(run, flags)
    return found


def check_flags(run: Run, flags: list[str]) -> None:
    if differing := sorted(set(flags) ^ set(run.flags)):
        raise ValueError(
            f"{run.tag} has run with other flags ({' '.join(differing)}): give the sweep another name, "
            f"or remove {paths.results_dir(run.tag)} and {paths.checkpoint_dir('base', run.tag)}"
        )


def digest(found: dict) -> dict:
    """What a finished run says to a fit or a table."""
    plan, final, config = found["plan"], found["final"], found["config"]
    return {
        "depth": found["model"]["config"]["n_layer"],
        "scaling_params": plan["scaling_params"],
        "total_params": found["model"]["counts"]["total"],
        "tokens": final["tokens"],
        "flops": final["total_training_flops"],
        "budget": config["target_flops"] if config["target_flops"] > 0 else None,
        "seed": config["seed"],
        "val_bpb": final["val_bpb"],
        "core": final["core_metric"],
        "training_seconds": final["total_training_time"],
        "seconds": found["seconds"],
    }


def read_sweep(name: str) -> dict:
    """sweep.json. Raises ValueError when there is none."""
    found = results.read_json(sweep_file(name))
    if found is None:
        raise ValueError(
            f"no sweep {name!r} ({sweep_file(name)} is not there); make it with: "
            f"python -m scripts.sweep {name} --vary depth=12,14"
        )
    return found


def tags_of(names: list[str]) -> tuple[str, list[str]]:
    """A name for all of them together, and tags of finished runs: names are tags, or sweeps, which stand for theirs."""
    tags = []
    for name in names:
        if sweep_file(name).exists():
            tags += [entry["tag"] for entry in read_sweep(name)["runs"] if entry["status"] == "done"]
        else:
            tags.append(name)
    return "-vs-".join(names)[:100], list(dict.fromkeys(tags))


def finished_json(tag: str) -> dict:
    """base_train.json of a run. Raises ValueError when there is none."""
    found = results.read(tag, "base_train")
    if found is None:
        have = sorted(path.parent.name for path in paths.results_dir("").glob("*/base_train.json"))
        raise ValueError(f"no finished run or sweep {tag!r}; there are: {', '.join(have) or 'none'}")
    return found


def collect(names: list[str]) -> tuple[str, list[dict]]:
    """A name for all of them together, and the digest of each finished run, with its tag. Raises ValueError."""
    name, tags = tags_of(names)
    return name, [{"tag": tag, **digest(finished_json(tag))} for tag in tags]


# -- the driver


class Driver:
    """Runs what is not done yet. Signals are passed on to the training, which saves; a second one kills it."""

    def __init__(self, name: str, runs: list[Run], nproc: int = 1, drop_models: bool = False):
        """drop_models: a run's checkpoints go away once its numbers are in."""
        self.name, self.runs, self.nproc, self.drop_models = name, runs, nproc, drop_models
        self.file = sweep_file(name)
        self.entries: dict[str, dict] = {}  # of sweep.json, by tag
        self.child: subprocess.Popen | None = None
        self.received = 0

    def _read(self) -> None:
        """What was done before, by an earlier call with other values, too. Raises ValueError where flags differ."""
        former = {entry["tag"]: entry for entry in (results.read_json(self.file) or {"runs": []})["runs"]}
        self.entries = {tag: entry for tag, entry in former.items() if entry["status"] != "waiting"}
        for run in self.runs:
            if run.tag in former and paths.results_dir(run.tag).exists():
                check_flags(run, former[run.tag]["flags"])
            status = former.get(run.tag, {}).get("status", "waiting")
            self.entries[run.tag] = {"tag": run.tag, "choice": run.choice, "flags": run.flags}
            self._note(run, "done" if finished(run) else "waiting" if status == "done" else status)

    def _note(self, run: Run, status: str) -> None:
        found = finished(run) if status == "done" else None
        self.entries[run.tag] |= {"status": status, "result": found and digest(found)}
        paths.write_json(self.file, {"name": self.name, "nproc": self.nproc, "runs": list(self.entries.values())})

    def run(self) -> list[str]:
        """Returns the tags of the runs that failed. SystemExit after a signal."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with open(self.file.with_name(".lock"), "w") as lock:
            self._wait_for(lock)
            self._read()
            heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
            handlers = {number: signal.signal(number, self._pass_on) for number in heard}
            try:
                return self._run_all(lock)
            finally:
                for number, handler in handlers.items():
                    signal.signal(number, handler)

    def _run_all(self, lock) -> list[str]:
        failed, began, work, unbegun = [], time.monotonic(), 0.0, 0
        todo = [run for run in self.runs if not finished(run)]
        print(f"sweep {self.name}: {len(self.runs)} runs, {len(self.runs) - len(todo)} of them done", flush=True)
        for place, run in enumerate(todo, 1):
            print(f"\n== {place} of {len(todo)}: {run.tag}\n$ {shown(run, self.nproc)}", flush=True)
            self._note(run, "running")
            started = time.time()
            code = self._train(run, lock)
            done = code == 0 and finished(run) is not None
            trained = self._trained_since(run, started)
            self._note(run, "done" if done else "stopped" if self.received else "failed" if trained else "waiting")
            if self.received:
                name = signal.Signals(self.received).name
                print(f"\n{name}: the sweep stopped at {run.tag}; the same command goes on", flush=True)
                raise SystemExit(128 + self.received)
            if code == WRONG_FLAGS:
                raise SystemExit(f"{run.tag}: base_train does not take these flags; what it says stands above")
            if not done:
                failed.append(run.tag)
                unbegun = 0 if trained else unbegun + 1
                if unbegun == LIKELY_ALL:
                    raise SystemExit(f"{run.tag}, too, failed before its first step; what it says stands above")
                print(f"{run.tag} failed (exit {code}); the others go on", flush=True)
            elif self.drop_models:
                shutil.rmtree(paths.checkpoint_dir("base", run.tag), ignore_errors=True)
            work += effort(run)
            left = (time.monotonic() - began) / work * sum(map(effort, todo[place:]))
            if left:
                print(f"{place} of {len(todo)} done, about {results.duration(left)} left", flush=True)
        return failed

    def _train(self, run: Run, lock) -> int:
        # In a session of its own: Ctrl-C is for the driver, which passes one signal on. It inherits the lock, so that
        # a training that outlives a killed driver keeps the next one waiting.
        environment = paths.child_environment(paths.base_dir().absolute(), CODE)
        how = dict(env=environment, pass_fds=(lock.fileno(),), start_new_session=True)
        self.child = subprocess.Popen(command(run, self.nproc), **how)
        if self.received:  # between two runs
            self.child.terminate()
        return self.child.wait()

    def _trained_since(self, run: Run, moment: float) -> bool:
        log = paths.results_dir(run.tag) / "base_train.jsonl"
        return log.exists() and log.stat().st_mtime >= moment

    def _pass_on(self, number, frame) -> None:
        if self.received and self.child:
            kill_family(self.child.pid)
        self.received = number
        if self.child and self.child.poll() is None:
            self.child.terminate()

    def _wait_for(self, lock) -> None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another sweep {self.name!r}, or a training that it left, is at work: waiting for it", flush=True)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except KeyboardInterrupt:
                raise SystemExit(130) from None


def effort(run: Run) -> float:
    """How long a run takes, relative to others, as far as its choice tells. Parameters grow with about the cube of the
    depth, and tokens with them unless the steps are given; speed grows a little, too."""
    if flops := run.choice.get("target-flops"):
        return float(flops)
    steps_given = any(flag.startswith("--num-iterations") for flag in run.flags)
    return float(run.choice.get("depth", 1)) ** (3 if steps_given else 5)


# -- how it is told


def told(entries: list[dict]) -> str:
    """A table of a sweep's runs. entries: of sweep.json."""
    lines = [["run", "depth", "parameters", "tokens", "FLOPs", "bits/byte", "CORE", "time"]]
    for entry in entries:
        found = entry["result"]
        if not found:
            lines.append([entry["tag"], "", "", "", "", entry["status"], "", ""])
            continue
        bpb, core = found["val_bpb"], found["core"]
        lines.append(
            [
                entry["tag"],
                str(found["depth"]),
                f"{found['total_params']:,}",
                f"{found['tokens']:,}",
                f"{found['flops']:.2e}",
                "-" if bpb is None else f"{bpb:.4f}",
                "-" if core is None else f"{core:.4f}",
                results.duration(found["seconds"]),
            ]
        )
    return terminal.aligned(lines)
