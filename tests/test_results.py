"""The sink of numbers: what machines read is whole, goes on where a run goes on, and no dashboard can stop a run."""

import json
import sys
import types
from pathlib import Path

import pytest
from helpers import CPU, rank_of, read_jsonl

from nanochat import paths, results
from nanochat.results import Results


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))


def log_file():
    return paths.results_dir("d2") / "base_train.jsonl"


def sink(**changes):
    return Results("base_train", "d2", CPU, **changes)


def test_every_step_is_a_line():
    one = sink()
    one.log(0, {"train/loss": 2.0})
    one.log(0, {"val/bpb": 1.5})
    assert read_jsonl(log_file()) == [{"step": 0, "train/loss": 2.0}, {"step": 0, "val/bpb": 1.5}]  # at once


def test_a_fresh_run_begins_a_fresh_log():
    sink().log(0, {"train/loss": 2.0})
    sink().log(0, {"train/loss": 3.0})
    assert read_jsonl(log_file()) == [{"step": 0, "train/loss": 3.0}]


def test_a_resumed_run_keeps_what_its_checkpoint_has_seen():
    """Bits per byte at the checkpoint's step came before it was saved; CORE and training come after."""
    one = sink()
    for step in range(6):
        if step % 2 == 0:
            one.log(step, {"val/bpb": step + 0.5})
        if step == 4:
            one.log(step, {"core_metric": 0.1})
        one.log(step, {"train/loss": float(step)})
    two = sink(resume_step=4, measured_at=4)
    kept = read_jsonl(log_file())
    assert [line["step"] for line in kept if "train/loss" in line] == [0, 1, 2, 3]
    assert [line["step"] for line in kept if "val/bpb" in line] == [0, 2, 4]
    assert kept[-1] == {"step": 4, "val/bpb": 4.5}
    two.log(4, {"train/loss": 9.0})
    assert read_jsonl(log_file())[len(kept) :] == [{"step": 4, "train/loss": 9.0}]


def test_lines_to_read_stand_beside_the_log_and_go_on_as_it_does():
    file = paths.results_dir("d2") / "base_train.answers.jsonl"
    one = sink(beside="answers")
    for step in range(4):
        one.log_beside(step, [{"said": f"é{step}"}, {"said": "no"}])
    assert len(read_jsonl(file)) == 8 and "é3" in file.read_text(encoding="utf-8")
    sink(beside="answers", resume_step=2)
    assert [line["step"] for line in read_jsonl(file)] == [0, 0, 1, 1]  # before anything is added
    sink(beside="answers")
    assert read_jsonl(file) == []


def test_what_was_logged_can_be_read_even_where_a_line_is_torn():
    one = sink()
    one.log(0, {"train/loss": 2.0})
    one.lines.write('{"step": 1, "tra\n')
    one.log(2, {"train/loss": 1.0})
    one.lines.write('{"step": 3}')
    assert one.logged() == [{"step": 0, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}]
    assert Results("base_train", "d2", rank_of(1, 2)).logged() == []


def test_a_resumed_run_without_a_log_begins_one():
    sink(resume_step=4).log(4, {"train/loss": 1.0})
    assert len(read_jsonl(log_file())) == 1


def test_the_summary_of_a_stage_is_written_whole_or_not_at_all(monkeypatch):
    one = sink(config={"depth": 2})
    one.finish({"final": {"step": 3}})
    assert [path.name for path in log_file().parent.iterdir() if path.suffix != ".jsonl"] == ["base_train.json"]
    seen, replace = [], Path.replace

    def watched(self, target):
        seen.append((json.loads(self.read_text()), json.loads(Path(target).read_text())))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    sink().finish({"final": {"step": 4}})
    ((new, old),) = seen  # a whole file took the place of a whole file
    assert (old["final"]["step"], new["final"]["step"]) == (3, 4)


def test_the_summary_says_who_made_it_and_where():
    one = sink(config={"depth": 2})
    one.finish({"final": {"step": 3, "note": "é"}})
    written = results.read("d2", "base_train")
    assert (written["stage"], written["tag"], written["config"]) == ("base_train", "d2", {"depth": 2})
    assert written["final"] == {"step": 3, "note": "é"}
    assert written["command"] and written["seconds"] >= 0 and written["started"].startswith("20")
    environment = {"git_commit", "nanochat", "torch", "python", "platform", "device", "world_size", "dtype"}
    assert environment <= written["environment"].keys()
    assert written["environment"]["dtype"] == "float32"


def test_a_stage_that_left_nothing_reads_as_none():
    assert results.read("d2", "chat_sft") is None


def test_only_the_first_rank_writes():
    other = Results("base_train", "d2", rank_of(1, 2), run="named")
    other.log(0, {"train/loss": 1.0})
    other.finish({"final": {}})
    assert not paths.results_dir("d2").exists()


# -- wandb


def fake_wandb(monkeypatch, **functions):
    module = types.ModuleType("wandb")
    module.api = types.SimpleNamespace(api_key="key")
    for name, function in functions.items():
        setattr(module, name, function)
    monkeypatch.setitem(sys.modules, "wandb", module)


def fail(*args, **kwargs):
    raise RuntimeError("no network\nand a long story")


def use(one):
    one.log(0, {"train/loss": 1.0})
    one.log(1, {"train/loss": 1.0})
    one.finish({"final": {"step": 2}})
    assert len(read_jsonl(log_file())) == 2
    assert results.read("d2", "base_train")["final"]["step"] == 2


def test_without_a_name_wandb_is_not_even_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would raise
    one = sink()
    assert one.wandb is None
    use(one)


def test_a_resumed_run_goes_on_in_the_same_wandb_run(monkeypatch):
    started = []

    def init(**how):
        started.append(how)
        return types.SimpleNamespace(id="abc123", log=lambda *args: None, finish=lambda: None)

    fake_wandb(monkeypatch, init=init)
    assert sink(run="named").wandb_id == "abc123"
    again = sink(run="named", resume_step=4, wandb_id="abc123")
    assert "id" not in started[0]
    assert (started[1]["id"], started[1]["resume"], again.wandb_id) == ("abc123", "allow", "abc123")
    assert sink().wandb_id is None


def test_a_log_that_cannot_be_written_costs_one_warning(capsys):
    class Full:
        name = "log.jsonl"

        def write(self, text):
            raise OSError(28, "No space left on device")

    one = sink()
    one.lines.close()
    one.lines = Full()
    for step in range(3):
        one.log(step, {"train/loss": 1.0})
    assert capsys.readouterr().out.count("WARNING") == 1


def test_a_wandb_that_is_not_installed_costs_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    use(sink(run="named"))
    assert capsys.readouterr().out.count("\n") == 1


def test_a_wandb_that_does_not_start_costs_one_line(monkeypatch, capsys):
    fake_wandb(monkeypatch, init=fail)
    use(sink(run="named"))
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "no network" in said


def test_a_wandb_that_fails_under_way_costs_one_line(monkeypatch, capsys):
    run = types.SimpleNamespace(log=fail, finish=fail)
    fake_wandb(monkeypatch, init=lambda **settings: run)
    use(sink(run="named"))
    assert capsys.readouterr().out.count("\n") == 1


def test_wandb_gets_what_the_log_gets(monkeypatch):
    logged, settings, ended = [], {}, []
    run = types.SimpleNamespace(log=logged.append, finish=lambda: ended.append(True))
    fake_wandb(monkeypatch, init=lambda **given: settings.update(given) or run)
    one = sink(run="named", config={"depth": 2}, project="nanochat-sft")
    use(one)
    assert logged == read_jsonl(log_file()) and ended == [True]
    assert (settings["name"], settings["project"], settings["config"]) == ("named", "nanochat-sft", {"depth": 2})


# -- clocks and lines


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.9, "1:15"), (3599, "59:59"), (3700, "1:01:40")])
def test_a_clock_reads_as_people_write_it(seconds, text):
    assert results.clock(seconds) == text


def test_a_live_line_speaks_now_and_then_and_at_the_end(capsys):
    line = results.LiveLine(CPU)
    line.terminal = False
    for step in range(5):
        line.show(f"step {step}", last=step == 4)
    assert capsys.readouterr().out == "step 0\nstep 4\n"
    quiet = results.LiveLine(rank_of(1, 2))
    quiet.show("step 0", last=True)
    assert capsys.readouterr().out == ""
