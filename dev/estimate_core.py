"""CORE of models that were never examined by it, from the few of its tasks that were published of them.

python dev/estimate_core.py                                the GPT-3 family, from six tasks
python dev/estimate_core.py --tasks piqa                   from one task
python dev/estimate_core.py --search 2                     which two tasks tell the most
python dev/estimate_core.py --model-tags d12 d16 d20       your own examined models among those that are fitted

A straight line is fitted through CORE over the mean of some tasks' centered accuracies, for models of which both are
known: the GPT-2 family (nanochat/core_references.py), and your own (results/TAG/base_eval.json). How far each of them
lies from the line of the others says what an estimate is worth.
"""

import argparse
import itertools
from pathlib import Path

import numpy as np

from nanochat import laws, paths, research_pages, results
from nanochat.core_references import GPT2_CORE, GPT2_TASKS
from nanochat.report_charts import Axis, Line, tick
from nanochat.report_pages import Number, Page, Paragraph, Section, Side, Table
from nanochat.terminal import aligned

SHARED = ("hellaswag_zeroshot", "hellaswag", "lambada_openai", "piqa", "arc_easy", "arc_challenge")
GUESSING = {"lambada_openai": 0.0, "piqa": 0.5}  # a quarter elsewhere
# Accuracy in percent, arXiv 2005.14165, table H.1: few-shot where CORE shows examples, else without any. Parameters in
# millions, then SHARED in its order.
GPT3 = """
GPT-3 125M      125   33.7  33.5  42.7  64.3  42.7  25.5
GPT-3 350M      350   43.6  43.1  54.3  69.4  51.0  28.4
GPT-3 760M      760   51.0  51.3  60.4  72.0  58.1  32.3
GPT-3 1.3B     1300   54.7  54.9  63.6  74.3  59.1  36.7
GPT-3 2.7B     2700   62.8  62.9  67.1  75.4  62.1  39.5
GPT-3 6.7B     6700   67.4  67.3  70.3  77.8  65.8  43.7
GPT-3 13B     13000   70.9  71.3  72.5  79.9  69.1  44.8
GPT-3 175B   175000   78.9  79.3  76.2  82.3  70.1  51.5
"""


def gpt3() -> dict[str, dict[str, float]]:
    """Model -> task -> centered accuracy."""
    models = {}
    for line in GPT3.strip().splitlines():
        family, size, _, *values = line.split()
        guesses = [GUESSING.get(task, 0.25) for task in SHARED]
        centered = [(float(v) / 100 - guess) / (1 - guess) for v, guess in zip(values, guesses, strict=True)]
        models[f"{family} {size}"] = dict(zip(SHARED, centered, strict=True))
    return models


def examined(tags: list[str]) -> dict[str, tuple[float, dict[str, float]]]:
    """Model -> CORE and centered accuracy by task, of those of which both are known. Raises ValueError."""
    models = {name: (core, {task: GPT2_TASKS[task][name] for task in GPT2_TASKS}) for name, core in GPT2_CORE.items()}
    for tag in tags:
        core = (results.read(tag, "base_eval") or {}).get("core")
        if core is None:
            raise ValueError(f"{tag} has no CORE; examine it with: python -m scripts.base_eval --model-tag {tag}")
        if set(core["tasks"]) != set(GPT2_TASKS):
            raise ValueError(f"{tag} was examined by the bundle {core.get('bundle')}, which is not the published one")
        models[tag] = (core["metric"], {task: found["centered"] for task, found in core["tasks"].items()})
    return models


def fit(models: dict, tasks: tuple[str, ...]) -> dict:
    """The line through CORE over the mean of the tasks, and how far each model lies from the line of the others."""
    means = np.array([np.mean([by_task[task] for task in tasks]) for _, by_task in models.values()])
    cores = np.array([core for core, _ in models.values()])
    line = laws.straight(means, cores)
    misses = {}
    for i, name in enumerate(models):
        slope, height = np.polyfit(np.delete(means, i), np.delete(cores, i), 1)
        misses[name] = float(slope * means[i] + height - cores[i])
    root = float(np.sqrt(np.mean(np.square(list(misses.values())))))
    return {"tasks": list(tasks), "line": line, "means": dict(zip(models, map(float, means), strict=True)),
            "left_out": misses, "left_out_rms": root}  # fmt: skip


def search(models: dict, count: int, most: int = 12) -> list[dict]:
    """The sets of so many tasks whose line misses a model that it was not fitted to by the least."""
    found = [fit(models, tasks) for tasks in itertools.combinations(GPT2_TASKS, count)]
    return sorted(found, key=lambda one: one["left_out_rms"])[:most]


def estimates(found: dict) -> list[dict]:
    """Of the GPT-3 family, where the tasks are among those that are known of it."""
    if not set(found["tasks"]) <= set(SHARED):
        return []
    told = []
    for name, by_task in gpt3().items():
        mean = float(np.mean([by_task[task] for task in found["tasks"]]))
        told.append({"model": name, "mean": mean, **laws.predicted(found["line"], mean)})
    return told


def page_of(found: dict, models: dict) -> tuple[Page, list]:
    where = "estimate_core"
    known = [(found["means"][name], core) for name, (core, _) in models.items()]
    guessed = [(one["mean"], one["value"]) for one in found["estimates"]]
    ends = [min(x for x, _ in known + guessed), max(x for x, _ in known + guessed)]
    line = found["line"]
    lines = [
        Line("known", [x for x, _ in sorted(known)], [y for _, y in sorted(known)], "c1", where, joined=False),
        Line("line", ends, [line["slope"] * x + line["height"] for x in ends], "c4", where, fitted=True),
    ]
    legend: list = [
        ("c1", ("known",)),
        ("c4", (f"{line['slope']:.3f} x mean + {line['height']:.3f}, R² {line['r2']:.3f}",)),
    ]
    if guessed:
        bars = [(one["low"], one["high"]) for one in found["estimates"]]
        lines.append(Line("estimated", *map(list, zip(*guessed, strict=True)), "c3", where, joined=False, spans=bars))
        legend.append(("c3", ("GPT-3, estimated, 95 %",)))
    panel = research_pages.Panel(
        "CORE by the mean of " + ", ".join(found["tasks"]),
        lines,
        Axis("centered accuracy", tick, zero=False),
        Axis("CORE", tick),
        legend,
    )

    def cell(value, *place):
        return Number(value, f"{value:.4f}", f"{where} › {' › '.join(map(str, place))}")

    rows = [
        [
            name,
            cell(core, "known", name),
            cell(found["means"][name], "means", name),
            cell(found["left_out"][name], "left_out", name),
        ]
        for name, (core, _) in models.items()
    ]
    sections = [Section("Known models", [Table(["", "CORE", "mean of the tasks", "missed when left out"], rows)])]
    if guessed:
        rows = [
            [
                one["model"],
                cell(one["mean"], "estimates", i, "mean"),
                cell(one["value"], "estimates", i, "value"),
                f"{one['low']:.3f} to {one['high']:.3f}",
            ]
            for i, one in enumerate(found["estimates"])
        ]
        sections.append(Section("Estimates", [Table(["", "mean of the tasks", "CORE", "95 %"], rows)]))
        note = "Accuracies of GPT-3 are its paper's, by other prompts; the line is worth less the further above GPT-2."
        sections.append(Section("To know", [Paragraph((note,))]))
    sections.append(Section("Chart", [Side([panel.chart()])]))
    summary = (
        f"Estimated from {', '.join(found['tasks'])}. A model left out of the fit is missed by ",
        cell(found["left_out_rms"], "left_out_rms"),
        " in the mean (root of squares).",
    )
    return Page("CORE from a few tasks", summary, sections), [panel]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", default=",".join(SHARED), help="of CORE, joined by commas")
    parser.add_argument("--model-tags", nargs="+", default=[], metavar="TAG", help="your own, examined by base_eval")
    parser.add_argument("--search", type=int, metavar="N", help="list the sets of N tasks that tell the most")
    parser.add_argument("--out", type=Path, help="folder of the page and the picture (default: that of reports)")
    args = parser.parse_args(argv)
    args.tasks = tuple(task for task in args.tasks.split(",") if task)
    if unknown := sorted(set(args.tasks) - set(GPT2_TASKS)):
        parser.error(f"--tasks: {', '.join(unknown)} is none of CORE's: {', '.join(GPT2_TASKS)}")
    if args.search is not None and not 1 <= args.search <= 4:
        parser.error(f"--search is {args.search}; expected 1 to 4 tasks")
    return args


def main(args):
    try:
        models = examined(args.model_tags)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if args.search:
        found = search(models, args.search)
        rows = [[", ".join(one["tasks"]), f"{one['left_out_rms']:.4f}", f"{one['line']['r2']:.4f}"] for one in found]
        print(aligned([["tasks", "missed when left out", "R²"], *rows]))
        print(f"\nthe best of many sets on {len(models)} models: they look better than they are")
        return
    found = fit(models, args.tasks)
    found |= {"known": {name: core for name, (core, _) in models.items()}, "estimates": estimates(found)}
    page, panels = page_of(found, models)
    folder = args.out or paths.report_dir()
    paths.write_json(folder / "estimate_core.json", found)
    print(research_pages.plain(page))
    print(f"\npage: {research_pages.write(folder, 'estimate_core', page, panels)} (and .md, .png, .json)")


if __name__ == "__main__":
    main(parse_args())
