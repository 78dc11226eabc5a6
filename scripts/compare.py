"""Did it help? Trainings that differ in a flag, compared in pairs of one seed: bits per byte at equal steps, tokens,
FLOPs and time, with error bars.

python -m scripts.compare rates --set matrix-lr=0.02,0.03 --seeds 3 -- --depth=12     runs the pairs, then compares them
python -m scripts.compare RUN_A RUN_B...                                              finished runs, or sweeps

The first setting, or the first run named, is what the others are held against. To try a change of the code, run
bash runs/quick.sh before and after it (NAME=before SEEDS=3, NAME=after SEEDS=3): python -m scripts.compare before after
"""

import argparse

import torch

from nanochat import pairs, pairs_page, paths, research_pages, sweep
from nanochat.report_run import read_log

BEFORE = ("--core-metric-every=-1", "--sample-every=-1")  # not needed; a user's own flags come later and win


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("names", nargs="+", metavar="RUN", help="tags of finished runs, or sweeps; with --set, the new runs' name")
    add(
        "--set",
        action="append",
        default=[],
        metavar="FLAG=V1,V2",
        help="run base_train with each of these values; the others are held against the first; on and off for a flag "
        "that has none",
    )
    add("--seeds", type=int, help="with --set: how many pairs (3)")
    add("--nproc", type=int, help="processes under torchrun (default: by the number of GPUs; 1: without torchrun)")
    add("--out", help="folder for the results (default: sweeps/NAME in the base folder)")
    args = sweep.parse(parser, argv)
    if args.set and len(args.names) != 1:
        parser.error(f"--set makes runs under one name, got {' '.join(args.names)}")
    if not args.set and (args.flags or args.seeds or args.nproc):
        parser.error("--seeds, --nproc and flags of base_train go with --set FLAG=V1,V2")
    args.seeds = 3 if args.seeds is None else args.seeds
    if args.seeds < 1 or (args.nproc is not None and args.nproc < 1):
        parser.error("--seeds and --nproc are 1 or more")
    return args


def main(args):
    try:
        failed = []
        if args.set:
            name, runs, failed = run_pairs(args)
            tags = {run.tag: name for run in runs if run.tag not in failed}
        else:
            name, tags = sweep.tags_of(args.names)
        found, page, panels = compare(name, tags)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    print(f"\n{research_pages.plain(page)}")
    folder = research_pages.folder_of(args.out, name)
    paths.write_json(folder / "compare.json", found)
    print(f"\npage: {research_pages.write(folder, 'compare', page, panels)} (and .md, .png, .json)")
    if failed:
        raise SystemExit(f"without {', '.join(failed)}, which failed; the same command tries again")


def run_pairs(args):
    """The runs, and the tags of those that failed. What could not be compared afterwards is refused before."""
    axes = sweep.parse_axes(args.set)
    for flag, values in axes.items():
        if flag.replace("-", "_") in (*pairs.BESIDE, *pairs.VALIDATED_BY):
            raise ValueError(f"runs that differ in --{flag} cannot be compared by it")
        if len(values) < 2:
            raise ValueError(f"--set {flag}={values[0]}: give two values or more, the first to compare with")
    if sweep.as_dict(args.flags).get("eval_every", 1) <= 0:
        raise ValueError("--eval-every is needed: without bits per byte there is nothing to compare")
    runs = sweep.plan_runs(args.names[0], sweep.seed_axis(args.seeds, axes), [*BEFORE, *args.flags])
    failed = sweep.Driver(args.names[0], runs, args.nproc or sweep.processes_for(torch.cuda.device_count())).run()
    return args.names[0], runs, failed


def compare(name: str, tags: dict[str, str]):
    runs = []
    for tag, asked in tags.items():
        log = read_log(paths.results_dir(tag) / "base_train.jsonl")
        runs.append(pairs.trained(tag, asked, sweep.finished_json(tag), log))
    arms = pairs.arms(runs)
    found = [pairs.against(arms[0], arm) for arm in arms[1:]]
    notes = pairs.notes(runs)
    page, panels = pairs_page.pairs_page(name, found, arms, notes)
    return {"name": name, "runs": list(tags), "arms": found, "notes": notes}, page, panels


if __name__ == "__main__":
    main(parse_args())
