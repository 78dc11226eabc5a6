"""Did it help? Trainings that differ in a flag, compared in pairs of one seed: bits per byte at equal steps, tokens,
FLOPs and time, with error bars.

python -m scripts.compare RUN_A RUN_B...                                              finished runs, or a sweep's name
python -m scripts.compare rates --set matrix-lr=0.02,0.03 --seeds 3 -- --depth=12     runs the pairs, then compares them
"""

import argparse
import sys

import torch

from nanochat import pairs, pairs_page, paths, research_pages, sweep
from nanochat.report_run import read_log


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "names",
        nargs="+",
        metavar="RUN",
        help="tags of finished runs, or a sweep; with --set the name for the new runs",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG=V1,V2",
        help="run base_train with each of these; on and off for flags without a value",
    )
    add("--seeds", type=int, default=3, help="with --set: how many pairs")
    add("--nproc", type=int, help="processes under torchrun (default: one a GPU; 1: without torchrun)")
    add("--out", help="folder for the results (default: that of the sweep)")
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    args = parser.parse_args(own)
    args.flags = flags
    if args.set and len(args.names) != 1:
        parser.error(f"--set makes runs under one name, got {' '.join(args.names)}")
    if flags and not args.set:
        parser.error(f"{' '.join(flags)}: flags of base_train go with --set FLAG=V1,V2")
    if args.seeds < 1 or (args.nproc is not None and args.nproc < 1):
        parser.error("--seeds and --nproc are 1 or more")
    return args


def main(args):
    try:
        if args.set:
            run_pairs(args)
        name, found, page, panels = compare(args.names)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(research_pages.plain(page))
    folder = research_pages.folder_of(args.out, name)
    paths.write_json(folder / "compare.json", found)
    print(f"\npage: {research_pages.write(folder, 'compare', page, panels)} (and .md, .png, .json)")


def run_pairs(args) -> None:
    seeds = {"seed": [str(seed) for seed in range(1, args.seeds + 1)]}  # slowest: pairs are whole as early as can be
    runs = sweep.plan_runs(args.names[0], seeds | sweep.parse_axes(args.set), args.flags)
    failed = sweep.Driver(args.names[0], runs, args.nproc or max(1, torch.cuda.device_count())).run()
    if failed:
        raise ValueError(f"{', '.join(failed)} failed; the same command tries again")


def compare(names: list[str]):
    name, tags = sweep.tags_of(names)
    runs = []
    for tag in tags:
        found = sweep.finished_json(tag)
        runs.append(pairs.trained(tag, found, read_log(paths.results_dir(tag) / "base_train.jsonl")))
    arms = pairs.arms(runs)
    found = [pairs.against(arms[0], arm) for arm in arms[1:]]
    notes = pairs.notes(runs)
    page, panels = pairs_page.pairs_page(name, found, arms, notes)
    return name, {"name": name, "runs": tags, "arms": found, "notes": notes}, page, panels


if __name__ == "__main__":
    main(parse_args())
