"""Did it help? Runs that differ in a flag, compared by pairs of one seed: the same rows in the same order and, where
the shape is the same, the same first weights. So the noise of the seed falls out of the difference.

An arm is the runs of one setting, with a seed each. The first arm is what the others are held against.
"""

import math
from bisect import bisect_right
from dataclasses import dataclass
from statistics import median

from nanochat.laws import t_975
from nanochat.progress import WARM_STEPS

# flags of base_train that change nothing of what is learned
BESIDE = (
    "run", "model_tag", "device_type", "seed", "resume", "resume_from_step", "stop_after", "save_every", "save_minutes",
    "keep", "on_nan", "eval_every", "core_metric_every", "core_metric_max_per_task", "bundle", "sample_every",
)  # fmt: skip
VALIDATED_BY = ("corpus", "eval_tokens")  # other text, or less of it: bits that do not compare
ALONG = ("steps", "tokens", "flops", "time")
GAP = 0.2  # share of the way between two measurements, above which nothing is read from between them


@dataclass
class Trained:
    """A finished run. name: by which it was asked for. flags: those that may make arms, and how many shards it read.
    curve: (steps, bits per byte), ascending. pace: seconds a step, the median, or None for very short runs."""

    tag: str
    name: str
    seed: int
    flags: dict
    environment: dict
    curve: list[tuple[int, float]]
    pace: float | None
    a_step: dict[str, float]  # of ALONG but for the time

    def at(self, steps: float) -> float | None:
        """Bits per byte after so many steps, between measurements along a straight line; None where they lie too far
        apart."""
        places = [place for place, _ in self.curve]
        i = bisect_right(places, steps) - 1
        if i >= 0 and places[i] == steps:
            return self.curve[i][1]
        if i < 0 or i + 1 == len(places) or places[i + 1] - places[i] > GAP * places[-1]:
            return None
        share = (steps - places[i]) / (places[i + 1] - places[i])
        return self.curve[i][1] + share * (self.curve[i + 1][1] - self.curve[i][1])

    @property
    def steps(self) -> int:
        return self.curve[-1][0]


def trained(tag: str, name: str, found: dict, log: list[dict]) -> Trained:
    """found: a run's base_train.json; log: the lines of its base_train.jsonl. Raises ValueError where no bits per byte
    were measured."""
    measured = {line["step"]: line["val/bpb"] for line in log if line.get("val/bpb") is not None}
    if len(measured) < 2 or max(measured) < found["final"]["step"]:
        reason = "train it with --eval-every" if log else "its base_train.jsonl is gone"
        raise ValueError(f"{tag} has no bits per byte of its end: {reason}")
    warm = [line["train/dt"] for line in log if "train/dt" in line and line["step"] >= WARM_STEPS]
    tokens = found["plan"]["total_batch_size"]
    a_step = {"steps": 1, "tokens": tokens, "flops": tokens * found["plan"]["flops_per_token"]}
    vocabulary = (found.get("vocabulary") or "")[:8]  # the beginning of a fingerprint
    flags = found["config"] | {"shards": found.get("shards"), "vocabulary": vocabulary}
    curve = sorted(measured.items())
    pace = median(warm) if warm else None
    return Trained(tag, name, found["config"]["seed"], flags, found.get("environment", {}), curve, pace, a_step)


@dataclass
class Arm:
    name: str
    runs: dict[int, Trained]  # by seed

    def paces(self) -> list[float]:
        return sorted(run.pace for run in self.runs.values() if run.pace)


def arms(runs: list[Trained]) -> list[Arm]:
    """Runs of one setting together, in the order in which they were given; named by what differs. Where the flags do
    not tell runs apart, the names do by which they were asked for: the code may differ. Raises ValueError."""
    if len({run.tag for run in runs}) < len(runs):
        raise ValueError("a run was named twice")
    differing = differing_flags(runs)
    if text := [flag for flag in VALIDATED_BY if flag in differing]:
        said = ", ".join(f"{run.tag}: {run.flags.get(text[0])}" for run in runs)
        raise ValueError(f"bits per byte of other text do not compare: --{text[0].replace('_', '-')} is {said}")
    setting = {run.tag: tuple(str(run.flags.get(flag)) for flag in differing) for run in runs}
    by_name = len({(setting[run.tag], run.seed) for run in runs}) < len(runs)
    found: dict[tuple, Arm] = {}
    for run in runs:
        words = [f"{flag.replace('_', '-')}={run.flags.get(flag)}" for flag in differing]
        arm = found.setdefault(
            (setting[run.tag], run.name if by_name else ""), Arm(", ".join([run.name] * by_name + words) or run.tag, {})
        )
        if run.seed in arm.runs:
            raise ValueError(f"{arm.runs[run.seed].tag} and {run.tag} have the same flags and the same seed {run.seed}")
        arm.runs[run.seed] = run
    if len(found) < 2:
        what = f"{', '.join(run.tag for run in runs)}: the same flags but for the seed" if runs else "no finished run"
        raise ValueError(f"{what}, nothing to compare")
    return list(found.values())


def differing_flags(runs: list) -> list[str]:
    """Flags that matter and are not the same in all runs. runs: whatever has flags."""
    flags = dict.fromkeys(flag for run in runs for flag in run.flags if flag not in BESIDE)
    return [flag for flag in flags if len({str(run.flags.get(flag)) for run in runs}) > 1]


def notes(runs: list[Trained]) -> list[str]:
    """What the runs do not have in common, beside what they were meant to differ in."""

    def values(flag):
        return {str(run.flags.get(flag)) for run in runs}

    def differ(*flags):
        return any(len(values(flag)) > 1 for flag in flags)

    found = []
    if differ("depth", "aspect_ratio", "head_dim", "vocab_size"):
        found.append("The shapes differ, so the first weights do, too: pairs share the order of the text alone.")
    if differ("max_seq_len", "vocab_size", "vocabulary"):
        found.append("The validation text is cut into other rows: bits per byte compare roughly.")
    if differ("total_batch_size", "max_seq_len", "vocab_size", "vocabulary", "in_order", "num_files", "shards"):
        found.append("The rows of a step differ.")
    for key, what in (("git_commit", "code"), ("device", "devices"), ("world_size", "ranks"), ("dtype", "precision")):
        seen = sorted({str(run.environment.get(key)) for run in runs})
        if len(seen) > 1:
            found.append(f"Made with different {what}: {', '.join(seen)}.")
    return found


def against(first: Arm, other: Arm) -> dict:
    """How `other` stands to `first`: at the ends of the runs, and at the last place along each of ALONG that both runs
    of a pair have reached. Differences are of bits per byte, other - first: below 0 is better.

    The time is the steps' by the median of the arm's runs, since a machine is now faster, now slower; arms whose runs
    overlap in speed count as equally fast.
    """
    seeds = [seed for seed in first.runs if seed in other.runs]
    if not seeds:
        raise ValueError(
            f"no seed in common: {first.name} has {sorted(first.runs)}, {other.name} {sorted(other.runs)}; "
            "run the pairs with: python -m scripts.compare NAME --set FLAG=V1,V2 --seeds 3"
        )
    pairs = [(first.runs[seed], other.runs[seed]) for seed in seeds]
    found = {"arm": other.name, "against": first.name, "seeds": seeds, "pace": pace_of(first, other)}
    found["at_end"] = difference([(a.curve[-1][1], b.curve[-1][1]) for a, b in pairs])
    found["at_end"]["flops"] = [pairs[0][i].steps * pairs[0][i].a_step["flops"] for i in (0, 1)]
    for along in ALONG:
        units = units_of(along, first, other, found["pace"])
        if units is None:
            found[f"equal_{along}"] = {"why_not": f"no step after the first {WARM_STEPS} to take the time of"}
            continue
        ends = [min(a.steps * units[0], b.steps * units[1]) for a, b in pairs]
        values = [(a.at(end / units[0]), b.at(end / units[1])) for (a, b), end in zip(pairs, ends, strict=True)]
        if any(None in pair for pair in values):
            found[f"equal_{along}"] = {"why_not": "measured too seldom there: a smaller --eval-every"}
            continue
        found[f"equal_{along}"] = difference(values) | {
            "place": ends[0],
            # a run that is not at its end there has not yet had its slow last steps
            "shares": [ends[0] / (run.steps * unit) for run, unit in zip(pairs[0], units, strict=True)],
        }
    return found


def pace_of(first: Arm, other: Arm) -> dict | None:
    """Seconds a step of both arms, and from where to where their runs lie; None where it was not taken."""
    paces = [first.paces(), other.paces()]
    if not all(paces):
        return None
    (a, b), (c, d) = ((one[0], one[-1]) for one in paces)
    same = a <= d and c <= b and same_work(first, other)
    medians = [median(one) for one in paces]
    return {"seconds": [median(paces[0] + paces[1])] * 2 if same else medians, "ranges": [[a, b], [c, d]], "same": same}


def same_work(first: Arm, other: Arm) -> bool:
    one, two = (next(iter(arm.runs.values())).a_step for arm in (first, other))
    return one == two


def units_of(along: str, first: Arm, other: Arm, pace: dict | None) -> list[float] | None:
    """What a step of each arm is worth along the way."""
    if along == "time":
        return pace and pace["seconds"]
    return [next(iter(arm.runs.values())).a_step[along] for arm in (first, other)]


def difference(values: list[tuple[float, float]]) -> dict:
    """Of pairs (first, other): means, the mean difference, its standard error and the interval that holds it with 95 %
    (Student's t); without these for a single pair."""
    n = len(values)
    first, other = (sum(column) / n for column in zip(*values, strict=True))
    differences = [b - a for a, b in values]
    mean = sum(differences) / n
    found = {"first": first, "other": other, "difference": mean, "differences": differences, "pairs": n}
    if n == 1:
        return found | {"error": None, "low": None, "high": None}
    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    wide = t_975(n - 1) * error
    return found | {"error": error, "low": mean - wide, "high": mean + wide}


def verdict(found: dict) -> str:
    """Of a difference, in a word or two."""
    if "why_not" in found:
        return found["why_not"]
    if found["error"] is None:
        return "one pair: no error bar"
    if found["low"] <= 0 <= found["high"]:
        return "undecided"
    return "helps" if found["difference"] < 0 else "hurts"


def difference_curve(first: Arm, other: Arm, along: str, pace: dict | None) -> list[tuple[float, dict]]:
    """(place, difference) wherever a run of the pairs was measured and all can be read, after the first measurement,
    that of untrained models."""
    units = units_of(along, first, other, pace)
    if units is None:
        return []
    seeds = [seed for seed in first.runs if seed in other.runs]
    pairs = [(first.runs[seed], other.runs[seed]) for seed in seeds]
    places = {s * unit for pair in pairs for run, unit in zip(pair, units, strict=True) for s, _ in run.curve[1:]}
    curve = []
    for place in sorted(places):
        values = [(a.at(place / units[0]), b.at(place / units[1])) for a, b in pairs]
        if not any(None in pair for pair in values):
            curve.append((place, difference(values)))
    return curve
