"""Models in and out.

python -m scripts.convert import PATH                  a run of the public nanochat, all stages: model, optimizer and
                                                       tokenizer; PATH holds base_checkpoints/ and tokenizer/
python -m scripts.convert import PATH                  a folder that export made
python -m scripts.convert export PATH -i sft -g d20    a Hugging Face style folder, for transformers and tokenizers

Nothing that is imported runs: pickles are read by an unpickler that admits a tiktoken encoding and nothing else.
"""

import argparse
from pathlib import Path

from nanochat import checkpoint, hf_folder, paths, public_run, runtime

STAGES = list(paths.CHECKPOINT_FOLDERS)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True, metavar="{import,export}")

    into = actions.add_parser("import", help="make a model of elsewhere ours")
    into.add_argument("path", type=Path)
    into.add_argument("-i", "--source", choices=STAGES, help="one stage of a public run (default: all that are there)")
    into.add_argument("-g", "--tag", help="of a public run: its model tag (default: the largest d<N>)")
    into.add_argument("-s", "--step", type=int, help="of a public run: the step (default: the newest)")
    into.add_argument("--model-tag", help="the model's name here (default: as it was)")
    into.add_argument("--tokenizer-name", help="the tokenizer's name here (default: climbmix-SIZE, or as it was)")
    into.add_argument("--force", action="store_true", help="in the place of what has this name")

    out = actions.add_parser("export", help="write a Hugging Face style folder")
    out.add_argument("path", type=Path)
    out.add_argument("-i", "--source", choices=STAGES, default="sft")
    out.add_argument("-g", "--model-tag", help="which model (default: the largest d<N>)")
    out.add_argument("-s", "--step", type=int, help="which checkpoint (default: the newest)")
    out.add_argument("--force", action="store_true", help="in the place of an older export")
    return parser.parse_args(argv)


def main(args):
    machine = runtime.start("cpu")
    try:
        (take_in if args.action == "import" else give_out)(args, machine)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    finally:
        runtime.close(machine)


def take_in(args, machine) -> None:
    if (args.path.expanduser() / "config.json").exists():
        if args.source or args.tag or args.step is not None:
            raise ValueError(f"{args.path} is an exported folder and holds one model: -i, -g and -s are of public runs")
        names = dict(tag=args.model_tag or "", tokenizer_name=args.tokenizer_name or "")
        hf_folder.import_folder(args.path, machine, **names, force=args.force)
        return
    stages = [args.source] if args.source else None
    how = (args.tokenizer_name, args.tag, args.step, stages, args.model_tag, args.force)
    for folder in public_run.import_run(args.path, *how):
        meta = checkpoint.read_meta(folder)
        print(
            f"{meta['stage']} model {meta['tag']}, step {meta['step']}, tokenizer {meta['tokenizer']['name']}: {folder}"
        )


def give_out(args, machine) -> None:
    folder = hf_folder.export(args.source, args.path, machine, args.model_tag, args.step, args.force)
    print(f'AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)')


if __name__ == "__main__":
    main(parse_args())
