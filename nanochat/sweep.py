"""Many runs of base_train, one after another. The driver may be killed at any moment: the same command goes on.

What is done is read from the JSON that each run leaves, results/<tag>/base_train.json; what was asked for stands in
sweeps/<name>/sweep.json, with a digest of each run. Nothing reads a log.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanochat import checkpoint, paths, results, terminal
from nanochat.pairs import BESIDE
from nanochat.runtime import git_commit, kill_family

CODE = Path(__file__).resolve().parent.parent
LETTERS = {"depth": "d", "target-flops": "f", "target-param-data-ratio": "r", "seed": "s", "num-iterations": "n"}
ALWAYS = ("--resume", "--save-minutes=5", "--keep=1")  # a run that is killed loses five minutes
OWN = ("model-tag", "resume", "resume-from-step", "stop-after")  # flags that only the sweep gives
MAY_CHANGE = {*BESIDE, "device_batch_size", "compile"} - {"seed"}  # when a run is gone on with
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# torchrun's own settings: SIGUSR1 goes on to the ranks, too, and they have a minute to save
TORCHRUN = {"PET_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", "PET_SHUTDOWN_TIMEOUT": "60"}
CHECK = """
import json, sys
from scripts.base_train import parse_args
for flags, names in json.load(sys.stdin):
    known = vars(parse_args(flags))
    for name in names:  # argparse takes beginnings of flags, too
        if name not in known:
            sys.exit(f"base_train: no flag --{name.replace('_', '-')}")
"""
LONGEST_NAME, MOST_NAMED = 100, 12


@dataclass(frozen=True)
class Run:
    """choice: flag -> value, of what varies; flags: all of them, as base_train gets them."""

    tag: str
    choice: dict[str, str]
    flags: list[str]


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    """What stands before --; what comes after it are flags of base_train, in args.flags."""
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args, unknown = parser.parse_known_args(own)
    if unknown:
        parser.error(f"{' '.join(unknown)}: flags of base_train come last, after --")
    args.flags = flags
    return args


def parse_axes(texts: list[str]) -> dict[str, list[str]]:
    """["depth=12,14"] -> {"depth": ["12", "14"]}."""
    axes = {}
    for text in texts:
        flag, equals, values = text.partition("=")
        flag, values = flag.strip().lstrip("-"), [value.strip() for value in values.split(",")]
        if not flag or not equals or not all(values) or " " in text:
            raise ValueError(f"{text!r}: expected a flag of base_train with its values, as in depth=12,14,16")
        if {"true", "false"} & {value.lower() for value in values}:
            raise ValueError(f"{text!r}: of a flag without a value, on and off are with and without it")
        if flag in axes or len(set(map(plain_value, values))) < len(values):
            raise ValueError(f"{text!r}: a flag and each of its values are given once")
        if flag in OWN:
            raise ValueError(f"--{flag} is set by the sweep itself")
        axes[flag] = values
    return axes


def seed_axis(count: int, axes: dict[str, list[str]]) -> dict[str, list[str]]:
    """The axes with the seeds 1 to count before them: slowest, so that pairs are whole as early as can be."""
    if "seed" in axes:
        raise ValueError(f"seed={','.join(axes['seed'])}: give the seeds either so or by --seeds")
    return {"seed": [str(seed) for seed in range(1, count + 1)], **axes}


def plan_runs(name: str, axes: dict[str, list[str]], fixed: list[str]) -> list[Run]:
    """Every combination of the axes, the first one slowest. fixed: the flags that all runs have."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ValueError(f"a sweep's name is of letters, digits, '.', '_' and '-'; got {name!r}")
    for flag in as_dict(fixed):
        if flag.replace("_", "-") in (*OWN, *axes):
            raise ValueError(f"--{flag.replace('_', '-')} is set by the sweep itself")
    runs = []
    for values in itertools.product(*axes.values()):
        choice = dict(zip(axes, values, strict=True))
        # in an order of its own, so that the same run is found again whatever the order of the axes
        tag = "-".join(
            [name, *(tag_part(flag, choice[flag]) for flag in sorted(choice, key=lambda f: (f != "seed", f)))]
        )
        own = [flag_of(flag, value) for flag, value in choice.items()]
        runs.append(Run(tag, choice, [*ALWAYS, *fixed, *filter(None, own), f"--model-tag={tag}"]))
    if len({run.tag for run in runs}) < len(runs):
        raise ValueError(
            "two of the runs would have the same name: write their values in letters and digits that differ"
        )
    return runs


def tag_part(flag: str, value: str) -> str:
    """depth and 12 -> d12; 0.10 is 0.1, and 1e+18 is 1e18."""
    number = plain_value(value)
    text = value if isinstance(number, str) else f"{number:.12g}".replace("e+", "e")
    return re.sub(r"[^A-Za-z0-9._-]", "", f"{LETTERS.get(flag, flag)}{text}")


def flag_of(flag: str, value: str) -> str:
    """on and off are for flags without a value: --fp8, or nothing."""
    return {"on": f"--{flag}", "off": ""}.get(value, f"--{flag}={value}")


def plain_value(text: str):
    """1e18 and 1000000000000000000 are one number."""
    try:
        return float(text)
    except ValueError:
        return text


def as_dict(flags: list[str]) -> dict:
    """["--depth=12", "--seed", "3", "--fp8"] -> {"depth": 12, "seed": 3, "fp8": True}; the last of a flag counts."""
    found, last = {}, None
    for word in flags:
        if word.startswith("--"):
            last, equals, value = word[2:].partition("=")
            last = last.replace("-", "_")
            found[last] = plain_value(value) if equals else True
        elif last:
            found[last] = plain_value(word)
    return found


def command(run: Run, nproc: int) -> list[str]:
    """nproc: processes under torchrun; 1: one process without it."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc > 1 else []
    return [sys.executable, *launcher, "-m", "scripts.base_train", *(["--"] if launcher else []), *run.flags]


def shown(run: Run, nproc: int) -> str:
    return shlex.join(["python", *command(run, nproc)[1:]])


def processes_for(gpus: int) -> int:
    """As speedrun.sh does: the largest power of two, which divides the rows of a step."""
    return 1 << (gpus.bit_length() - 1) if gpus else 1


# -- what is there


def sweep_file(name: str) -> Path:
    return paths.sweep_dir(name) / "sweep.json"


def read_sweep(name: str) -> dict | None:
    """sweep.json, or None where there is none. Raises ValueError when it cannot be read."""
    try:
        return results.read_json(sweep_file(name))
    except ValueError as error:
        raise ValueError(f"{sweep_file(name)} is damaged ({error}): delete it; what is done is found again") from error


def is_whole(found: dict | None) -> bool:
    """Whether the JSON is of a run that came to its end; --stop-after leaves one, too."""
    return found is not None and found["final"]["step"] >= found["plan"]["num_iterations"]


def finished(run: Run) -> dict | None:
    """The JSON of a run that has come to its end with these flags, or None. Raises ValueError when it had others."""
    found = results.read(run.tag, "base_train")
    if not is_whole(found):
        return None
    check_flags(run, shlex.split(found["command"])[3:])  # python -m scripts.base_train
    return found


def check_flags(run: Run, flags: list[str]) -> None:
    before, now = as_dict(flags), as_dict(run.flags)
    differing = sorted(f for f in before.keys() | now.keys() if before.get(f) != now.get(f) and f not in MAY_CHANGE)
    if differing:
        said = ", ".join(f"--{flag.replace('_', '-')}: {before.get(flag)}, now {now.get(flag)}" for flag in differing)
        raise ValueError(
            f"{run.tag} has run with other flags ({said}): give the sweep another name (runs/*.sh: NAME=...), "
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
        "bundle": Path(config.get("bundle", "")).name,  # CORE by
        "training_seconds": final["total_training_time"],
        "seconds": found["seconds"],
    }


def finished_json(tag: str) -> dict:
    """base_train.json of a run. Raises ValueError when there is none, or it is not of the run's end."""
    found = results.read(tag, "base_train")
    if found is None:
        runs = sorted(path.parent.name for path in paths.results_dir("").glob("*/base_train.json"))
        sweeps = sorted(path.parent.name for path in paths.sweep_dir("").glob("*/sweep.json"))
        raise ValueError(
            f"no finished run or sweep {tag!r}; there are the runs {few(runs)}, and the sweeps {few(sweeps)}"
        )
    if not is_whole(found):
        raise ValueError(
            f"{tag} ended at step {found['final']['step']} of {found['plan']['num_iterations']}: --resume it"
        )
    return found


def few(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more if names else "(none)"


def tags_of(names: list[str]) -> tuple[str, dict[str, str]]:
    """A name for all of them together, and the tags of finished runs with the name that each came by. names are tags,
    or sweeps, which stand for their finished runs; which of these are missing is printed."""
    tags = {}
    for name in names:
        sweep = read_sweep(name)
        if sweep is None:
            tags.setdefault(name, name)
            continue
        entries = [entry["tag"] for entry in sweep["runs"]]
        done = [tag for tag in entries if is_whole(results.read(tag, "base_train"))]
        if missing := [tag for tag in entries if tag not in done]:
            print(f"{name}: {len(done)} of {len(entries)} runs are done; left out: {', '.join(missing)}", flush=True)
        tags |= {tag: name for tag in done if tag not in tags}
    together = "-vs-".join(names)
    if len(together) > LONGEST_NAME:
        together = f"{together[:LONGEST_NAME]}-{hashlib.sha256(together.encode()).hexdigest()[:8]}"
    return together, tags


# -- the driver


class Driver:
    """Runs what is not done yet. Signals are passed on to the training, which saves; a second Ctrl-C kills it."""

    def __init__(self, name: str, runs: list[Run], nproc: int = 1, drop_models: bool = False):
        """drop_models: a run's checkpoints go away once its numbers are in."""
        self.name, self.runs, self.nproc, self.drop_models = name, runs, nproc, drop_models
        self.file = sweep_file(name)
        self.entries: dict[str, dict] = {}  # of sweep.json, by tag
        self.child: subprocess.Popen | None = None
        self.received = 0

    def run(self) -> list[str]:
        """Returns the tags of the runs that failed. SystemExit after a signal, or when base_train refuses the flags."""
        check_with_base_train(self.runs)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup ignores SIGHUP
        handlers = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            with open(self.file.with_name(".lock"), "w") as lock:
                self._wait_for(lock, f"another sweep {self.name!r}")
                self._read()
                return self._run_all()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _read(self) -> None:
        """What was done before, by an earlier call with other values, too. Raises ValueError where flags differ."""
        former = {entry["tag"]: entry for entry in (read_sweep(self.name) or {"runs": []})["runs"]}
        self.entries = {tag: entry for tag, entry in former.items() if entry["status"] != "waiting"}
        for run in self.runs:
            begun = checkpoint.list_steps(paths.checkpoint_dir("base", run.tag))
            if run.tag in former and (begun or paths.results_dir(run.tag).exists()):
                check_flags(run, former[run.tag]["flags"])
            done = finished(run)
            if begun and not done and run.tag not in former:
                raise ValueError(
                    f"there is a model {run.tag} that this sweep has not begun: give the sweep another name, "
                    f"or remove {paths.checkpoint_dir('base', run.tag)}"
                )
            status = former.get(run.tag, {}).get("status", "waiting")
            self.entries[run.tag] = {"tag": run.tag, "choice": run.choice, "flags": run.flags}
            self._note(run, "done" if done else "waiting" if status == "done" else status)

    def _note(self, run: Run, status: str) -> None:
        found = finished(run) if status == "done" else None
        self.entries[run.tag] |= {"status": status, "result": found and digest(found)}
        paths.write_json(self.file, {"name": self.name, "nproc": self.nproc, "runs": list(self.entries.values())})
        if found and self.drop_models:
            shutil.rmtree(paths.checkpoint_dir("base", run.tag), ignore_errors=True)

    def _run_all(self) -> list[str]:
        failed, spent, work = [], 0.0, 0.0
        todo = [run for run in self.runs if not finished(run)]
        print(f"sweep {self.name}: {len(self.runs)} runs, {len(self.runs) - len(todo)} of them done", flush=True)
        self._tell_of_other_code()
        for place, run in enumerate(todo, 1):
            print(f"\n== {place} of {len(todo)}: {run.tag}\n$ {shown(run, self.nproc)}", flush=True)
            self._wait_for_training(run)
            began = time.monotonic()
            if not finished(run):  # by the training that was waited for
                self._note(run, "running")
                code = self._train(run)
                self._wait_for_training(run)  # torchrun may be killed and leave its ranks
            done = finished(run) is not None
            self._note(run, "done" if done else "stopped" if self.received else "failed")
            if self.received:
                name = signal.Signals(self.received).name
                print(f"\n{name}: the sweep stopped at {run.tag}; the same command goes on", flush=True)
                raise SystemExit(128 + self.received)
            left = sum(map(effort, todo[place:]))
            if not done:
                failed.append(run.tag)
                print(f"{run.tag} failed (exit {code}){'; the others go on' if left else ''}", flush=True)
                continue
            spent, work = spent + time.monotonic() - began, work + effort(run)
            if left:
                told = results.duration(spent / work * left)
                print(f"{place} of {len(todo)} done, about {told} left", flush=True)
        return failed

    def _tell_of_other_code(self) -> None:
        made_by = {tag: results.read(tag, "base_train")["environment"].get("git_commit") for tag in self._done()}
        others = sorted(str(commit) for commit in set(made_by.values()) - {git_commit()})
        if others:
            print(
                f"done by other code ({', '.join(others)}; now {git_commit()}): "
                "to run them again with this code take another name",
                flush=True,
            )

    def _done(self) -> list[str]:
        return [run.tag for run in self.runs if self.entries[run.tag]["status"] == "done"]

    def _train(self, run: Run) -> int:
        if self.received:  # while another training was waited for
            return 0
        # in a session of its own: Ctrl-C is for the driver, which passes one signal on
        environment = TORCHRUN | paths.child_environment(paths.base_dir().absolute(), CODE)
        self.child = subprocess.Popen(command(run, self.nproc), env=environment, start_new_session=True)
        if self.received:  # in this moment
            self.child.terminate()
        return self.child.wait()

    def _pass_on(self, number, frame) -> None:
        alive = self.child is not None and self.child.poll() is None
        if alive and number == self.received == signal.SIGINT:
            kill_family(self.child.pid)
        elif alive:
            self.child.terminate()
        self.received = self.received or number

    def _wait_for_training(self, run: Run) -> None:
        """Until nobody trains this run: a driver that was killed may have left it, or torchrun its ranks."""
        path = checkpoint.lock_file(paths.checkpoint_dir("base", run.tag))
        if path.exists():
            with open(path, "r+") as lock:
                self._wait_for(lock, f"a training of {run.tag} that was left behind", fcntl.lockf)

    def _wait_for(self, lock, whose: str, take=fcntl.flock) -> None:
        told = False
        while not self.received:
            try:
                take(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except (BlockingIOError, PermissionError):
                if not told:
                    print(f"{whose} is at work: waiting for it", flush=True)
                told = True
                time.sleep(0.5)
        if take is fcntl.flock:
            raise SystemExit(128 + self.received)


def check_with_base_train(runs: list[Run]) -> None:
    """That base_train takes the flags, before any run begins. SystemExit when it does not; it says why itself."""
    how = dict(env=paths.child_environment(paths.base_dir().absolute(), CODE), text=True)
    given = json.dumps([(run.flags, list(as_dict(run.flags))) for run in runs])
    done = subprocess.run([sys.executable, "-c", CHECK], input=given, **how)
    if done.returncode:
        raise SystemExit("base_train does not take these flags; what it says stands above")


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
        numbers = [f"{found['total_params']:,}", f"{found['tokens']:,}", f"{found['flops']:.2e}"]
        scores = ["-" if bpb is None else f"{bpb:.4f}", "-" if core is None else f"{core:.4f}"]
        lines.append([entry["tag"], str(found["depth"]), *numbers, *scores, results.duration(found["seconds"])])
    return terminal.aligned(lines)
