"""What a report says of a run, section by section."""

from nanochat import paths
from nanochat.report_pages import (
    Bar,
    Bars,
    Cards,
    Compared,
    Fold,
    Number,
    Page,
    Paragraph,
    Quoted,
    Section,
    Side,
    Table,
    Talk,
    Verbatim,
)
from nanochat.report_run import (
    COLOURS,
    COMMANDS,
    MISTAKES,
    OPTIONAL,
    SOURCES,
    TITLES,
    Run,
    dollars,
    duration,
    gigabytes,
    number,
    percent,
    rate,
    scientific,
    short,
    source,
    to_hundredths,
    words,
)
from nanochat.report_training import fine_tuning, practice, pretraining

EXCERPT = 400  # characters of a question or an answer that are shown
QUESTIONS = 7  # of the conversations of an examination, those that are one question each
GPT2 = "c4"  # the colour of what a model is compared with


def report(run: Run) -> Page:
    sections = [
        Section("In short", in_short(run)),
        Section("What it says", what_it_says(run)),
        Section("Chat tasks by stage", chat_tasks(run), "Chat tasks"),
        Section("Pretraining", pretraining(run)),
        Section("CORE by task", core(run), "CORE"),
        Section("Fine-tuning (SFT)", fine_tuning(run), "SFT"),
        Section("Reinforcement learning (RL)", practice(run), "RL"),
        Section("Tokenizer", tokenizer(run)),
        Section("Time and cost", time_and_cost(run)),
        Section("Problems and answers", problems(run), "Problems"),
        Section("Environment and reproduction", reproduction(run), "Reproduce"),
    ]
    return Page(f"nanochat report: {run.tag}", headline(run), [section for section in sections if section.blocks])


# --- the beginning


def headline(run: Run) -> tuple:
    """What was trained, on what, for how long, at what cost, and how it scores."""
    layers = run.number("base_train", "model", "config", "n_layer")
    parameters = run.number("base_train", "model", "counts", "total", show=short)
    tokens, corpus = run.number("base_train", "final", "tokens", show=short), run.get("base_train", "corpus")
    trained = run.number("base_train", "final", "total_training_time", show=duration)
    price = run.number("report", "cost", "dollars", show=dollars)
    said = []
    if parameters:
        said += [f"{run.tag} is a model of ", layers, " layers and ", parameters, " parameters. "]
    if tokens:
        said += ["It read ", tokens, f" tokens of {corpus or 'text'} on {where(run)}"]
        said += [" in ", trained, " of training. "] if trained else [". "]
    said += ["All stages took ", run.number("report", "total_seconds", show=duration)]
    said += [" and cost about ", price, ". "] if price else [". "]
    said += against_gpt2(run)
    if run.missing:
        said += [f" Missing stages: {', '.join(run.missing)}."]
    return tuple(said)


def where(run: Run) -> str:
    device = run.get("base_train", "environment", "device", default="an unknown device")
    ranks = run.get("base_train", "environment", "world_size", default=1)
    return f"{ranks} x {device}" if ranks > 1 else device


def against_gpt2(run: Run) -> tuple:
    """How CORE stands to the GPT-2 family, or that it cannot be compared."""
    metric, references = run.number("base_eval", "core", "metric"), run.get("base_eval", "core", "references")
    if metric is None:
        return ()
    if not references:
        bundle = run.get("base_eval", "core", "bundle")
        return ("CORE is ", metric, f" on a bundle of its own ({bundle}), which says nothing about GPT-2.")
    numbers = {name: run.number("base_eval", "core", "references", name) for name in references}
    low, high = (run.get("base_eval", "core", "interval", default=[]) + [metric.value] * 2)[:2]
    largest = max(numbers, key=lambda name: numbers[name].value)
    below = [name for name in numbers if numbers[name].value <= metric.value]
    if low <= numbers[largest].value <= high:
        return ("CORE is ", metric, f", within its 95 % interval no different from {largest} (", numbers[largest], ").")
    if metric.value > numbers[largest].value:
        return ("CORE is ", metric, f", above {largest} (", numbers[largest], ").")
    nearest = (
        max(below, key=lambda name: numbers[name].value) if below else min(numbers, key=lambda n: numbers[n].value)
    )
    relation = "above" if below else "below"
    return (
        *("CORE is ", metric, f", {relation} {nearest} (", numbers[nearest], f") and below {largest} ("),
        *(numbers[largest], ")."),
    )


def in_short(run: Run) -> list:
    def card(label, value, note=""):
        return [(label, value, note or "")] if value is not None else []

    bpb = run.number("report", "metrics", "bits per byte, validation", "base")
    cards = card("bits per byte", bpb, "of the base model, on held-out text")
    cards += card("CORE", run.number("base_eval", "core", "metric"), run.get("base_eval", "core", "bundle"))
    for name in run.examined:
        mean = run.number("report", "mean_chat_accuracy", name, show=percent)
        cards += card(f"chat, {SOURCES[name]}", mean, "right, mean of the tasks")
    for name in run.examined:
        cards += card(
            f"ChatCORE, {SOURCES[name]}", run.number(f"chat_eval_{name}", "chatcore"), "six tasks, above guessing"
        )
    cards += card("parameters", run.number("base_train", "model", "counts", "total", show=short))
    cards += card("tokens", run.number("base_train", "final", "tokens", show=short), "of pretraining")
    cards += card("FLOPs", run.number("base_train", "final", "total_training_flops", show=scientific), "of pretraining")
    cards += card("tokens a second", run.number("base_train", "final", "tok_per_sec", show=rate), "in pretraining")
    cards += card("MFU", run.number("base_train", "final", "mfu", show=percent), "of the GPU's peak FLOP/s")
    cards += card("memory", run.number("base_train", "final", "peak_memory_bytes", show=gigabytes), "in pretraining")
    cards += card("time", run.number("report", "total_seconds", show=duration), "all stages")
    cards += card("cost", run.number("report", "cost", "dollars", show=dollars), run.get("report", "cost", "price_of"))
    gone = [*run.missing, *(stage for stage in run.damaged if stage in OPTIONAL)]
    return [*gpt2_ladder(run), Cards(cards), *(Paragraph(missing(run, stage)) for stage in gone)]


def gpt2_ladder(run: Run) -> list:
    """CORE among the GPT-2 family."""
    references = run.get("base_eval", "core", "references")
    if not references:
        return []
    rungs = [(name, run.number("base_eval", "core", "references", name), GPT2) for name in references]
    rungs.append((run.tag, run.number("base_eval", "core", "metric"), "c1"))
    rungs.sort(key=lambda rung: rung[1].value)
    top = 1.1 * rungs[-1][1].value
    rows = [(name, [Bar("CORE", value, value.value / top, colour)], []) for name, value, colour in rungs]
    return [Bars(rows, [("c1", f"CORE of {run.tag}"), (GPT2, "of the GPT-2 family")])]


def missing(run: Run, stage: str) -> tuple:
    why = run.damaged.get(stage, f"{stage}.json")
    command = COMMANDS[stage].format(tag=run.tag)
    return (
        f"Not there: {TITLES[stage]} ({why}). It is made by {command}, with the flags of this run, or bash speedrun.sh",
    )


# --- what the models say


def what_it_says(run: Run) -> list:
    chats = {name: run.get(f"chat_eval_{name}", "conversations", default=[]) for name in ("sft", "rl")}
    newest = next((name for name in ("rl", "sft") if chats[name]), None)
    blocks = before_and_after(run, chats)
    if newest and len(chats[newest]) > QUESTIONS:
        text = (
            f"Whole conversations with the {SOURCES[newest]} model. What it asked a tool, and the answer, is set off."
        )
        blocks += [Paragraph((text,), quiet=True), Side([Talk(talk) for talk in chats[newest][QUESTIONS:]])]
    free = run.get("base_eval", "samples", "unconditioned")
    if free:
        blocks.append(Fold("Free text of the base model, without a prompt", [Verbatim(text) for text in free]))
    return blocks


def before_and_after(run: Run, chats: dict[str, list]) -> list:
    """What the base model makes of the beginnings of sentences, beside the answers of the chat models to the same."""
    base = run.get("base_eval", "samples", "prompted", default=[])
    columns = [("base goes on", COLOURS["base"])] if base else []
    columns += [(f"{SOURCES[name]} answers", COLOURS[name]) for name, talks in chats.items() if talks]
    rows = []
    for i in range(QUESTIONS):
        asked = [f"{one['prompt']} …" for one in base[i : i + 1]]
        answers = [one["text"].strip() for one in base[i : i + 1]]
        for talks in chats.values():
            for question, answer in (talk[:2] for talk in talks[i : i + 1] if len(talk) > 1):
                asked.append(str(question.get("content")))
                answers.append(answer.get("content") or "")
        if columns and len(answers) == len(columns):
            rows.append(("\n".join(dict.fromkeys(asked)), answers))
    text = "The base model goes on with the beginning of a sentence; the chat models are asked the same."
    return [Paragraph((text,), quiet=True), Compared(columns, rows)] if rows else []


# --- chat tasks


def chat_tasks(run: Run) -> list:
    if not run.examined:
        return []
    tasks = dict.fromkeys(task for name in run.examined for task in run.get(f"chat_eval_{name}", "tasks"))
    rows, lines = [], []
    for task in tasks:
        bars, marks, line = [], [], [task]
        for name in run.examined:
            at = (f"chat_eval_{name}", "tasks", task)
            accuracy, baseline = run.number(*at, "accuracy", show=percent), run.number(*at, "baseline", show=percent)
            line += [accuracy, run.number(*at, "problems"), run.number(*at, "seconds", show=duration)]
            if accuracy:
                bars.append(Bar(SOURCES[name], accuracy, accuracy.value, COLOURS[name]))
            if baseline and baseline.value:
                marks = [(f"a guess: {baseline}", baseline.value)]
            if passes := run.get(*at, "pass@k"):
                line[0] = f"{task} (pass@{list(passes)[-1]})"
        rows.append((task + (" (fewer is better)" if task in MISTAKES else ""), bars, marks))
        lines.append(line)
    chatcore = [[run.number(f"chat_eval_{name}", "chatcore"), None, None] for name in run.examined]
    if any(first for first, *_ in chatcore):
        lines.append(["ChatCORE", *(value for three in chatcore for value in three)])
    header = ["task", *(title for name in run.examined for title in (SOURCES[name], "problems", "time"))]
    guess = "a guess" if any(marks for _, _, marks in rows) else ""
    return [
        Paragraph(("Share of held-out problems answered right, after each stage.",), quiet=True),
        Bars(rows, [(COLOURS[name], SOURCES[name]) for name in run.examined], guess),
        Fold("As a table", [Table(header, lines)]),
    ]


def problems(run: Run) -> list:
    """Of each task one problem that went right and one that went wrong, as the newest stage answered."""
    name = next((name for name in ("rl", "sft") if run.has(f"chat_eval_{name}")), None)
    if not name:
        return []
    found = [one for one in run.problems(f"chat_eval_{name}") if one["task"] not in MISTAKES]
    if not found:
        file = paths.results_dir(run.tag) / f"chat_eval_{name}.problems.jsonl"
        return [Paragraph((f"Not there: {file.name}.",))]
    rows = []
    for one in found:
        answer = "\n".join(one.get("said", one["answers"])) or "(nothing)"
        verdict = "right" if one["correct"] else "wrong"
        rows.append([one["task"], verdict, cut(one["prompt"]), cut(answer), cut(one["expected"])])
    text = f"Of each task the first problem that the {SOURCES[name]} model got right, and the first that it got wrong."
    return [Paragraph((text,), quiet=True), Table(["task", "", "question", "answer", "expected"], rows)]


def cut(text: str) -> Quoted:
    return Quoted(text if len(text) <= EXCERPT else text[:EXCERPT] + " […]")


# --- evaluation of the base model


def core(run: Run) -> list:
    found = run.get("base_eval", "core")
    if not found:
        return bits_per_byte(run)
    references = found.get("references_by_task", {})
    models = list(next(iter(references.values()), {}))
    rows = []
    for task in sorted(found["tasks"], key=lambda task: -found["tasks"][task]["centered"]):
        value = run.number("base_eval", "core", "tasks", task, "centered")
        bars = [Bar(run.tag, value, value.value, "c1")]
        if task in references:
            largest = run.number("base_eval", "core", "references_by_task", task, models[-1])
            bars.append(Bar(models[-1], largest, largest.value, GPT2))
        rows.append((task, bars, []))
    said = ["Accuracy above guessing: an empty bar is what a random answer gets, a full one is perfect. "]
    said += ["CORE, their mean, is ", run.number("base_eval", "core", "metric")]
    if found.get("interval"):
        low, high = (
            Number(value, number(value), source("base_eval", "core", "interval", i))
            for i, value in enumerate(found["interval"])
        )
        said += [" (95 % interval ", low, " to ", high, ")"]
    said.append(f". Bundle {found['bundle']}, baselines of {found['baselines']}.")
    for name in list(found.get("references", {}))[-1:]:
        above, tasks = run.number("report", "tasks_above", name), run.number("report", "num_tasks")
        said += [" In ", above, " of its ", tasks, f" tasks this model is above {name}."]
    if not references:
        said.append(" What GPT-2 gets is known for the published bundle only.")
    columns = ("accuracy", "baseline", "centered", "examples")
    lines = []
    for task in found["tasks"]:
        at = ("base_eval", "core", "tasks", task)
        gpt2 = [run.number("base_eval", "core", "references_by_task", task, model) for model in models]
        seconds = run.number(*at, "seconds", show=duration)
        lines.append([task, *(run.number(*at, column) for column in columns), seconds, *gpt2])
    legend = [("c1", run.tag)] + ([(GPT2, models[-1])] if models else [])
    return [
        Paragraph(tuple(said), quiet=True),
        Bars(rows, legend),
        *bits_per_byte(run),
        Fold("As a table", [Table(["task", *columns, "time", *models], lines)]),
    ]


def bits_per_byte(run: Run) -> list:
    parts = [
        part
        for name in run.get("base_eval", "bpb", default=())
        for part in (name, run.number("base_eval", "bpb", name))
    ]
    spaced = [word for part in parts for word in (part, " " if isinstance(part, str) else ", ")]
    return [Paragraph(("Bits per byte: ", *spaced[:-1], "."), quiet=True)] if parts else []


# --- tokenizer


def tokenizer(run: Run) -> list:
    blocks = []
    if run.has("tok_train"):
        said = ["Vocabulary ", run.number("tok_train", "vocab_size"), ", trained on "]
        said += [run.number("tok_train", "characters", show=short), " characters in "]
        said += [run.number("tok_train", "seconds", show=duration), "; "]
        said += [run.number("tok_train", "bytes_per_token", show=to_hundredths), " bytes a token."]
        blocks.append(Paragraph(tuple(said)))
    if run.has("tok_eval"):
        encoders = run.get("tok_eval", "encoders", default=[])
        rows = []
        for text in run.get("tok_eval", "texts", default={}):
            row = [text, run.number("tok_eval", "texts", text, "bytes")]
            for name in encoders:
                row.append(run.number("tok_eval", "texts", text, "tokens", name))
                row.append(run.number("report", "bytes_per_token", text, name, show=to_hundredths))
            rows.append(row)
        header = ["text", "bytes", *(title for name in encoders for title in (f"{name}: tokens", "bytes each"))]
        blocks.append(Table(header, rows))
        if len(encoders) == 1:
            blocks.append(Paragraph(("GPT-2's and GPT-4's encodings could not be loaded there.",), quiet=True))
    return blocks


# --- time, cost, environment


def time_and_cost(run: Run) -> list:
    total = run.number("report", "total_seconds", show=duration)
    price = run.number("report", "cost", "dollars_per_device_hour", show=dollars)
    rows, lines = [], []
    for stage in run.get("report", "seconds"):
        seconds = run.number("report", "seconds", stage, show=duration)
        spent = run.number("report", "cost", "dollars_by_stage", stage, show=dollars)
        rows.append((TITLES[stage], [Bar("time", seconds, share(seconds, total), "c1")], []))
        lines.append([TITLES[stage], run.get(stage, "started", default="-"), seconds, spent])
    between = run.number("report", "between_seconds", show=duration)
    if between:
        rows.append(("data, starting up", [Bar("time", between, share(between, total), "c4")], []))
        lines.append(["data, starting up", "", between, None])
    lines.append(["total", "", total, run.number("report", "cost", "dollars", show=dollars)])
    if price:
        devices = run.number("report", "cost", "devices")
        said = (
            "At ",
            price,
            " per hour and device (",
            run.get("report", "cost", "price_of"),
            "), ",
            devices,
            " of them.",
        )
    else:
        said = ("No price is known for this machine; --price gives one, in dollars per hour and device.",)
    rehearsed = run.number("rehearsal", "forecast", show=duration)
    if rehearsed:
        said += (" The rehearsal had forecast ", rehearsed, ".")
    header = ["stage", "started", "time", "dollars"]
    table = Table(header, lines) if price else Table(header[:-1], [line[:-1] for line in lines])
    return [Bars(rows), Paragraph(said, quiet=True), Fold("As a table", [table])]


def share(part: Number, whole: Number) -> float:
    return part.value / whole.value if whole.value else 0.0


def reproduction(run: Run) -> list:
    keys = ("git_commit", "nanochat", "device", "dtype", "torch", "python", "platform")
    stages = [stage for stage in TITLES if run.has(stage)]
    values = {key: [run.get(stage, "environment", key) for stage in stages] for key in keys}
    same = [f"{words(key)} {found[0]}" for key, found in values.items() if found[0] and len(set(found)) == 1]
    differing = [key for key, found in values.items() if len(set(found)) > 1]
    rows = []
    for i, stage in enumerate(stages):
        ranks = run.number(stage, "environment", "world_size")
        rows.append([stage, run.get(stage, "started"), ranks, *(values[key][i] for key in differing)])
    commands = "\n".join(run.get(stage, "command", default="") for stage in stages)
    seed = run.number("base_train", "config", "seed")
    size = run.number("report", "code", "lines"), run.number("report", "code", "files")
    counted = run.get("report", "code", "counted_by")
    code = ("Code: ", size[0], " lines in ", size[1], f" Python files ({counted}).")
    code += (" Seed of the first weights: ", seed, ".") if seed else ()
    corpus = f"Text: {run.get('data', 'corpus')}, {run.get('data', 'source', default='')}."
    corpus += f" Licence: {run.get('data', 'licence')}."
    blocks = [
        *([Paragraph((corpus,))] if run.has("data") else []),
        Verbatim(commands, "Every command"),
        Paragraph((f"The same in all stages: {', '.join(same)}." if same else "",)),
        Table(["stage", "started", "ranks", *map(words, differing)], rows),
        Paragraph(code, quiet=True),
    ]
    left = [TITLES[stage] for stage in OPTIONAL if not run.has(stage)]
    return blocks + ([Paragraph((f"Not part of this run: {', '.join(left)}.",), quiet=True)] if left else [])
