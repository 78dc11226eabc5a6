"""What a sweep says of scaling.

python -m scripts.scaling fit scaling_laws --at 1e20      best size and tokens by FLOPs, from runs at several budgets
python -m scripts.scaling series miniseries --at 1e21     bits per byte and CORE by FLOPs, from a run of each depth
"""

import argparse
import math
from types import SimpleNamespace

from nanochat import laws, laws_pages, pairs, paths, research_pages, sweep
from nanochat.core_references import GPT2_CORE, PUBLISHED_BUNDLE

GPT2 = GPT2_CORE["GPT-2 1.6B"]
PARAMS = {"scaling": "scaling_params", "total": "total_params"}
MEANT_TO_DIFFER = ("depth", "target_flops", "device_batch_size", "compile")
IN_SIGHT = 3  # powers of ten beyond the runs


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", choices=("fit", "series"))
    add("names", nargs="+", metavar="NAME", help="a sweep, or several tags of finished runs")
    add("--at", type=float, nargs="+", default=[], metavar="FLOPS", help="budgets to tell of, beyond those run")
    add("--params", choices=list(PARAMS), help="fit: matrices and head, as base_train counts, or all (scaling)")
    add("--out", help="folder for the results (default: sweeps/NAME in the base folder)")
    args = parser.parse_args(argv)
    if any(not 0 < budget < math.inf for budget in args.at):
        parser.error(f"--at takes FLOPs above 0, such as 1e20; got {args.at}")
    if args.params and args.action == "series":
        parser.error("--params is for fit")
    args.params = args.params or "scaling"
    return args


def main(args):
    try:
        name, tags = sweep.tags_of(args.names)
        runs, notes = collect(tags)
        page, panels, found = (fit if args.action == "fit" else series)(name, runs, notes, args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    folder = research_pages.folder_of(args.out, name)
    paths.write_json(folder / f"{args.action}.json", found)
    print(research_pages.plain(page))
    print(f"\npage: {research_pages.write(folder, args.action, page, panels)} (and .md, .png, .json)")


def collect(tags) -> tuple[list[dict], list[str]]:
    """The digest of each run, with its tag, and what the runs do not have in common but should. Raises ValueError."""
    found = {tag: sweep.finished_json(tag) for tag in tags}
    runs = [{"tag": tag, **sweep.digest(one)} for tag, one in found.items()]
    settings = [SimpleNamespace(flags=one["config"] | {"vocabulary": one.get("vocabulary")}) for one in found.values()]
    differing = [flag for flag in pairs.differing_flags(settings) if flag not in MEANT_TO_DIFFER]
    if text := [flag for flag in differing if flag in pairs.VALIDATED_BY]:
        raise ValueError(
            f"the runs differ in --{text[0].replace('_', '-')}: bits per byte of other text do not compare"
        )
    seen = {}
    for run in runs:
        same = seen.setdefault(
            (run["budget"], run["depth"], run["total_params"], run["seed"], run["tokens"]), run["tag"]
        )
        if same != run["tag"]:
            raise ValueError(f"{same} and {run['tag']} are the same run twice: name one of them")
    names = ", ".join("--" + flag.replace("_", "-") for flag in differing)
    return runs, [f"The runs differ in {names}, too."] if differing else []


def fit(name: str, runs: list[dict], notes: list[str], args):
    points = [
        laws.Point(run["budget"], run["depth"], run[PARAMS[args.params]], run["tokens"], run["val_bpb"])
        for run in runs
        if run["budget"] and run["val_bpb"] is not None
    ]
    if not points:
        raise ValueError(f"no run of {name} has a budget and bits per byte: train with --target-flops and --eval-every")
    found = {"sweep": name, "params": args.params, "notes": notes, **laws.fit(points, tuple(args.at))}
    return *laws_pages.laws_page(name, found, args.params), found


def series(name: str, runs: list[dict], notes: list[str], args):
    runs = sorted((run for run in runs if run["val_bpb"] is not None), key=lambda run: run["flops"])
    if len(runs) < 2:
        raise ValueError(f"{name} has {len(runs)} runs with bits per byte; a series has two or more")
    if len({run["depth"] for run in runs}) < len(runs):
        raise ValueError(f"{name} has several runs of one depth; a series has one of each: name them, or use fit")
    if args.at and len(runs) < 4:
        raise ValueError(f"--at needs four runs, {name} has {len(runs)}")
    tested = [run for run in runs if run["core"] is not None]
    core = [run["core"] for run in tested]
    bundles = {run["bundle"] for run in tested}
    if len(bundles) > 1:
        raise ValueError(f"CORE by the bundles {', '.join(sorted(bundles))} does not compare: name the runs of one")
    found = {
        "sweep": name,
        "runs": runs,
        "notes": notes,
        "published": bundles == {PUBLISHED_BUNDLE},  # CORE compares with GPT-2's
        "bpb": laws.with_floor([run["flops"] for run in runs], [run["val_bpb"] for run in runs]),
        "core_by_log_flops": laws.straight([math.log10(run["flops"]) for run in tested], core),
        "core_by_bpb": laws.straight([run["val_bpb"] for run in tested], core),
    }
    found["predictions"] = predictions(found, args.at)
    return *laws_pages.series_page(name, found), found


def predictions(found: dict, budgets: list[float]) -> list[dict]:
    """What the fits say where nothing was run."""
    told, line, curve, runs = [], found["core_by_log_flops"], found["bpb"], found["runs"]
    for budget in budgets:
        if curve:
            value = curve["floor"] + curve["A"] * budget ** -curve["alpha"]
            told.append({"of": "bpb", "at": budget, "value": value, "low": None, "high": None})
        if line:
            told.append({"of": "core", "at": budget, **laws.predicted(line, math.log10(budget))})
    log_flops = [math.log10(run["flops"]) for run in runs]
    depth = laws.straight(log_flops, [math.log10(run["depth"]) for run in runs])
    if line and depth and found["published"]:
        reached = (GPT2 - line["height"]) / line["slope"] if line["slope"] > 0 else math.inf
        goal = {"of": "flops", "core": GPT2, "flops": None, "depth": None}
        if log_flops[0] - IN_SIGHT < reached < log_flops[-1] + IN_SIGHT:
            goal |= {"flops": 10**reached, "depth": 10 ** (depth["slope"] * reached + depth["height"])}
        told.append(goal)
    return told


if __name__ == "__main__":
    main(parse_args())
