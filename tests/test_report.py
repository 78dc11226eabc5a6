"""The report is made of the stages' JSON and of nothing else: every number on it is found there; what is missing is
named; one file, which opens anywhere."""

import json
import math
import re
import shutil
from html.parser import HTMLParser

import pytest
from helpers import read_jsonl

from nanochat import paths, report, report_charts, report_pages, report_run, report_shapes
from nanochat.core_references import GPT2_CORE, GPT2_TASKS

ENVIRONMENT = {
    "git_commit": "abc1234", "nanochat": "0.1.0", "torch": "2.13.0", "python": "3.11.7", "platform": "Linux-6.1",
    "device": "NVIDIA H100 80GB HBM3", "world_size": 8, "dtype": "bfloat16",
}  # fmt: skip
HOSTILE = "</pre></div><script>window.hit=1</script>![x](http://example.com/x)\n# not a heading\r## nor this | ``` `"


def put(tag, stage, seconds, log=(), **values):
    folder = paths.results_dir(tag)
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "stage": stage, "tag": tag, "command": f"python -m scripts.{stage} --depth=4", "started": "2026-03-14T10:00:00",
        "seconds": seconds, "environment": ENVIRONMENT, "config": {},
    }  # fmt: skip
    (folder / f"{stage}.json").write_text(json.dumps(common | values))
    (folder / f"{stage}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))


def chat_task(accuracy, problems=200, baseline=0.0):
    return {"accuracy": accuracy, "problems": problems, "baseline": baseline, "seconds": 2.5}


def training_log(steps, tokens_a_step=1000):
    lines = []
    for step in range(steps):
        if step % 20 == 0:
            lines.append({"step": step, "val/bpb": 3 / (1 + step) + 0.7, "val/dt": 1.5})
        lines.append({
            "step": step, "train/loss": 8 / (1 + step) + 2.1, "train/step_loss": 8 / (1 + step) + 2.2, "train/lrm": 0.5,
            "train/momentum": 0.95, "train/weight_decay": 0.125, "train/dt": 0.25, "train/mfu": 0.4375,
            "train/tok_per_sec": 4321.0 + step, "total_training_time": max(0.0, 0.25 * (step - 9)),
        })  # fmt: skip
    return [*lines, {"step": steps, "val/bpb": 0.71875}]


def put_base(tag="d4", steps=77, depth=4, seconds=400.0, **config):
    put(
        tag, "base_train", seconds, training_log(steps), plan={"num_iterations": steps, "scaling_params": 98765,
        "flops_per_token": 592590, "total_batch_size": 1000}, corpus="tiny", tokenizer="tiny-4096",
        model={"config": {"n_layer": depth}, "counts": {"wte": 234567, "lm_head": 1000000, "total": 1234567}},
        final={"step": steps, "val_bpb": 0.71875, "tokens": steps * 1000, "tok_per_sec": 4321.0, "mfu": 0.4375,
               "total_training_time": 380.5, "total_training_flops": 4.5e13, "peak_memory_bytes": 61234567890},
        config={"seed": 42, "depth": depth, "matrix_lr": 0.02, **config},
    )  # fmt: skip


def put_core(tag="d4", published=True):
    tasks = GPT2_TASKS if published else ["my_task", "your_task"]
    rows = {
        task: {
            "accuracy": 0.4375,
            "centered": 0.25 - 0.02 * i,
            "baseline": 0.25,
            "examples": 64 + i,
            "seconds": 3.0 + i,
        }
        for i, task in enumerate(tasks)
    }
    core = {
        "metric": 0.28125, "interval": [0.15625, 0.40625], "tasks": rows, "bundle": "bundle" if published else "mine",
        "baselines": "eval_meta_data.csv",
    }  # fmt: skip
    if published:
        core |= {"references": GPT2_CORE, "references_by_task": GPT2_TASKS}
    samples = {"prompted": [{"prompt": "The sky is", "text": HOSTILE}], "unconditioned": ["free", HOSTILE]}
    put(tag, "base_eval", 60.0, bpb={"train": 1.1875, "val": 1.21875}, core=core, samples=samples)


def put_chat(tag="d4", source="sft", accuracy=0.875, chatcore=0.3125):
    tasks = {
        "facts_new_phrasing": chat_task(0.9375), "arithmetic": chat_task(accuracy), "known_refused": chat_task(0.0625),
        "ARC-Easy": chat_task(0.5, 100, 0.25),
    }  # fmt: skip
    answer = [
        {"type": "python", "text": "48/2"},
        {"type": "python_output", "text": "24"},
        {"type": "text", "text": HOSTILE},
    ]
    talks = [[{"role": "user", "content": f"question {source}"}, {"role": "assistant", "content": answer}]] * 8
    put(tag, f"chat_eval_{source}", 36.0, source=source, step=9, tasks=tasks, chatcore=chatcore, conversations=talks)
    problems = [
        {"task": "arithmetic", "index": i, "prompt": f"2+{i}?", "expected": str(2 + i), "answers": ["2"],
         "correct": i == 0, "said": [HOSTILE]}
        for i in range(4)
    ]  # fmt: skip
    listing = paths.results_dir(tag) / f"chat_eval_{source}.problems.jsonl"
    listing.write_text("".join(json.dumps(problem) + "\n" for problem in problems))


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def everything(base):
    put("tiny", "data", 5.0, corpus="tiny", source="generated by a test", licence="MIT")
    put("tiny-4096", "tok_train", 3.0, tokenizer="tiny-4096", vocab_size=4096, characters=123456, bytes_per_token=3.875)
    put("tiny-4096", "tokenize", 2.0, corpus="tiny")
    texts = {"news": {"bytes": 800, "tokens": {"ours": 200, "gpt2": 160}}}
    put("tiny-4096", "tok_eval", 1.0, encoders=["ours", "gpt2"], texts=texts)
    put_base()
    put_core()
    put_chat(source="base", accuracy=0.0625, chatcore=None)
    put("d4", "chat_sft", 100.0, training_log(30), final={"step": 30, "val_bpb": 0.5, "tokens": 30000}, rows=50,
        conversations=700)  # fmt: skip
    put_chat()
    examined = [{"step": 0, "pass@1": 0.25, "pass@8": 0.5}, {"step": 4, "pass@1": 0.75, "pass@8": 0.875}]
    course = [{"step": 1, "reward": 0.1875, "kl": 0.0}, {"step": 3, "reward": 0.5, "kl": 0.125}]
    log = [
        {"step": i, "reward": 0.1 * i, "entropy": 0.5 / (i + 1), "kl": 0.03 * i, "sequence_length": 9.5, "train/dt": 1}
        for i in range(5)
    ]
    put("d4", "chat_rl", 50.0, [*log, *examined], final={"step": 4, "reward": 0.5, "pass@1": 0.75, "pass@8": 0.875},
        examinations=examined, course=course)  # fmt: skip
    put_chat(source="rl", accuracy=0.9921875)
    return base


def generated():
    report.generate("d4")
    return (paths.report_dir() / "report.html").read_text(), (paths.report_dir() / "report.md").read_text()


# -- every number is found in the JSON


class Walk(HTMLParser):
    """numbers: (text, value, source) of each <data>; words: text outside of them, and of what models and shells wrote;
    lines: the sources of curves; points: what the points of charts say."""

    QUOTES = ("pre", "style", "svg", "title")

    def __init__(self, html):
        super().__init__()
        self.numbers, self.words, self.lines, self.points, self.links, self.tags = [], [], [], [], [], set()
        self.stack = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("href", "src", "action", "xlink:href")]
        if tag == "polyline":
            self.lines.append((found["data-from"], len(found["points"].split())))
        if tag in ("meta", "line", "circle", "rect", "polyline", "br"):
            if tag == "circle":
                self.stack.append(("circle", ""))
            return
        self.stack.append((tag, found.get("class", "")))
        if tag == "data":
            self.numbers.append(["", found["value"], found["title"]])

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "polyline"):
            self.stack.pop()

    def handle_data(self, text):
        inside = [tag for tag, _ in self.stack]
        classes = {name for _, names in self.stack for name in names.split()}
        if "circle" in inside:
            self.points.append(text)
        elif "data" in inside:
            self.numbers[-1][0] += text
        elif not set(inside) & set(self.QUOTES) and not classes & {"said", "turn", "asked", "long", "quoted"}:
            self.words.append(text)


def resolve(place):
    """The value at a number's source: file, then keys; of a log the last line that has the key."""
    stage, *keys = place.split(" › ")
    tag = "tiny" if stage == "data" else "tiny-4096" if stage.startswith("tok") else "d4"
    if paths.results_dir(stage).is_dir():  # whose it is comes first
        tag, stage, *keys = stage, *keys
    folder = paths.results_dir(tag)
    if stage.endswith(".jsonl"):
        log = report_run.read_log(folder / stage)
        return [line[keys[0]] for line in log if report_shapes.is_number(line.get(keys[0]))][-1]
    value = json.loads((folder / f"{stage}.json").read_text())
    for key in keys:
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value


def check_numbers(html):
    walk = Walk(html)
    assert len(walk.numbers) > 20
    for text, shown, place in walk.numbers:
        value = resolve(place)
        assert math.isclose(float(shown), value), (place, shown, value)
        assert text in [write(value) for write in report_run.FORMATS], (place, text, value)
    return walk


def test_every_number_on_the_page_is_found_in_a_stages_json(everything):
    html, _ = generated()
    walk = check_numbers(html)
    assert len(walk.numbers) > 200
    # what looks like a number and is none: it is a word of a name that stands in the JSON
    names = set()
    for file in paths.results_dir("").rglob("*.json"):
        names |= set(re.split(r"[\s\"()/,]+", file.read_text()))
    for words in walk.words:
        for word in re.split(r"[\s()/,;]+", words):
            if re.search(r"\d", word):
                assert word.strip(".:") in names or word in ("95", "GPT-2", "GPT-4", "GPT-2's", "GPT-4's"), words


def test_the_markdown_has_the_numbers_of_the_page(everything):
    html, text = generated()
    shown = {number for number, _, _ in Walk(html).numbers}
    quoted = re.sub(r"(?m)^    .*$|`[^`]+`|``+ .* ``+", "", text)
    for number in re.findall(r"(?<![\w.\-@:])\$?\d[\d,]*\.\d+(?![\w.\-])", quoted):
        assert any(number in one for one in shown) or f"a guess: {number} %" in html, number


def test_curves_are_of_the_logs_and_points_say_what_was_logged(everything):
    walk = Walk(generated()[0])
    assert {"base_train.jsonl › train/loss", "base_train.jsonl › val/bpb", "base_train.jsonl › train/mfu",
            "base_train.jsonl › train/momentum", "chat_sft.jsonl › train/loss", "chat_rl.jsonl › reward",
            "chat_rl.jsonl › pass@8"} <= {place for place, _ in walk.lines}  # fmt: skip
    for place, count in walk.lines:
        stage, key = place.split(" › ")
        logged = [line for line in read_jsonl(paths.results_dir("d4") / stage) if line.get(key) is not None]
        assert 2 <= count <= len(logged)
    bpb = [line["val/bpb"] for line in read_jsonl(paths.results_dir("d4") / "base_train.jsonl") if "val/bpb" in line]
    shown = [text for text in walk.points if text.startswith("bits per byte")]
    assert len(shown) >= len(bpb) - 1
    for value, text in zip(bpb[1:], shown, strict=False):  # the first is far above
        assert text.startswith(f"bits per byte {value:.4g} at ")


def test_nothing_is_fetched_and_nothing_runs(everything):
    html, _ = generated()
    walk = Walk(html)
    assert not walk.tags & {"script", "link", "img", "iframe", "object", "embed", "form", "base"}
    assert all(link.startswith("#") for link in walk.links)
    assert "default-src 'none'" in html and "@import" not in html and "url(" not in html
    assert len(html) < 3e6


def test_a_long_run_makes_a_page_of_bounded_size(everything):
    put_base(steps=6000)
    html, _ = generated()
    assert len(html) < 1e6
    assert max(count for _, count in Walk(html).lines) <= report_charts.MOST


def test_all_that_a_person_wants_to_see_is_there(everything):
    html, text = generated()
    for page in (html, text):
        for words in (
            "1.23 million", "no different from GPT-2 1.6B", "0.2812", "0.1562", "99.2 %", "question sft", "48/2",
            "abc1234", "In ",
            "4.00", "5.00", "python -m scripts.base_train --depth=4", "12 min 04 s", "$", "generated by a test",
            "Muon momentum", "pass@8", "61.23 GB", "known_refused (fewer is better)", "2+0?",
        ):  # fmt: skip
            assert words in page, words
    titles = ("In short", "What it says", "Chat tasks by stage", "Pretraining", "CORE by task", "Fine-tuning (SFT)",
              "Reinforcement learning (RL)", "Tokenizer", "Time and cost", "Problems and answers",
              "Environment and reproduction")  # fmt: skip
    assert [title for title in titles if f"\n## {title}\n" not in text or f"<h2>{title}</h2>" not in html] == []
    assert "Missing" not in text and "Not there" not in text


def test_what_a_model_wrote_stays_text(everything):
    html, text = generated()
    assert "<script>" not in html and "</pre></div><script" not in html
    assert "\n# not a heading" not in text and "\n## nor this" not in text
    outside = [line for line in text.splitlines() if "![x]" in line and not line.startswith("    ")]
    assert outside and all(re.search(r"`{2,} [^\n]*!\[x\]", line) for line in outside)  # in code spans only


def test_of_each_task_one_right_and_one_wrong_answer_are_shown(everything):
    text = generated()[1]
    assert "2+0?" in text and "2+1?" in text and "2+2?" not in text


def test_the_page_is_written_where_one_is_and_into_the_report_folder(everything):
    path = report.generate("d4")
    assert path == paths.report_dir() / "report.html"
    for name in ("report.html", "report.md"):
        assert (everything / "here" / name).read_text() == (paths.report_dir() / name).read_text()


# -- what is worked out


def test_scores_are_fractions_by_name_and_absent_ones_are_left_out(everything):
    report.generate("d4")
    assert json.loads(paths.scores_file().read_text()) == {
        "tag": "d4", "facts_new_phrasing": 0.9375, "arithmetic": 0.9921875, "known_refused": 0.0625, "bpb": 1.21875,
        "seconds": 724.0,
    }  # fmt: skip


def test_the_mean_of_the_chat_tasks_is_of_those_that_all_stages_took_and_that_should_be_high(everything):
    report.generate("d4")
    worked_out = json.loads((paths.results_dir("d4") / "report.json").read_text())
    assert worked_out["mean_chat_accuracy"]["sft"] == pytest.approx((0.9375 + 0.875 + 0.5) / 3)
    base = paths.results_dir("d4") / "chat_eval_base.json"
    taken = json.loads(base.read_text())
    del taken["tasks"]["arithmetic"]
    base.write_text(json.dumps(taken))
    report.generate("d4")
    again = json.loads((paths.results_dir("d4") / "report.json").read_text())
    assert again["mean_chat_accuracy"] == dict.fromkeys(("base", "sft", "rl"), pytest.approx((0.9375 + 0.5) / 2))
    assert worked_out["metrics"]["arithmetic"] == {"base": 0.0625, "sft": 0.875, "rl": 0.9921875}


def test_cost_is_hours_of_all_devices_at_a_price(everything):
    report.generate("d4", seconds=7200, price=2.5)
    worked_out = json.loads((paths.results_dir("d4") / "report.json").read_text())
    assert worked_out["cost"]["dollars"] == 2 * 8 * 2.5 and worked_out["total_seconds"] == 7200
    assert worked_out["cost"]["dollars_by_stage"]["base_train"] == pytest.approx(400 / 3600 * 8 * 2.5)
    assert worked_out["between_seconds"] == pytest.approx(7200 - 724)


def test_a_machine_without_a_price_says_so(everything, monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "device", "cpu (2 threads)")
    put_base()
    html, text = generated()
    assert "No price is known for this machine" in text and "$" not in html.replace("$$", "")


def test_another_bundle_is_not_compared_with_gpt2(everything):
    put_core(published=False)
    html, text = generated()
    check_numbers(html)
    assert "says nothing about GPT-2" in text and "GPT-2 1.6B" not in text


# -- what is missing


def test_missing_stages_are_named_with_the_command_that_makes_them(base):
    put("d2", "base_train", 10.0, final={"val_bpb": 2.5})
    report.generate()
    text = (paths.report_dir() / "report.md").read_text()
    assert "Missing stages: tok_train, tok_eval, base_eval, chat_sft, chat_eval_sft." in text
    assert "python -m scripts.chat_sft --model-tag d2" in text
    assert "Not part of this run" in text
    assert json.loads(paths.scores_file().read_text()) == {"tag": "d2", "bpb": 2.5, "seconds": 10.0}


def test_a_run_that_ended_early_says_so(everything):
    put("d4", "base_train", 10.0, training_log(20), plan={"num_iterations": 500}, final={"step": 20, "tokens": 20000})
    assert "Ended after 20 of 500 steps" in generated()[1]


@pytest.mark.parametrize(
    ("stage", "text", "said"),
    [
        ("chat_eval_sft", "{nope", "Expecting property name"),
        ("base_eval", "[]", "not parts by name"),
        (
            "chat_eval_sft",
            '{"seconds": 1, "tasks": {"a": {"accuracy": "x"}}}',
            "tasks › a › accuracy is 'x', not a number",
        ),
        ("base_train", '{"seconds": null}', "seconds is missing"),
        ("tok_eval", '{"seconds": 1, "encoders": ["ours"]}', "texts is missing"),
    ],
)
def test_a_damaged_file_counts_as_missing_and_the_page_says_why(everything, stage, text, said):
    folder = paths.results_dir("tiny-4096" if stage.startswith("tok") else "d4")
    (folder / f"{stage}.json").write_text(text)
    page = generated()[1]
    assert (
        f"{stage}.json is damaged: " in page
        and said in page
        and stage in page[page.index("Missing stages: ") :].splitlines()[0]
    )


def test_a_run_of_which_all_files_are_damaged_is_one_line(base):
    put("d4", "base_train", 1.0)
    (paths.results_dir("d4") / "base_train.json").write_text("{")
    with pytest.raises(SystemExit, match="base_train.json is damaged"):
        report.main(report.parse_args(["generate", "--model-tag", "d4"]))


def test_what_the_whole_speedrun_took_stays_known_until_a_stage_is_done_again(everything):
    def total():
        return json.loads((paths.results_dir("d4") / "report.json").read_text())["total_seconds"]

    report.generate("d4", seconds=7200, price=2.5)
    generated()
    assert total() == 7200 and "$40.00" in generated()[1]
    put_base("other")
    report.main(report.parse_args(["compare", "d4", "other"]))
    assert total() == 7200
    put_base(seconds=500.0)
    generated()
    assert total() == 824


def test_a_torn_line_and_a_loss_that_is_no_number_are_left_out(everything):
    log = paths.results_dir("d4") / "base_train.jsonl"
    with open(log, "a") as file:
        file.write('{"step": 78, "train/loss": NaN, "train/dt": 1}\n{"step": 79, "train/lo')
    check_numbers(generated()[0])


def test_without_a_tag_the_largest_depth_is_reported(base):
    for tag in ("d2", "d10", "mine"):
        put(tag, "base_train", 10.0)
    assert report_run.choose_tag() == "d10"


def test_no_results_or_an_unknown_tag_is_one_line(base, capsys):
    with pytest.raises(SystemExit, match="no results"):
        report.main(report.parse_args(["generate"]))
    with pytest.raises(SystemExit, match="'d7'.*--model-tag"):
        report.main(report.parse_args(["generate", "--model-tag", "d7"]))
    with pytest.raises(SystemExit):
        report.parse_args(["compare", "d7", "d7"])
    assert "two models or more" in capsys.readouterr().err


def test_reset_removes_the_report_and_keeps_the_results(everything, capsys):
    report.main(report.parse_args(["generate"]))
    assert str(paths.report_dir() / "report.html") in capsys.readouterr().out.splitlines()[-1]
    report.main(report.parse_args(["reset"]))
    assert not (paths.report_dir() / "report.md").exists() and not (paths.report_dir() / "report.html").exists()
    assert (paths.results_dir("d4") / "base_train.json").exists()
    report.main(report.parse_args(["reset"]))  # nothing there: no error


# -- several runs


def test_runs_stand_side_by_side_with_what_differs_and_whose_each_number_is(everything):
    put_base("other", steps=60, depth=6, matrix_lr=0.03)
    report.main(report.parse_args(["compare", "d4", "other"]))
    html, text = ((paths.report_dir() / f"compare.{kind}").read_text() for kind in ("html", "md"))
    walk = check_numbers(html)
    assert {place.split(" › ")[0] for _, _, place in walk.numbers} == {"d4", "other"}
    assert "| base_train --matrix-lr | 0.0200 | 0.0300 |" in text and "--seed" not in text
    assert "Not there: other: Evaluation of the base model" in text
    assert {"d4 › base_train.jsonl › val/bpb", "other › base_train.jsonl › val/bpb"} <= {
        place for place, _ in walk.lines
    }
    assert (everything / "here" / "compare.html").exists()


def test_core_of_different_bundles_is_not_put_side_by_side(everything):
    put_base("other")
    put_core("other", published=False)
    report.main(report.parse_args(["compare", "d4", "other"]))
    assert "Different bundles" in (paths.report_dir() / "compare.md").read_text()


# -- charts


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.331, 0.5), (-3, 7000), (1e-9, 2e-9), (5, 5), (0, 5.8e9)])
def test_marks_of_an_axis_are_round_and_inside(low, high):
    found = report_charts.ticks(low, high)
    assert 1 <= len(found) <= 6 and all(low <= value <= high * (1 + 1e-9) for value in found)
    if high > low:
        assert len(found) >= 2 and len({round(b - a, 12) for a, b in zip(found, found[1:], strict=False)}) == 1


def test_thinning_keeps_the_ends_and_makes_up_nothing():
    xs = list(range(5000))
    points = report_charts.thinned(xs, [x * x for x in xs], 600)
    assert len(points) == 600 and points[0] == (0, 0) and points[-1] == (4999, 4999**2)
    assert all(y == x * x for x, y in points)


def test_curves_stay_inside_the_plot_whatever_they_are():
    axis = report_charts.Axis("x", report_charts.tick)
    for ys in ([1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [-5.0, 3.0, 1e9], [1e-12, 2e-12, 3e-12]):
        svg = report_charts.curves("t", [report_charts.Line("a", [0, 1, 2], ys, "c1")], axis, axis)
        assert "nan" not in svg and "inf" not in svg.replace("Infinity", "")


def test_a_page_holds_only_what_it_knows():
    page = report_pages.Page("t", (), [report_pages.Section("s", [object()])])
    for write in (report_pages.html, report_pages.markdown):
        with pytest.raises(TypeError, match="cannot hold"):
            write(page)


# -- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize("page_name", ["report", "compare"])
def test_the_page_fits_a_phone_and_a_screen_offline(everything, page_name):
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    put_base("other", steps=60, depth=6)
    report.generate("d4")
    report.main(report.parse_args(["compare", "d4", "other"]))
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        for width in (360, 1200):
            context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
            page, said = context.new_page(), []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.goto((paths.report_dir() / f"{page_name}.html").as_uri())
            for details in page.locator("summary").all():
                details.click()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("window.hit") is None and said == []
            assert page.locator("svg.chart").first.bounding_box()["width"] > 200
            colours = set()
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert len(colours) == 2
            context.close()
        browser.close()
