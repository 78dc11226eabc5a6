"""What a sweep says of scaling.

python -m scripts.scaling fit scaling_laws --at 1e20      best size and tokens by FLOPs, from runs at several budgets
python -m scripts.scaling series miniseries               bits per byte and CORE by FLOPs, from a run of each depth
"""

import argparse
import math

from nanochat import laws, laws_pages, paths, research_pages, sweep
from nanochat.core_references import GPT2_CORE

GPT2 = GPT2_CORE["GPT-2 1.6B"]
PARAMS = {"scaling": "scaling_params", "total": "total_params"}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("action", choices=("fit", "series"))
    add("names", nargs="+", metavar="NAME", help="a sweep, or several tags of finished runs")
    add("--at", type=float, nargs="+", default=[], metavar="FLOPS", help="budgets to tell of, beyond those run")
    add(
        "--params", choices=list(PARAMS), default="scaling", help="fit: matrices and head, as base_train counts, or all"
    )
    add("--out", help="folder for the results (default: that of the sweep)")
    args = parser.parse_args(argv)
    if any(not 0 < budget < math.inf for budget in args.at):
        parser.error(f"--at takes FLOPs above 0, such as 1e20; got {args.at}")
    return args


def main(args):
    try:
        name, runs = sweep.collect(args.names)
        page, panels, found = (fit if args.action == "fit" else series)(name, runs, args)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    folder = research_pages.folder_of(args.out, name)
    paths.write_json(folder / f"{args.action}.json", found)
    print(f"\npage: {research_pages.write(folder, args.action, page, panels)} (and .md, .png, .json)")


def fit(name: str, runs: list[dict], args):
    points = [
        laws.Point(run["budget"], run["depth"], run[PARAMS[args.params]], run["tokens"], run["flops"], run["val_bpb"])
        for run in runs
        if run["budget"] and run["val_bpb"] is not None
    ]
    if not points:
        raise ValueError(f"no run of {name} has a budget and bits per byte: train with --target-flops and --eval-every")
    found = {"sweep": name, "params": args.params, **laws.fit(points, tuple(args.at))}
    page, panels = laws_pages.laws_page(name, found, args.params)
    print(research_pages.plain(page))
    return page, panels, found


def series(name: str, runs: list[dict], args):
    runs = sorted((run for run in runs if run["val_bpb"] is not None), key=lambda run: run["flops"])
    if len(runs) < 2:
        raise ValueError(f"{name} has {len(runs)} runs with bits per byte; a series has two or more")
    tested = [run for run in runs if run["core"] is not None]
    log_flops = [math.log10(run["flops"]) for run in tested]
    core = [run["core"] for run in tested]
    found = {
        "sweep": name,
        "runs": runs,
        "bpb": laws.with_floor([run["flops"] for run in runs], [run["val_bpb"] for run in runs]),
        "core_by_log_flops": laws.straight(log_flops, core),
        "core_by_bpb": laws.straight([run["val_bpb"] for run in tested], core),
    }
    found["predictions"] = drawn_on(found, args.at)
    page, panels = laws_pages.series_page(name, found)
    print(research_pages.plain(page))
    return page, panels, found


def drawn_on(found: dict, budgets: list[float]) -> list[dict]:
    """What the fits say where nothing was run."""
    told, line, curve = [], found["core_by_log_flops"], found["bpb"]
    for budget in budgets:
        if curve:
            value = curve["floor"] + curve["A"] * budget ** -curve["alpha"]
            told.append(
                {
                    "what": f"bits per byte at {budget:.2e} FLOPs",
                    "value": value,
                    "shown": f"{value:.4f}",
                    "range": "no interval",
                }
            )
        if line:
            core = laws.predicted(line, math.log10(budget))
            said = f"95 %: {core['low']:.3f} to {core['high']:.3f}"
            told.append(
                {
                    "what": f"CORE at {budget:.2e} FLOPs",
                    "value": core["value"],
                    "shown": f"{core['value']:.3f}",
                    "range": said,
                }
            )
    if line and line["slope"] > 0:
        log_flops = (GPT2 - line["height"]) / line["slope"]
        depth = laws.straight(
            [math.log10(run["flops"]) for run in found["runs"]], [math.log10(run["depth"]) for run in found["runs"]]
        )
        said = f"depth {10 ** (depth['slope'] * log_flops + depth['height']):.1f}, about"
        told.append(
            {
                "what": f"FLOPs to GPT-2's CORE of {GPT2}",
                "value": 10**log_flops,
                "shown": f"{10**log_flops:.2e}",
                "range": said,
            }
        )
    return told


if __name__ == "__main__":
    main(parse_args())
