"""A speedrun in small, before the money is spent: every command of speedrun.sh at its real shape, for a few steps, with
a save, a kill and a resume. Ends with how long each stage will take, what fits, and what would have failed.

bash speedrun.sh --rehearse
python -m scripts.rehearse --profile tiny
"""

import argparse
import importlib
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

import torch

from nanochat import machines, paths, rehearsal
from nanochat.checkpoint import list_steps
from nanochat.report_run import read_log
from nanochat.results import duration
from nanochat.runtime import kill_family

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("01_data", "02_tokenizer", "03_pretrain", "04_base_eval", "05_sft", "06_chat_eval", "07_rl", "08_report")
NEEDS = {  # stage -> those without which it is not tried
    "02_tokenizer": ("01_data",),
    "03_pretrain": ("01_data", "02_tokenizer"),
    "04_base_eval": ("03_pretrain",),
    "05_sft": ("03_pretrain",),
    "06_chat_eval": ("05_sft",),
    "07_rl": ("05_sft",),
    "08_report": ("03_pretrain",),
}
STEPS, SAVE_EVERY = 10, 5  # of training; after the resume of pretraining
KILLED_BEFORE = 500  # it would end there if nobody killed it
PRACTICE_STEPS = 3
SHORTER = 8  # measurements take this part of their tokens or questions
CORE_EXAMPLES, PROBLEMS, CONVERSATIONS = 64, 64, 40_000
SHARED = ("compiled", "task_data")  # folders that the rehearsal and the run have in common


@dataclass
class Command:
    """One command of a stage: as speedrun.sh shows it, then what its rehearsal found."""

    stage: str
    words: list[str]
    beside: bool = False  # it runs in the background there
    seconds: float = 0.0  # of the rehearsal; of pretraining, after the resume
    failed: str = ""
    resumed_at: int = 0  # the step
    forecast: float = 0.0
    rests_on: str = ""

    @property
    def title(self) -> str:
        return f"  {self.stage:13} {self.module:20}"

    @property
    def module(self) -> str:
        return self.words[self.words.index("-m") + 1] if "-m" in self.words else self.words[1]

    @property
    def name(self) -> str:
        return self.module.removesuffix(".py").split("/")[-1].split(".")[-1]

    @property
    def flags(self) -> list[str]:
        return [word for word in self.words[self.words.index(self.module) + 1 :] if word != "--"]

    @property
    def ranks(self) -> int:
        found = re.search(r"--nproc_per_node=(\d+)", " ".join(self.words))
        return int(found[1]) if found else 1

    def parsed(self) -> argparse.Namespace:
        """Its flags as it reads them itself, with its defaults; it is imported for nothing else. SystemExit where it
        does not know one."""
        return importlib.import_module(self.module).parse_args(self.flags)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", help="smoke, tiny, single or gpt2 (default: the machine's)")
    parser.add_argument("--depth", help="layers, in place of the profile's")
    return parser.parse_args(argv)


def main(args):
    began = time.time()
    for number in (signal.SIGTERM, signal.SIGHUP):  # not to leave a training behind
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    commands = commands_of_speedrun([f"--{name}={value}" for name, value in vars(args).items() if value])
    for command in commands:
        if command.module.startswith("scripts."):
            command.parsed()  # a wrong flag shows now
    if any("torchrun" in command.words for command in commands) and not torch.cuda.is_available():
        raise SystemExit("this profile is for NVIDIA GPUs, and torch sees none here: --profile tiny is for CPUs")
    tag = next(command.parsed().model_tag for command in commands if command.module == "scripts.base_train")
    place = Rehearsal((paths.base_dir() / "rehearsal").absolute(), tag)
    print(f"rehearsal of {tag} in {place.base}; what the commands say is in {place.base / 'logs'}", flush=True)
    try:
        for command in commands:
            rehearse_in_turn(command, commands, place)
    except (KeyboardInterrupt, SystemExit) as ended:
        place.clean_up()
        print(f"\nstopped at {command.stage}; of the rehearsal only the logs are left")
        raise SystemExit(130 if isinstance(ended, KeyboardInterrupt) else ended.code) from None
    add_examinations_in_training(commands, place)
    found = summary(commands, place, time.time() - began)
    paths.write_json(paths.results_dir(tag) / "rehearsal.json", found)
    print(rehearsal.told(found))
    failed = any(command.failed for command in commands)
    if not failed:
        place.clean_up()
    if failed or found["disk"]["needed"] > found["disk"]["free"]:
        raise SystemExit(1)


def rehearse_in_turn(command: Command, commands: list[Command], place: "Rehearsal") -> None:
    failed = [other.stage for other in commands if other.failed]
    missing = [name for name in (*NEEDS.get(command.stage, ()), command.stage) if name in failed]
    if missing:
        command.failed = f"not tried, because {missing[0]} failed"
        return
    place.rehearse(command)
    if not command.failed:
        command.forecast, command.rests_on = place.forecast(command)


def commands_of_speedrun(flags: list[str]) -> list[Command]:
    commands = []
    for stage in STAGES:
        shown = subprocess.run(
            ["bash", str(ROOT / "runs" / f"{stage}.sh"), "--dry-run", *flags], capture_output=True, text=True
        )
        if shown.returncode:
            raise SystemExit(shown.stderr.strip())
        for line in shown.stdout.splitlines():
            words = shlex.split(line, comments=True)
            if words and words != ["wait"]:
                commands.append(Command(stage, [word for word in words if word != "&"], words[-1] == "&"))
    return commands


# -- running them


class Rehearsal:
    """Where the rehearsal takes place: an artifact root of its own, with what is worth keeping shared with the real
    one: data sets of tasks, compiled code."""

    def __init__(self, base: Path, tag: str):
        self.base, self.tag, self.real = base, tag, base.parent
        shutil.rmtree(base, ignore_errors=True)
        (base / "logs").mkdir(parents=True)
        for name in SHARED:
            (self.real / name).mkdir(exist_ok=True)
            (base / name).symlink_to(self.real / name)
        for name in ("machine.json", "eval_bundle"):
            if (self.real / name).exists():
                (base / name).symlink_to(self.real / name)
        self.environment = paths.child_environment(base, ROOT)
        if not paths.data_mirror():  # shards that were fetched for the run serve the rehearsal, too
            self.environment["NANOCHAT_DATA_MIRROR"] = str(self.real / "corpora")
        self.shards = rehearsal.Shards(self.real / "corpora" / "climbmix")

    def rehearse(self, command: Command) -> None:
        log = self.base / "logs" / f"{command.stage}-{command.name}.log"
        if command.module == "nanochat.dataset" and "tokenize" not in command.flags:
            self.fetch(command, log)
        elif command.module == "scripts.base_train":
            self.kill_and_resume(command, log)
        else:
            self.run(command, log, shortened(command))
        state = f"FAILED: {command.failed}" if command.failed else duration(command.seconds)
        print(f"{command.title} {state}", flush=True)

    def run(self, command: Command, log: Path, flags: list[str], environment: dict | None = None) -> None:
        began = time.time()
        process = self.start(command, log, flags, environment)
        try:
            code = rehearsal.watch(process, command.title, log)
        except BaseException:
            kill_family(process.pid)
            process.wait()
            raise
        command.seconds = time.time() - began
        if code:
            command.failed = f"exit {code}: {rehearsal.reason(log)} (all of it: {log})"

    def start(self, command: Command, log: Path, flags: list[str], environment: dict | None = None):
        tool, *rest = command.words
        python = [sys.executable] if tool == "python" else [sys.executable, "-m", "torch.distributed.run"]
        with open(log, "a") as out:
            environment = environment or self.environment
            where = [str(ROOT / word) if word.startswith("dev/") else word for word in rest]
            asked = [*python, *where, *flags]
            out.write(f"$ {shlex.join(asked)}\n")
            out.flush()
            return subprocess.Popen(asked, cwd=self.base, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def fetch(self, command: Command, log: Path) -> None:
        """One shard more than there are, for good; then what the rehearsal reads, from there."""
        wanted, here = rehearsal.shards_wanted(command.flags), self.shards.here()
        more = Command(command.stage, [*command.words[: command.words.index("-n")], "-n", str(min(wanted, here + 1))])
        self.run(more, log, [], paths.child_environment(self.real, ROOT))
        if not more.failed and self.shards.here() > here:
            self.shards.fetched.append(more.seconds)
        command.seconds, command.failed = more.seconds, more.failed
        if not command.failed:
            self.run(more, log, ["-n", "1"])
            command.failed = more.failed

    def kill_and_resume(self, command: Command, log: Path) -> None:
        """Train until a checkpoint is whole, kill -9, and go on from the first."""
        flags = [flag for flag in shortened(command) if not flag.startswith("--stop-after")]
        flags.append(f"--stop-after={KILLED_BEFORE}")
        folder = self.base / paths.CHECKPOINT_FOLDERS["base"] / self.tag
        began, process = time.time(), self.start(command, log, flags)
        try:
            while process.poll() is None and not list_steps(folder):
                rehearsal.show_progress(command.title, log, began)
                time.sleep(0.1)
        finally:
            kill_family(process.pid)
            process.wait()
        if process.returncode > 0 or not list_steps(folder):
            command.failed = f"exit {process.returncode}: {rehearsal.reason(log)} (all of it: {log})"
            return
        command.resumed_at = list_steps(folder)[0]
        self.run(command, log, [*shortened(command), f"--resume-from-step={command.resumed_at}"])

    # -- what it says of the whole

    def found(self, name: str) -> dict:
        return json.loads((self.base / "results" / self.tag / f"{name}.json").read_text(encoding="utf-8"))

    def log(self, name: str) -> list[dict]:
        return read_log(self.base / "results" / self.tag / f"{name}.jsonl")

    def forecast(self, command: Command) -> tuple[float, str]:
        """(seconds of the whole command, what they rest on)."""
        match command.module:
            case "nanochat.dataset":
                return self.shards.forecast(command.flags, command.seconds)
            case "scripts.tok_train" if command.parsed().num_files > 1:
                args = command.parsed()
                file = self.base / "results" / f"{args.corpus}-{args.vocab_size}" / "tok_train.json"
                more = (args.num_files - 1) * json.loads(file.read_text())["training_seconds"]
                return command.seconds + more, "in proportion to its shards"
            case "scripts.base_train":
                found, args = self.found("base_train"), command.parsed()
                steps, share = found["plan"]["num_iterations"], shorter(args, "eval_tokens")
                log = self.log("base_train")
                return rehearsal.training(args, found, log, command.seconds, steps, command.resumed_at, share)
            case "scripts.chat_sft":
                found, args = self.found("chat_sft"), command.parsed()
                share = shorter(args, "eval_tokens")
                return rehearsal.fine_tuning(args, found, self.log("chat_sft"), command.seconds, share)
            case "scripts.chat_rl":
                found, args = self.found("chat_rl"), command.parsed()
                share = shorter(args, "eval_examples")
                return rehearsal.practice(args, found, self.log("chat_rl"), command.seconds, share)
            case "scripts.base_eval":
                return rehearsal.base_evaluation(command.parsed(), self.found("base_eval"), command.seconds)
            case "scripts.chat_eval":
                found = self.found(f"chat_eval_{command.parsed().source}")
                return rehearsal.chat_evaluation(command.parsed(), found, command.seconds)
        return command.seconds, "done whole"

    def clean_up(self) -> None:
        """Only the logs stay; a bundle that was fetched moves to where the run looks for it."""
        bundle = self.base / "eval_bundle"
        if bundle.is_dir() and not bundle.is_symlink():
            shutil.move(bundle, self.real / "eval_bundle")
        for path in self.base.iterdir():
            if path.is_symlink() or path.is_file():
                path.unlink()
            elif path.name != "logs":
                shutil.rmtree(path)


def shortened(command: Command) -> list[str]:
    """The flags that, after its own, make a command a rehearsal."""
    match command.module:
        case "nanochat.dataset" if "-n" in command.flags:
            return ["-n", "1"]
        case "scripts.tok_train" if command.parsed().num_files > 1:
            return ["--num-files=1"]
        case "scripts.base_train":
            return [
                f"--stop-after={STEPS}",
                f"--save-every={SAVE_EVERY}",
                f"--eval-every={SAVE_EVERY}",
                f"--eval-tokens={command.parsed().eval_tokens // SHORTER}",
                "--keep=-1",
                "--core-metric-every=-1",
                "--sample-every=-1",
                "--num-files=1" if command.parsed().num_files > 1 else "--num-files=-1",
                "--run=dummy",
            ]
        case "scripts.chat_sft":
            return [
                f"--stop-after={STEPS}",
                f"--eval-every={SAVE_EVERY}",
                f"--eval-tokens={command.parsed().eval_tokens // SHORTER}",
                f"--max-conversations={CONVERSATIONS}",
                "--chatcore-every=-1",
                "--run=dummy",
            ]
        case "scripts.chat_rl":
            questions = max(1, command.parsed().eval_examples // SHORTER)
            return [f"--stop-after={PRACTICE_STEPS}", f"--eval-examples={questions}", "--rehearse", "--run=dummy"]
        case "scripts.base_eval":
            examples, tokens = command.parsed().max_per_task, command.parsed().split_tokens // SHORTER
            most = CORE_EXAMPLES * command.ranks
            most = min(examples, most) if examples > 0 else most
            return [f"--max-per-task={most}", f"--split-tokens={tokens}"]
        case "scripts.chat_eval":
            asked = command.parsed()
            most = max(PROBLEMS, asked.batch_size) * command.ranks  # so many are under way together in the run, too
            problems = f"--max-problems={min(asked.max_problems or most, most)}"
            return [problems] if asked.source == "base" else [problems, "--rehearse"]  # it never ends its answers
    return []


def shorter(args, name: str) -> float:
    """Which share of a number `shortened` asks for."""
    return max(1, getattr(args, name) // SHORTER) / getattr(args, name)


def corpus_of(command: Command) -> str:
    return next(word.split("=")[1] for word in command.flags if word.startswith("--corpus="))


def add_examinations_in_training(commands: list[Command], place: Rehearsal) -> None:
    """CORE and ChatCORE along the way: by what the examinations after the training took."""
    of = {command.module: command for command in commands if not command.failed}
    base, sft = of.get("scripts.base_train"), of.get("scripts.chat_sft")
    if base and "scripts.base_eval" in of:
        args, steps = base.parsed(), place.found("base_train")["plan"]["num_iterations"]
        count = rehearsal.times_due(args.core_metric_every, steps, from_start=False)
        if count:
            each = rehearsal.core_seconds(place.found("base_eval"), args.core_metric_max_per_task)
            base.forecast += count * each
            base.rests_on += f", {count} times CORE of {rehearsal.brief(each)}"
    examined = [c for c in commands if c.module == "scripts.chat_eval" and not c.failed and c.parsed().source == "sft"]
    if sft and examined:
        args, found = sft.parsed(), place.found("chat_sft")
        steps = rehearsal.steps_of_the_mixture(args, found)
        count = rehearsal.times_due(args.chatcore_every, steps, from_start=False)
        if count:
            each = rehearsal.chat_seconds(place.found("chat_eval_sft"), args.chatcore_max_sample)
            sft.forecast += count * each
            sft.rests_on += f", {count} times ChatCORE of {rehearsal.brief(each)}"


# -- the summary


def summary(commands: list[Command], place: Rehearsal, seconds: float) -> dict:
    stages = {}
    for name in STAGES:
        own = [command for command in commands if command.stage == name]
        if own:
            in_turn = sum(command.forecast for command in own if not command.beside)
            stages[name] = {
                "rehearsed": sum(command.seconds for command in own),
                "forecast": max([in_turn, *(command.forecast for command in own if command.beside)]),
                "rests_on": "; ".join(dict.fromkeys(command.rests_on for command in own if command.rests_on)),
                "failed": [f"{command.module}: {command.failed}" for command in own if command.failed],
            }
    total = sum(found["forecast"] for found in stages.values())
    return {
        "tag": place.tag,
        "seconds": seconds,
        "stages": stages,
        "forecast": total,
        "resumed_at": next((command.resumed_at for command in commands if command.resumed_at), None),
        "memory": memory_of(commands, place),
        "disk": disk_of(commands, place),
        "cost": cost_of(commands, place, total),
    }


def trained(commands: list[Command]) -> list[tuple[str, str, Command]]:
    """(kind of checkpoint, name of the result, command) of what was trained."""
    kinds = {"scripts.base_train": "base", "scripts.chat_sft": "sft", "scripts.chat_rl": "rl"}
    return [(kinds[c.module], c.module.split(".")[1], c) for c in commands if c.module in kinds and not c.failed]


def memory_of(commands: list[Command], place: Rehearsal) -> dict:
    """Bytes at the peak of each training, and of a device where its size is known."""
    peaks, there = {}, None
    for _, name, _ in trained(commands):
        found = place.found(name)
        if peak := found["final"].get("peak_memory_bytes"):
            peaks[name] = peak
        there = found["environment"].get("device_memory") or there
    return {"peaks": peaks, "there": there}


def disk_of(commands: list[Command], place: Rehearsal) -> dict:
    """Bytes that the checkpoints and the data of the whole run will take besides what is there already, and that are
    free once the rehearsal has cleaned up."""
    needed, there = 0, 0
    for kind, _, command in trained(commands):
        folder = place.base / paths.CHECKPOINT_FOLDERS[kind] / place.tag
        size = max((rehearsal.bytes_of(step) for step in folder.glob("step_*")), default=0)
        needed += size * (max(1, command.parsed().keep) + 1)  # one is being written
        there += rehearsal.bytes_of(place.real / paths.CHECKPOINT_FOLDERS[kind] / place.tag)
    for command in commands:
        if command.module == "nanochat.dataset" and "tokenize" in command.flags and not command.failed:
            corpora = place.base / "corpora"
            shards = len(list(corpora.rglob("*.parquet"))) or 1
            wanted = rehearsal.shards_wanted(command.flags) + 1 if "-n" in command.flags else shards
            needed += rehearsal.bytes_of(corpora) * wanted // shards
            there += rehearsal.bytes_of(place.real / "corpora" / corpus_of(command))
    free = shutil.disk_usage(place.real).free + rehearsal.bytes_of(place.base)
    return {"needed": max(0, needed - there), "free": free}


def cost_of(commands: list[Command], place: Rehearsal, seconds: float) -> float | None:
    for _, name, command in trained(commands):
        device = machines.find(place.found(name)["environment"]["device"])
        if device:
            return seconds / 3600 * device.dollars * command.ranks
    return None


if __name__ == "__main__":
    main(parse_args())
