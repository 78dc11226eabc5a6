"""Did it help? Runs that differ in a flag, compared by pairs of one seed: the same rows in the same order and, where
the shape is the same, the same first weights. So the noise of the seed falls out of the difference.

An arm is the runs of one setting, with a seed each. The first arm is what the others are held against.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass

from nanochat.laws import t_975

# flags of base_train that change nothing of what is learned
BESIDE = (
    "run", "model_tag", "device_type", "seed", "resume", "resume_from_step", "stop_after", "save_every", "save_minutes",
    "keep", "on_nan", "eval_every", "core_metric_every", "core_metric_max_per_task", "bundle", "sample_every",
)  # fmt: skip
VALIDATED_BY = ("corpus", "eval_tokens")  # other text, or less of it: bits that do not compare
ALONG = ("steps", "tokens", "FLOPs", "time")
GAP = 0.2  # share of the way between two measurements, above which nothing is read from between them


@dataclass
class Trained:
    """A finished run. curve: a dict of ALONG and bpb for each measurement, in order."""

    tag: str
    seed: int
    flags: dict
    curve: list[dict]

    def at(self, along: str, place: float) -> float | None:
        """Bits per byte at a place, between measurements along a straight line; None where they lie too far apart."""
        xs, ys = [point[along] for point in self.curve], [point["bpb"] for point in self.curve]
        i = bisect_left(xs, place)
        if i < len(xs) and xs[i] == place:
            return ys[i]
        if i in (0, len(xs)) or xs[i] - xs[i - 1] > GAP * xs[-1]:
            return None
        share = (place - xs[i - 1]) / (xs[i] - xs[i - 1])
        return ys[i - 1] + share * (ys[i] - ys[i - 1])


def trained(tag: str, found: dict, log: list[dict]) -> Trained:
    """found: a run's base_train.json; log: the lines of its base_train.jsonl. Raises ValueError where no bits per byte
    were measured."""
    a_step, flops = found["plan"]["total_batch_size"], found["plan"]["flops_per_token"]
    seconds = {line["step"]: line["total_training_time"] for line in log if "total_training_time" in line}
    curve = []
    for line in log:
        if line.get("val/bpb") is not None and (line["step"] == 0 or line["step"] - 1 in seconds):
            step = line["step"]
            time = seconds[step - 1] if step else 0.0
            places = (step, step * a_step, step * a_step * flops, time)
            curve.append({**dict(zip(ALONG, places, strict=True)), "bpb": line["val/bpb"]})
    if len(curve) < 2 or curve[-1]["steps"] < found["final"]["step"]:
        raise ValueError(f"{tag} has no bits per byte of its end: train it with --eval-every")
    return Trained(tag, found["config"]["seed"], found["config"], curve)


@dataclass
class Arm:
    name: str
    runs: dict[int, Trained]  # by seed


def arms(runs: list[Trained]) -> list[Arm]:
    """Runs of one setting together, in the order in which they were given; named by what differs. Raises ValueError."""
    if len({run.tag for run in runs}) < len(runs):
        raise ValueError("a run was named twice")
    settings = {flag for run in runs for flag in run.flags} - set(BESIDE)
    differing = sorted(flag for flag in settings if len({str(run.flags.get(flag)) for run in runs}) > 1)
    if text := [flag for flag in VALIDATED_BY if flag in differing]:
        said = ", ".join(f"{run.tag}: {run.flags.get(text[0])}" for run in runs)
        raise ValueError(f"bits per byte of other text do not compare: --{text[0].replace('_', '-')} is {said}")
    found: dict[tuple, Arm] = {}
    for run in runs:
        values = tuple(str(run.flags.get(flag)) for flag in differing)
        said = ", ".join(f"{flag.replace('_', '-')}={value}" for flag, value in zip(differing, values, strict=True))
        arm = found.setdefault(values, Arm(said or run.tag, {}))
        if run.seed in arm.runs:
            raise ValueError(f"{arm.runs[run.seed].tag} and {run.tag} have the same flags and the same seed {run.seed}")
        arm.runs[run.seed] = run
    if len(found) < 2:
        raise ValueError(f"{', '.join(run.tag for run in runs)}: the same flags but for the seed, nothing to compare")
    return list(found.values())


def notes(runs: list[Trained]) -> list[str]:
    """What the pairs do not have in common, though they have a seed."""

    def differ(*flags):
        return any(len({str(run.flags.get(flag)) for run in runs}) > 1 for flag in flags)

    found = []
    if differ("depth", "aspect_ratio", "head_dim", "vocab_size"):
        found.append("The shapes differ, so the first weights do, too: pairs share the order of the text alone.")
    if differ("max_seq_len", "vocab_size"):
        found.append("The validation text is cut into other rows: bits per byte compare roughly.")
    if differ("total_batch_size", "max_seq_len", "vocab_size", "in_order", "num_files"):
        found.append("The rows of a step differ.")
    return found


def against(first: Arm, other: Arm) -> dict:
    """How `other` stands to `first`: at the ends of the runs, and at the last place along each of ALONG that both runs
    of a pair have reached. Differences are of bits per byte, other - first: below 0 is better."""
    seeds = [seed for seed in first.runs if seed in other.runs]
    if not seeds:
        raise ValueError(
            f"no seed in common: {first.name} has {sorted(first.runs)}, {other.name} {sorted(other.runs)}; "
            "run the pairs with: python -m scripts.compare NAME --set FLAG=V1,V2 --seeds 3"
        )
    pairs = [(first.runs[seed], other.runs[seed]) for seed in seeds]
    found = {"arm": other.name, "against": first.name, "seeds": seeds}
    found["at the end"] = difference([(a.curve[-1]["bpb"], b.curve[-1]["bpb"]) for a, b in pairs])
    for along in ALONG:
        ends = [min(a.curve[-1][along], b.curve[-1][along]) for a, b in pairs]
        values = [(a.at(along, end), b.at(along, end)) for (a, b), end in zip(pairs, ends, strict=True)]
        if any(None in pair for pair in values):
            found[f"equal {along}"] = {"why_not": "measured too seldom there: a smaller --eval-every"}
            continue
        shares = [(end / a.curve[-1][along], end / b.curve[-1][along]) for (a, b), end in zip(pairs, ends, strict=True)]
        found[f"equal {along}"] = difference(values) | {
            "place": sum(ends) / len(ends),
            # a run that is not at its end there has not yet had its slow last steps
            "share_of_first": sum(a for a, _ in shares) / len(shares),
            "share_of_other": sum(b for _, b in shares) / len(shares),
        }
    return found


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


def difference_curve(first: Arm, other: Arm, along: str) -> list[dict]:
    """The difference wherever both runs of all pairs were measured, after the first measurement, that of untrained
    models; along the time, where no two are measured at the same place, at even distances."""
    seeds = [seed for seed in first.runs if seed in other.runs]
    curves = [run.curve for seed in seeds for run in (first.runs[seed], other.runs[seed])]
    places = sorted({point[along] for curve in curves for point in curve[1:]})
    if along == "time":
        low, high = max(curve[1][along] for curve in curves), min(curve[-1][along] for curve in curves)
        count = min(map(len, curves)) - 1
        places = [low + (high - low) * i / max(count - 1, 1) for i in range(count)] if low <= high else []
    curve = []
    for place in places:
        values = [(first.runs[seed].at(along, place), other.runs[seed].at(along, place)) for seed in seeds]
        if not any(None in pair for pair in values):
            curve.append({along: place, **difference(values)})
    return curve
