"""Many trainings of base_train, one after another; killed at any moment, the same command goes on.

python -m scripts.sweep mine --vary depth=12,14,16 -- --eval-every=250
python -m scripts.sweep laws --vary target-flops=1e18,2e18 --vary depth=8,10,12 --nproc 8 --then fit -- --fp8
"""

import argparse
import subprocess
import sys

import torch

from nanochat import sweep


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("name", help="of the sweep: its results are in sweeps/NAME, its models are NAME-d12 and so on")
    add(
        "--vary",
        action="append",
        default=[],
        metavar="FLAG=V1,V2",
        help="a flag of base_train and its values, on and off for one that has none; several times: every combination, "
        "the first flag slowest",
    )
    add("--seeds", type=int, default=1, help="every run with the seeds 1 to N, these slowest (1: base_train's own)")
    add("--nproc", type=int, help="processes under torchrun (default: by the number of GPUs; 1: without torchrun)")
    add("--drop-models", action="store_true", help="delete the checkpoints of a run once its numbers are in")
    add("--then", choices=("fit", "series"), help="in the end, what scripts.scaling makes of it")
    add("--dry-run", action="store_true", help="print the commands")
    args = sweep.parse(parser, argv)
    if not args.vary and args.seeds < 2:
        parser.error("nothing varies: give --vary FLAG=V1,V2, or --seeds 3")
    if args.seeds < 1 or (args.nproc is not None and args.nproc < 1):
        parser.error("--seeds and --nproc are 1 or more")
    return args


def main(args):
    nproc = args.nproc or sweep.processes_for(torch.cuda.device_count())
    try:
        axes = sweep.parse_axes(args.vary)
        runs = sweep.plan_runs(args.name, sweep.seed_axis(args.seeds, axes) if args.seeds > 1 else axes, args.flags)
        if args.dry_run:
            sweep.check_with_base_train(runs)
            print("\n".join(sweep.shown(run, nproc) for run in runs))
            return
        failed = sweep.Driver(args.name, runs, nproc, args.drop_models).run()
        print(
            f"\n{sweep.told(sweep.read_sweep(args.name)['runs'])}\n\nresults: {sweep.sweep_file(args.name)}", flush=True
        )
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if failed:
        raise SystemExit(f"{len(failed)} of {len(runs)} failed: {', '.join(failed)}; the same command tries them again")
    if args.then:
        raise SystemExit(subprocess.call([sys.executable, "-m", "scripts.scaling", args.then, args.name]))


if __name__ == "__main__":
    main(parse_args())
