"""The leaderboard's entry of one run, or of several that differ by their seed; the rules are in dev/LEADERBOARD.md.

python dev/leaderboard.py entry-s1 entry-s2 entry-s3
"""

import argparse
import statistics

from nanochat import results, sweep
from nanochat.core_references import GPT2_CORE, GPT2_TASKS, PUBLISHED_BUNDLE
from nanochat.pairs import BESIDE
from nanochat.progress import WARM_STEPS
from nanochat.results import duration

GRADE = GPT2_CORE["GPT-2 1.6B"]
DEVIATION = 0.005  # of CORE between seeds
RUNS = 3  # or one, two deviations above


def entry(tag: str) -> dict:
    """What counts of a run. Raises ValueError where a part of it is missing."""
    trained, examined = results.read(tag, "base_train"), results.read(tag, "base_eval")
    if trained is None:
        raise ValueError(f"{tag} has no base_train.json; train it with: python -m scripts.base_train --model-tag {tag}")
    core = (examined or {}).get("core")
    if core is None:
        raise ValueError(f"{tag} has no CORE; examine it with: python -m scripts.base_eval --model-tag {tag}")
    where, config, final = trained["environment"], trained["config"], trained["final"]
    return {
        "tag": tag,
        "seconds": seconds_of(trained),
        "core": core["metric"],
        "bpb": final["val_bpb"],
        "machine": f"{where['world_size']} x {where['device']}",
        "commit": where["git_commit"],
        "seed": config["seed"],
        "flags": {flag: value for flag, value in config.items() if flag not in BESIDE},
        "corpus": trained["corpus"],
        "depth": trained["model"]["config"]["n_layer"],
        "command": trained["command"],
        "broken": list(broken(trained, examined)),
    }


def seconds_of(trained: dict) -> float:
    """All steps but the first ten, with the wait for their rows, at the mean speed of those that were timed: a resumed
    run leaves out ten more each time it begins."""
    final = trained["final"]
    if not final["tok_per_sec"]:
        raise ValueError(f"{trained['tag']} has too few steps to be timed")
    tokens = (final["step"] - WARM_STEPS) * trained["plan"]["total_batch_size"]
    return tokens / final["tok_per_sec"] / (1 - final["data_wait"])


def broken(trained: dict, examined: dict):
    """Which rules a run does not meet by itself."""
    core, final = examined["core"], trained["final"]
    if final["step"] < trained["plan"]["num_iterations"]:
        yield f"it ended at step {final['step']} of {trained['plan']['num_iterations']}"
    if set(core["tasks"]) != set(GPT2_TASKS) or core.get("bundle") != PUBLISHED_BUNDLE:
        yield f"CORE is of the bundle {core.get('bundle')}, not the published one (rule 3)"
    elif core["max_per_task"] != -1:
        yield f"CORE is of {core['max_per_task']} examples a task, not of all (rule 3)"
    if examined["step"] != final["step"]:
        yield f"CORE is of step {examined['step']}, not of the last, {final['step']} (rule 3)"
    if final["val_bpb"] is None:
        yield "it has no bits per byte: train it with --eval-every (rule 5)"
    if examined["started"] < trained["started"]:
        yield "its examination is older than its training (rule 3)"
    where = trained["environment"]
    if where["world_size"] != 8 or "H100" not in where["device"]:
        yield f"{where['world_size']} x {where['device']} is another machine than 8 x H100 (rule 2)"


def judged(entries: list[dict]) -> list[str]:
    """Which rules they do not meet: each of them, and all together."""
    found = [f"{one['tag']}: {reason}" for one in entries for reason in one["broken"]]
    for key, what in (("flags", "flags"), ("machine", "machine"), ("commit", "commit")):
        if any(one[key] != entries[0][key] for one in entries):
            found.append(f"the runs have not the same {what} (rule 4)")
    if len({one["seed"] for one in entries}) < len(entries):
        found.append("two runs have the same seed (rule 4)")
    core = statistics.mean(one["core"] for one in entries)
    if len(entries) >= RUNS and core < GRADE:
        found.append(f"the mean CORE of {core:.4f} is below {GRADE} (rule 3)")
    elif len(entries) < RUNS and (len(entries) > 1 or core < GRADE + 2 * DEVIATION):
        found.append(f"{RUNS} runs are needed, or a single one with a CORE of {GRADE + 2 * DEVIATION:.4f} (rule 4)")
    return found


def told(entries: list[dict]) -> str:
    """A row for the table, each run, and what is missing."""
    first = entries[0]
    hours = statistics.mean(one["seconds"] for one in entries) / 3600
    core = statistics.mean(one["core"] for one in entries)
    measured = [one["bpb"] for one in entries if one["bpb"] is not None]
    bpb = f"{statistics.mean(measured):.4f}" if measured else "-"
    what = (
        f"depth {first['depth']}, {first['corpus']}, commit {first['commit']}, {len(entries)} runs, {first['machine']}"
    )
    lines = [
        "| hours | what | CORE | bits per byte |",
        "|---|---|---|---|",
        f"| {hours:.2f} | {what} | {core:.4f} | {bpb} |",
        "",
    ]
    for one in entries:
        lines.append(f"- seed {one['seed']}: {duration(one['seconds'])}, CORE {one['core']:.4f}, `{one['command']}`")
    faults = judged(entries)
    lines += ["", "Does not count yet:" if faults else "It counts by all rules.", *(f"- {fault}" for fault in faults)]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "tags", nargs="+", metavar="TAG", help="finished runs that differ by their seed, or a sweep of them"
    )
    args = parser.parse_args(argv)
    if len(set(args.tags)) < len(args.tags):
        parser.error("a run is named twice")
    return args


def main(args):
    try:
        _, tags = sweep.tags_of(args.tags)
        print(told([entry(tag) for tag in tags]))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main(parse_args())
