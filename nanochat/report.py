"""The report card: `report.md` and `report.html`, one self-contained page, from the JSON that the stages left and from
nothing else.

    python -m nanochat.report generate [--model-tag TAG]
    python -m nanochat.report compare TAG TAG...
    python -m nanochat.report reset

The numbers that the report works out itself (code size, totals, costs) are kept as JSON too, in
`results/TAG/report.json`; the scores of a profile in `results/scores.json`.
"""

import argparse
import math
from pathlib import Path

from nanochat import paths
from nanochat.report_compare import compare
from nanochat.report_pages import Page, html, markdown
from nanochat.report_run import Run, choose_tag, scores
from nanochat.report_sections import report


def generate(tag: str | None = None, seconds: float | None = None, price: float | None = None) -> Path:
    """Writes report.md and report.html (into the report folder and the current one), report.json and scores.json;
    returns the HTML page.

    seconds: what the whole speedrun took; without it, the sum of the stages stands for it. price: dollars per hour of
    one device; without it, the table's.
    """
    run = Run(tag or choose_tag(), seconds, price)
    keep_what_was_worked_out(run)
    paths.write_json(paths.scores_file(), scores(run.tag, run.stages))
    return write(report(run), "report")


def generate_comparison(tags: list[str], price: float | None = None) -> Path:
    """Writes compare.md and compare.html, in the same two places; returns the HTML page."""
    runs = [Run(tag, price=price, one_of=len(tags)) for tag in tags]
    for run in runs:
        keep_what_was_worked_out(run)
    return write(compare(runs), "compare")


def keep_what_was_worked_out(run: Run) -> None:
    paths.write_json(paths.results_dir(run.tag) / "report.json", run.stages["report"])


def write(page: Page, name: str) -> Path:
    paths.report_dir().mkdir(parents=True, exist_ok=True)
    for suffix, text in (("md", markdown(page)), ("html", html(page))):
        for folder in (Path.cwd(), paths.report_dir()):
            (folder / f"{name}.{suffix}").write_text(text, encoding="utf-8")
    return paths.report_dir() / f"{name}.html"


def reset() -> int:
    """Removes the files of the report folder; the results they were made of stay."""
    files = [file for file in paths.report_dir().glob("*") if file.is_file()]
    for file in files:
        file.unlink()
    return len(files)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m nanochat.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("action", choices=("generate", "compare", "reset"))
    parser.add_argument("tags", nargs="*", metavar="TAG", help="compare: the models, two or more")
    parser.add_argument("--model-tag", help="which model (default: the largest d<N>, else the newest)")
    parser.add_argument("--seconds", type=float, help="what the whole speedrun took, start-up times included")
    parser.add_argument(
        "--price", type=float, help="dollars per hour of one device (default: a usual one, where known)"
    )
    args = parser.parse_args(argv)
    if args.action == "compare" and (len(args.tags) < 2 or len(set(args.tags)) < len(args.tags)):
        parser.error("compare takes two models or more, and each once: python -m nanochat.report compare d12 d16")
    if args.action != "compare" and args.tags:
        parser.error(f"{args.action} takes no {args.tags[0]!r}; a model is named by --model-tag")
    for name in ("price", "seconds"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            parser.error(f"--{name} is {value}; expected 0 or more")
    return args


def main(args):
    if args.action == "reset":
        print(f"{reset()} files removed from {paths.report_dir()}; results stay in {paths.results_dir('')}")
        return
    try:
        if args.action == "compare":
            path = generate_comparison(args.tags, args.price)
        else:
            path = generate(args.model_tag, args.seconds, args.price)
            print(f"scores: {paths.scores_file()}")
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    print(f"report: {path} (and ./{path.name}, ./{path.stem}.md)")


if __name__ == "__main__":
    main(parse_args())
