"""The report is made of the stages' JSON and of nothing else; what is missing is named."""

import json

import pytest

from nanochat import paths, report

ENVIRONMENT = {
    "git_commit": "abc1234", "nanochat": "0.1.0", "torch": "2.13.0", "python": "3.11", "platform": "Linux",
    "device": "cpu (2 threads)", "world_size": 1, "dtype": "float32",
}  # fmt: skip


def put(tag, stage, seconds, **values):
    folder = paths.results_dir(tag)
    folder.mkdir(parents=True, exist_ok=True)
    common = {
        "stage": stage, "tag": tag, "command": f"python -m {stage}", "started": "2026-03-14 10:00:00",
        "seconds": seconds, "environment": ENVIRONMENT, "config": {},
    }  # fmt: skip
    (folder / f"{stage}.json").write_text(json.dumps(common | values))


def chat_task(accuracy, problems=200, baseline=0.0):
    return {"accuracy": accuracy, "problems": problems, "baseline": baseline, "seconds": 2.5}


@pytest.fixture
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.fixture
def everything(base):
    put("tiny-4096", "tok_train", 3.0, tokenizer="tiny-4096", vocab_size=4096, characters=123456, bytes_per_token=3.875)
    texts = {"news": {"bytes": 800, "tokens": {"ours": 200, "gpt2": 160}}}
    put("tiny-4096", "tok_eval", 1.0, encoders=["ours", "gpt2"], texts=texts)
    put(
        "d4", "base_train", 400.0, plan={"num_iterations": 77}, corpus="tiny",
        model={"config": {"n_layer": 4}, "counts": {"total": 1234567}},
        tokenizer={"name": "tiny-4096", "fingerprint": "f"},
        final={"step": 77, "val_bpb": 1.25, "tokens": 999000, "tok_per_sec": 4321.0},
    )  # fmt: skip
    row = {"accuracy": 0.4375, "centered": 0.25, "baseline": 0.25, "examples": 64, "seconds": 3.0}
    put(
        "d4", "base_eval", 60.0, bpb={"train": 1.1875, "val": 1.21875},
        core={
            "metric": 0.28125, "interval": [0.15625, 0.40625], "tasks": {"my_task": row}, "bundle": "b",
            "baselines": "eval_meta_data.csv",
        },
        samples={
            "prompted": [{"prompt": "The sky is", "text": " blue\n# not a heading\r# nor this"}],
            "unconditioned": ["free"],
        },
    )  # fmt: skip
    put("d4", "chat_sft", 100.0, final={"step": 9, "val_bpb": 0.5}, rows=50, conversations=700)
    tasks = {
        "facts_new_phrasing": chat_task(0.9375),
        "arithmetic": chat_task(0.875),
        "ARC-Easy": chat_task(0.5, 100, 0.25),
    }
    put("d4", "chat_eval_sft", 36.0, source="sft", step=9, tasks=tasks, chatcore=0.3125)
    problems = [
        {
            "task": "arithmetic",
            "index": i,
            "prompt": f"2+{i}?",
            "expected": str(2 + i),
            "answers": ["2"],
            "correct": i == 0,
        }
        for i in range(4)
    ]
    listing = paths.results_dir("d4") / "chat_eval_sft.problems.jsonl"
    listing.write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return base


def test_every_stage_is_in_the_report_with_its_numbers(everything):
    path = report.generate("d4")
    text = path.read_text()
    assert path == paths.report_dir() / "report.md"
    assert (everything / "here" / "report.md").read_text() == text
    for value in (
        "123,456",
        "3.8750",
        "4.00",
        "5.00",
        "1,234,567",
        "1.1875",
        "1.2188",
        "0.2812",
        "0.9375",
        "0.3125",
        "0.1562 to 0.4062",
    ):
        assert value in text, value
    titles = (
        "Environment", "Size of the code", "Tokenizer: training", "Tokenizer: evaluation", "Base model: training",
        "Base model: evaluation", "Fine-tuning", "Chat evaluation", "Some problems", "Metrics by stage",
        "Wall-clock time",
    )  # fmt: skip
    for title in titles:
        assert f"\n## {title}" in text, title
    assert "10 min 00 s" in text  # 3 + 1 + 400 + 60 + 100 + 36
    assert "Missing" not in text
    assert "Reinforcement" not in text


def test_what_a_model_wrote_cannot_become_a_heading_or_a_cell(everything):
    text = report.generate("d4").read_text()
    assert "\n# not a heading" not in text
    assert "\n    # nor this" in text
    assert report.table(["a", "b"], [["x|y\nz", 1]]).endswith("| x\\|y z | 1 |")


def test_of_each_task_one_right_and_one_wrong_answer_are_shown(everything):
    text = report.generate("d4").read_text()
    assert "    2+0?" in text
    assert "    2+1?" in text
    assert "    2+2?" not in text


def test_scores_are_fractions_by_name_and_absent_ones_are_left_out(everything):
    report.generate("d4")
    assert json.loads(paths.scores_file().read_text()) == {
        "tag": "d4", "facts_new_phrasing": 0.9375, "arithmetic": 0.875, "bpb": 1.21875, "seconds": 600.0,
    }  # fmt: skip


def test_the_final_table_compares_the_stages(everything):
    examined = [{"step": 0, "pass@1": 0.25, "pass@2": 0.5}, {"step": 4, "pass@1": 0.75, "pass@2": 0.875}]
    course = [{"step": 1, "reward": 0.1875, "kl": 0.0}, {"step": 3, "reward": 0.5, "kl": 0.125}]
    put("d4", "chat_rl", 50.0, final={"step": 4, "reward": 0.5}, examinations=examined, course=course)
    put("d4", "chat_eval_rl", 10.0, source="rl", step=4, tasks={"arithmetic": chat_task(0.9921875)}, chatcore=None)
    text = report.generate("d4").read_text()
    assert "| metric | base | sft | rl |" in text
    assert "| arithmetic | - | 0.8750 | 0.9922 |" in text
    assert "| CORE | 0.2812 | - | - |" in text
    practised = text[text.index("## Reinforcement learning") : text.index("## Chat evaluation after RL")]
    assert "| step | pass@1 | pass@2 |" in practised and "| 4 | 0.7500 | 0.8750 |" in practised
    assert "| 3 | 0.5000 | 0.1250 |" in practised
    numbers = json.loads((paths.results_dir("d4") / "report.json").read_text())
    assert numbers["metrics"]["arithmetic"] == {"sft": 0.875, "rl": 0.9921875}
    assert numbers["total_seconds"] == 660.0
    assert json.loads(paths.scores_file().read_text())["arithmetic"] == 0.9921875


def test_missing_stages_are_named_with_the_command_that_makes_them(base):
    put("d2", "base_train", 10.0, final={"val_bpb": 2.5})
    text = report.generate().read_text()
    assert "Missing stages: tok_train, tok_eval, base_eval, chat_sft, chat_eval_sft." in text
    assert "python -m scripts.chat_sft --model-tag d2" in text
    assert json.loads(paths.scores_file().read_text()) == {"tag": "d2", "bpb": 2.5, "seconds": 10.0}


def test_without_a_tag_the_largest_depth_is_reported(base):
    for tag in ("d2", "d10", "mine"):
        put(tag, "base_train", 10.0)
    assert report.choose_tag() == "d10"


def test_no_results_or_an_unknown_tag_is_one_line(base):
    with pytest.raises(SystemExit, match="no results"):
        report.main(report.parse_args(["generate"]))
    with pytest.raises(SystemExit, match="'d7'.*--model-tag"):
        report.main(report.parse_args(["generate", "--model-tag", "d7"]))


def test_reset_removes_the_report_and_keeps_the_results(everything, capsys):
    report.main(report.parse_args(["generate"]))
    assert str(paths.report_dir() / "report.md") in capsys.readouterr().out.splitlines()[-1]
    report.main(report.parse_args(["reset"]))
    assert not (paths.report_dir() / "report.md").exists()
    assert (paths.results_dir("d4") / "base_train.json").exists()
    report.main(report.parse_args(["reset"]))  # nothing there: no error
