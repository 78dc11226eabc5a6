"""Sweeps: every combination once, killed anywhere and gone on with, read from JSON alone."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import BASE, REPOSITORY, make_world, one_thread

from nanochat import checkpoint, laws, paths, results, sweep
from nanochat.core_references import GPT2_CORE
from scripts import scaling
from scripts import sweep as script

# Stands for base_train: leaves what it leaves. A run whose --depth is listed in `fails` fails after its first step, in
# `refuses` before it; in `slow` it sleeps until a signal comes, on which it saves and ends as the trainings do.
TRAINER = """
import json, os, shlex, signal, sys, time
from pathlib import Path
base = Path(os.environ["NANOCHAT_BASE_DIR"])
flags = dict(flag[2:].split("=") if "=" in flag else (flag[2:], "1") for flag in sys.argv[1:])
behaviour = json.loads((base / "behaviour.json").read_text())
folder = base / "results" / flags["model-tag"]
with open(base / "calls", "a") as calls:
    calls.write(flags["model-tag"] + "\\n")
depth, flops = int(flags["depth"]), float(flags.get("target-flops", 1000))
if depth in behaviour.get("refuses", []):
    sys.exit(1)
import fcntl
lock = open(base / "base_checkpoints" / f".{flags['model-tag']}.lock", "w")
fcntl.lockf(lock, fcntl.LOCK_EX)
folder.mkdir(parents=True, exist_ok=True)
(folder / "base_train.jsonl").write_text(json.dumps({"step": 0}) + "\\n")
if depth in behaviour.get("fails", []):
    sys.exit(1)
if depth in behaviour.get("slow", []):
    def ended(number, frame):
        (base / "saved").write_text(str(number))
        if not behaviour.get("deaf"):
            sys.exit(128 + number)
    signal.signal(signal.SIGTERM, ended)
    (base / "begun").write_text(str(os.getpid()))
    deadline = time.time() + 60
    while time.time() < deadline and not (base / "go").exists():
        time.sleep(0.02)
params = 1000 * depth**3
import math
bpb = 2 + 0.1 * (math.log10(params) - 0.5 * math.log10(flops) - 5.38) ** 2
summary = {
    "command": shlex.join(["python", "-m", "scripts.base_train", *sys.argv[1:]]),
    "plan": {"num_iterations": 5, "scaling_params": params},
    "final": {"step": 5, "tokens": int(flops / 6 / params * 1e9), "total_training_flops": flops, "val_bpb": bpb,
              "core_metric": 0.01 * depth, "total_training_time": 1.5},
    "config": {"target_flops": float(flags.get("target-flops", -1)), "seed": int(flags.get("seed", 42)),
               "depth": depth},
    "environment": {"git_commit": behaviour.get("commit", "abc")},
    "model": {"config": {"n_layer": depth}, "counts": {"total": 2 * params}},
    "seconds": 2.0,
}
(folder / "base_train.json").write_text(json.dumps(summary))
"""


@pytest.fixture
def trainer(base_dir, monkeypatch):
    """behave(fails=[depths], ...) sets what the stand-in does; it returns how often each tag was begun."""
    (base_dir / "base_checkpoints").mkdir(parents=True)
    program = base_dir / "trainer.py"
    program.write_text(TRAINER)
    monkeypatch.setattr(sweep, "command", lambda run, nproc: [sys.executable, str(program), *run.flags])
    monkeypatch.setattr(sweep, "check_with_base_train", lambda runs: None)  # it takes seconds

    def behave(**behaviour):
        (base_dir / "behaviour.json").write_text(json.dumps(behaviour))

    behave()
    return behave


def called() -> list[str]:
    return (paths.base_dir() / "calls").read_text().split()


def run(*flags):
    script.main(script.parse_args(["--nproc", "1", *flags]))


def entries(name):
    return {entry["tag"]: entry for entry in sweep.read_sweep(name)["runs"]}


def test_every_combination_once_and_nothing_twice(trainer, capsys):
    run("mine", "--vary", "target-flops=1e3,2e3", "--vary", "depth=2,3")
    assert called() == ["mine-d2-f1000", "mine-d3-f1000", "mine-d2-f2000", "mine-d3-f2000"]
    run("mine", "--vary", "target-flops=1e3,2e3", "--vary", "depth=2,3,4")
    assert called()[4:] == ["mine-d4-f1000", "mine-d4-f2000"]
    run("mine", "--vary", "target-flops=4e3", "--vary", "depth=2")
    found = entries("mine")
    assert len(found) == 7 and all(entry["status"] == "done" for entry in found.values())
    assert found["mine-d4-f2000"]["result"]["budget"] == 2000 and found["mine-d4-f2000"]["result"]["depth"] == 4
    assert "mine-d2-f4000" in capsys.readouterr().out


def test_seeds_are_the_slowest_and_flags_reach_the_training(trainer):
    run("pairs", "--vary", "fp8=on,off", "--seeds", "2", "--", "--depth=3")
    assert called() == ["pairs-s1-fp8on", "pairs-s1-fp8off", "pairs-s2-fp8on", "pairs-s2-fp8off"]
    run("two", "--vary", "matrix-lr=0.10", "--vary", "depth=2")
    run("two", "--vary", "depth=2", "--vary", "matrix-lr=1e-1")  # the same run
    assert called()[4:] == ["two-d2-matrix-lr0.1"]
    on, off = (entries("pairs")[tag]["flags"] for tag in called()[:2])
    assert "--fp8" in on and "--depth=3" in on and "--seed=1" in on and "--resume" in on
    assert not any("fp8" in flag for flag in off if not flag.startswith("--model-tag"))


def test_other_flags_under_the_same_name_are_refused(trainer):
    run("mine", "--vary", "depth=2", "--", "--matrix-lr=0.02")
    with pytest.raises(SystemExit, match="mine-d2 has run with other flags .--matrix-lr: 0.02, now 0.03.*another name"):
        run("mine", "--vary", "depth=2", "--", "--matrix-lr=0.03")
    assert called() == ["mine-d2"]


def test_a_run_that_fails_does_not_stop_the_others_and_is_tried_again(trainer, capsys):
    trainer(fails=[3])
    with pytest.raises(SystemExit, match="1 of 3 failed: mine-d3"):
        run("mine", "--vary", "depth=2,3,4")
    assert entries("mine")["mine-d3"]["status"] == "failed" and "failed" in capsys.readouterr().out
    trainer()
    run("mine", "--vary", "depth=2,3,4")
    assert called() == ["mine-d2", "mine-d3", "mine-d4", "mine-d3"]


def test_a_run_that_never_began_may_be_mended(trainer):
    trainer(refuses=[2, 3])
    with pytest.raises(SystemExit, match="2 of 3 failed: mine-d2, mine-d3"):
        run("mine", "--vary", "depth=2,3,4", "--", "--corpus=mistyped")
    trainer()
    with pytest.raises(SystemExit, match="mine-d4 has run with other flags .--corpus: mistyped, now right"):
        run("mine", "--vary", "depth=2,3,4", "--", "--corpus=right")
    run("mine", "--vary", "depth=2,3", "--", "--corpus=right")
    assert [entries("mine")[f"mine-d{depth}"]["status"] for depth in (2, 3, 4)] == ["done"] * 3


def test_what_changes_nothing_of_a_run_may_change(trainer):
    """Out of memory at the third depth: smaller batches for it, and the others are done."""
    trainer(fails=[4])
    with pytest.raises(SystemExit, match="1 of 3 failed"):
        run("mine", "--vary", "depth=2,3,4", "--", "--embedding-lr", "0.2", "--matrix-lr=0.30")
    trainer()
    run(
        "mine",
        "--vary",
        "depth=2,3,4",
        "--",
        "--matrix-lr=0.3",
        "--embedding-lr=0.2",
        "--device-batch-size=8",
        "--run=x",
    )
    assert called() == ["mine-d2", "mine-d3", "mine-d4", "mine-d4"]


def test_a_checkpoint_of_unknown_flags_is_not_gone_on_with(trainer):
    step = paths.checkpoint_dir("base", "mine-d2") / "step_000005"
    step.mkdir(parents=True)
    (step / "meta.json").write_text("{}")
    with pytest.raises(SystemExit, match="a model mine-d2 that this sweep has not begun"):
        run("mine", "--vary", "depth=2")
    trainer(fails=[3])
    with pytest.raises(SystemExit):
        run("other", "--vary", "depth=3", "--", "--matrix-lr=0.02")
    shutil.rmtree(paths.results_dir("other-d3"))  # but not its checkpoints
    step = paths.checkpoint_dir("base", "other-d3") / "step_000005"
    step.mkdir(parents=True)
    (step / "meta.json").write_text("{}")
    with pytest.raises(SystemExit, match="other-d3 has run with other flags"):
        run("other", "--vary", "depth=3", "--", "--matrix-lr=0.03")


def test_runs_of_other_code_are_told_of(trainer, capsys):
    run("mine", "--vary", "depth=2")
    run("mine", "--vary", "depth=2,3")
    assert "done by other code (abc; now " in capsys.readouterr().out


def test_dropped_models_leave_their_numbers(trainer):
    kept = paths.checkpoint_dir("base", "mine-d2") / "step_000005"
    kept.mkdir(parents=True)
    run("mine", "--vary", "depth=2", "--drop-models")
    assert not kept.exists() and entries("mine")["mine-d2"]["result"]["val_bpb"] > 0
    run("mine", "--vary", "depth=2", "--drop-models")
    assert called() == ["mine-d2"]


@pytest.mark.parametrize(
    "axes, fixed, said",
    [
        (["depth=2,2"], [], "each of its values are given once"),
        (["target-flops=1e18,1000000000000000000"], [], "each of its values are given once"),
        (["depth"], [], "expected a flag"),
        (["depth=2 3"], [], "expected a flag"),
        (["in-order=true,false"], [], "on and off"),
        (["depth=2", "depth=3"], [], "given once"),
        (["bundle=a/b,ab"], [], "the same name"),
        (["model-tag=x,y"], [], "set by the sweep"),
        (["depth=2"], ["--depth=3"], "set by the sweep"),
        (["depth=2"], ["--model-tag=x"], "set by the sweep"),
    ],
)
def test_a_sweep_that_makes_no_sense_is_refused(axes, fixed, said):
    with pytest.raises(ValueError, match=said):
        sweep.plan_runs("mine", sweep.parse_axes(axes), fixed)
    with pytest.raises(ValueError, match="a sweep's name"):
        sweep.plan_runs("../mine", {"depth": ["2"]}, [])
    with pytest.raises(ValueError, match="either so or by --seeds"):
        sweep.seed_axis(3, {"seed": ["7"]})


def test_flags_that_base_train_does_not_take_end_the_sweep_before_any_run(base_dir, capfd):
    for wrong in ("--wrong=1", "--depth=twelve", "--head-dim=0", "--dept=3"):
        runs = sweep.plan_runs("mine", {"seed": ["1", "2"]}, [wrong])
        with pytest.raises(SystemExit, match="does not take these flags"):
            sweep.Driver("mine", runs).run()
        assert wrong.split("=")[0] in capfd.readouterr().err
    assert not base_dir.exists()


def test_processes_go_by_the_gpus():
    assert [sweep.processes_for(gpus) for gpus in (0, 1, 2, 3, 6, 8)] == [1, 1, 2, 2, 4, 8]


def test_a_damaged_sweep_names_its_file(trainer):
    run("mine", "--vary", "depth=2")
    sweep.sweep_file("mine").write_text("{")
    with pytest.raises(SystemExit, match="sweep.json is damaged .*delete it; what is done is found again"):
        run("mine", "--vary", "depth=2")
    sweep.sweep_file("mine").unlink()
    run("mine", "--vary", "depth=2")
    assert called() == ["mine-d2"]


def test_dry_run_prints_the_commands(base_dir, capsys):
    script.main(script.parse_args(["mine", "--vary", "depth=2", "--nproc", "8", "--dry-run", "--", "--fp8"]))
    assert capsys.readouterr().out.strip() == (
        "python -m torch.distributed.run --standalone --nproc_per_node=8 -m scripts.base_train -- "
        "--resume --save-minutes=5 --keep=1 --fp8 --depth=2 --model-tag=mine-d2"
    )
    with pytest.raises(SystemExit):
        script.parse_args(["mine", "--vary", "depth=2", "--fp8"])
    assert "--fp8: flags of base_train come last, after --" in capsys.readouterr().err
    assert not base_dir.exists()


# -- killed


def driver(base, *flags):
    """The driver as a process of its own, with the stand-in."""
    program = f"""
import sys
from nanochat import sweep
from scripts import sweep as script
sweep.command = lambda run, nproc: [sys.executable, {str(base / "trainer.py")!r}, *run.flags]
sweep.check_with_base_train = lambda runs: None
script.main(script.parse_args({["--nproc", "1", *flags]!r}))
"""
    how = dict(env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen([sys.executable, "-c", program], **how)


def wait_for(path: Path):
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_the_training_which_saves(trainer, base_dir, number):
    trainer(slow=[3])
    process = driver(base_dir, "mine", "--vary", "depth=2,3,4")
    wait_for(base_dir / "begun")
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: the sweep stopped at mine-d3; the same command goes on" in said
    assert (base_dir / "saved").exists() and entries("mine")["mine-d3"]["status"] == "stopped"
    (base_dir / "go").touch()
    run("mine", "--vary", "depth=2,3,4")
    assert called() == ["mine-d2", "mine-d3", "mine-d3", "mine-d4"]


def test_a_killed_driver_leaves_its_training_which_the_next_one_waits_for(trainer, base_dir):
    """Two trainings of one tag at once would write into each other's files."""
    trainer(slow=[3])
    process = driver(base_dir, "mine", "--vary", "depth=2,3")
    wait_for(base_dir / "begun")
    process.kill()
    process.wait()
    child = int((base_dir / "begun").read_text())
    os.kill(child, 0)  # it lives
    following = driver(base_dir, "mine", "--vary", "depth=2,3")
    while "waiting for it" not in (line := following.stdout.readline()):
        assert line and "failed" not in line
    assert "a training of mine-d3 that was left behind" in line and called() == ["mine-d2", "mine-d3"]
    (base_dir / "go").touch()
    said, _ = following.communicate(timeout=60)
    assert following.returncode == 0 and called() == ["mine-d2", "mine-d3"]


def test_a_second_ctrl_c_ends_at_once(trainer, base_dir):
    trainer(slow=[2], deaf=True)
    process = driver(base_dir, "mine", "--vary", "depth=2")
    wait_for(base_dir / "begun")
    process.send_signal(signal.SIGINT)
    wait_for(base_dir / "saved")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130


# -- what it says


def test_fit_and_series_of_a_sweep(trainer, capsys):
    run("mine", "--vary", "target-flops=1e3,4e3,1.6e4", "--vary", "depth=10,20,30,40,60")
    scaling.main(scaling.parse_args(["fit", "mine", "--at", "1e6"]))
    said = capsys.readouterr().out
    folder = paths.sweep_dir("mine")
    found = json.loads((folder / "fit.json").read_text())
    assert found["predictions"][0]["budget"] == pytest.approx(1e6)
    assert found["laws"]["params"]["exponent"]["value"] == pytest.approx(0.5, abs=0.01)
    assert "Best at" in said and f"{found['ratio']['value']:.3g} tokens per parameter" in said
    page = (folder / "fit.html").read_text()
    assert page.count('class="chart"') == 4 and "src=" not in page and "<script" not in page
    assert (folder / "fit.png").read_bytes().startswith(b"\x89PNG") and (folder / "fit.md").exists()
    scaling.main(scaling.parse_args(["fit", *(f"mine-d{d}-f1000" for d in (10, 20, 30, 40)), "--params", "total"]))
    assert "The best size was found at 1 of 1 budgets" in capsys.readouterr().out
    scaling.main(scaling.parse_args(["fit", *(f"mine-d{d}-f1000" for d in (20, 30, 40))]))  # not run round
    assert "found at 0 of 1 budgets" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="several runs of one depth"):
        scaling.main(scaling.parse_args(["series", "mine"]))

    run("series", "--vary", "depth=2,4,6,8,12")
    capsys.readouterr()
    scaling.main(scaling.parse_args(["series", "series", "--out", str(folder / "elsewhere")]))
    said = capsys.readouterr().out
    assert "5 runs, depth 2 to 12" in said and (folder / "elsewhere" / "series.png").exists()
    with pytest.raises(SystemExit, match="mine-d10-f1000 and .* are the same run twice"):
        shutil.copytree(paths.results_dir("mine-d10-f1000"), paths.results_dir("copy"))
        scaling.main(scaling.parse_args(["fit", "mine", "copy"]))


def test_unfinished_runs_are_named(trainer, capsys):
    trainer(fails=[40])
    with pytest.raises(SystemExit):
        run("mine", "--vary", "target-flops=4e3", "--vary", "depth=10,20,30,60,40")
    scaling.main(scaling.parse_args(["fit", "mine"]))
    assert "mine: 4 of 5 runs are done; left out: mine-d40-f4000" in capsys.readouterr().out


def test_a_goal_out_of_sight_is_not_made_up():
    runs = [{"depth": d, "flops": 10.0**d} for d in (2, 3, 4, 5)]

    def goal(per_decade):
        line = laws.straight([2, 3, 4, 5], [0.1 + per_decade * d for d in (2, 3, 4, 5)])
        return scaling.predictions({"core_by_log_flops": line, "bpb": None, "runs": runs, "published": True}, [])[0]

    assert goal(0.0001)["flops"] is None and goal(0.0)["flops"] is None and goal(-0.1)["flops"] is None
    other_bundle = {"core_by_log_flops": laws.straight([2, 3, 4], [0, 0.1, 0.2]), "bpb": None, "runs": runs}
    assert scaling.predictions(other_bundle | {"published": False}, []) == []  # its CORE is not GPT-2's
    assert goal(0.03)["flops"] == pytest.approx(10 ** ((GPT2_CORE["GPT-2 1.6B"] - 0.1) / 0.03))


def test_every_number_of_the_page_stands_in_the_json(trainer):
    """The page is made of fit.json, and says where in it each number stands."""
    import re

    run("mine", "--vary", "target-flops=1e3,4e3,1.6e4", "--vary", "depth=10,20,30,40,60")
    scaling.main(scaling.parse_args(["fit", "mine"]))
    folder = paths.sweep_dir("mine")
    found, page = json.loads((folder / "fit.json").read_text()), (folder / "fit.html").read_text()
    numbers = re.findall(r'<data value="([^"]+)" title="([^"]+)"', page)
    assert len(numbers) > 20
    for value, title in numbers:
        place = found
        for key in title.split(" › ")[1:]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        assert float(value) == pytest.approx(place), title


def test_nothing_to_fit_is_told(trainer, base_dir):
    with pytest.raises(
        SystemExit, match="no finished run or sweep 'mine'; there are the runs .none., and the sweeps .none."
    ):
        scaling.main(scaling.parse_args(["fit", "mine"]))
    run("mine", "--vary", "depth=2,3")
    with pytest.raises(SystemExit, match="train with --target-flops and --eval-every"):
        scaling.main(scaling.parse_args(["fit", "mine"]))


# -- real trainings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("sweep"))


def test_real_trainings_killed_with_the_driver_end_as_if_nothing_had_been(world, monkeypatch):
    """kill -9 of the driver and of its training: the same command gives the same losses, to the bit."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(world))
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    fixed = [flag for flag in BASE.replace("--depth 2", "").split()]
    fixed = [f"{a}={b}" if not b.startswith("--") else a for a, b in zip(fixed, [*fixed[1:], "--"], strict=True)]
    fixed = [flag for flag in fixed if flag.startswith("--")] + ["--save-every=3", "--num-iterations=8"]
    words = [sys.executable, "-m", "scripts.sweep", "{}", "--vary", "depth=2", "--seeds=2", "--nproc=1", "--", *fixed]
    how = dict(cwd=REPOSITORY, env=one_thread(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def command(name):
        return [name if word == "{}" else word for word in words]

    killed = subprocess.Popen(command("killed"), start_new_session=True, **how)
    folder = paths.checkpoint_dir("base", "killed-s1-d2")
    deadline = time.monotonic() + 120
    while not checkpoint.list_steps(folder):
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    sweep.kill_family(killed.pid)
    killed.communicate()
    assert results.read("killed-s1-d2", "base_train") is None
    for name in ("killed", "whole"):
        done = subprocess.run(command(name), **how)
        assert done.returncode == 0, done.stdout
    for seed in (1, 2):
        one, other = (sweep.finished_json(f"{name}-s{seed}-d2") for name in ("killed", "whole"))
        for key in ("step", "train_loss", "val_bpb", "tokens"):
            assert one["final"][key] == other["final"][key], key
        assert shlex.split(one["command"])[3:] == entries("killed")[f"killed-s{seed}-d2"]["flags"]
        assert one["shards"] > 0 and one["vocabulary"]
    assert (
        sweep.finished_json("whole-s1-d2")["final"]["val_bpb"] != sweep.finished_json("whole-s2-d2")["final"]["val_bpb"]
    )
