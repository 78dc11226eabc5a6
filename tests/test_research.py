"""Notes of research: a run's entry in the leaderboard, and CORE estimated from a few tasks."""

import json
import sys
from pathlib import Path

import pytest

from nanochat import paths
from nanochat.core_references import GPT2_CORE, GPT2_TASKS

sys.path.insert(0, str(Path(__file__).parent.parent / "dev"))

import estimate_core  # noqa: E402
import leaderboard  # noqa: E402

H100 = {"world_size": 8, "device": "NVIDIA H100 80GB HBM3", "git_commit": "abc1234"}


def leave(tag, seed=1, core=0.26, seconds=5940.0, per_task=-1, step=100, where=H100, bundle="eval_bundle",
          bpb=0.718, started="2026-11-26T12:00:00+00:00", **flags):  # fmt: skip
    """The JSON of a run that counts, unless something is changed."""
    trained = {
        "command": f"python -m scripts.base_train --seed={seed}",
        "environment": where,
        "config": {"seed": seed, "model_tag": tag, "run": "dummy", **flags},
        "tag": tag,
        "started": "2026-11-26T10:00:00+00:00",
        "plan": {"num_iterations": 100, "total_batch_size": 1000},
        "final": {"step": 100, "val_bpb": bpb, "tok_per_sec": 90_000 / seconds / 0.9, "data_wait": 0.1},
        "corpus": "climbmix",
        "model": {"config": {"n_layer": 24}},
    }
    tasks = {task: {"centered": GPT2_TASKS[task]["GPT-2 1.6B"]} for task in GPT2_TASKS}
    examined = {
        "step": step,
        "started": started,
        "core": {"metric": core, "tasks": tasks, "bundle": bundle, "max_per_task": per_task},
    }
    paths.write_json(paths.results_dir(tag) / "base_train.json", trained)
    paths.write_json(paths.results_dir(tag) / "base_eval.json", examined)


def told(*tags):
    return leaderboard.told([leaderboard.entry(tag) for tag in tags])


def test_three_runs_above_the_grade_count(base_dir):
    for seed, core in ((1, 0.2550), (2, 0.2600), (3, 0.2580)):
        leave(f"s{seed}", seed, core, seconds=5400 + 180 * seed)
    said = told("s1", "s2", "s3")
    assert "| 1.60 | depth 24, climbmix, commit abc1234, 3 runs, 8 x NVIDIA H100 80GB HBM3 | 0.2577 | 0.7180 |" in said
    assert "It counts by all rules." in said and "seed 2: 1 h 36 min, CORE 0.2600" in said


def test_one_run_counts_two_deviations_above(base_dir):
    leave("high", core=0.2670)
    assert "It counts" in told("high")
    leave("near", core=0.2600)
    assert "3 runs are needed, or a single one with a CORE of 0.2665 (rule 4)" in told("near")
    leave("higher", 2, core=0.2680)
    assert "3 runs are needed" in told("high", "higher")  # chosen from how many?


def test_a_run_that_was_interrupted_is_the_same_entry(base_dir):
    """Its flags of going on do not count, nor the steps that were not timed."""
    leave("a", 1, 0.2580)
    leave("b", 2, 0.2580, resume=True, save_minutes=5)
    leave("c", 3, 0.2580, stop_after=11)
    assert "It counts by all rules." in told("a", "b", "c") and "| 1.65 |" in told("a", "b", "c")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(per_task=500), "CORE is of 500 examples a task, not of all (rule 3)"),
        (dict(bundle="eval_bundle_tinyworld"), "not the published one (rule 3)"),
        (dict(step=90), "CORE is of step 90, not of the last, 100 (rule 3)"),
        (dict(where={**H100, "device": "NVIDIA A100"}), "another machine than 8 x H100 (rule 2)"),
        (dict(bpb=None), "has no bits per byte"),
        (dict(started="2026-11-25T12:00:00+00:00"), "older than its training"),
        (dict(core=0.2), "the mean CORE of 0.2407 is below"),
        (dict(seed=1), "the same seed (rule 4)"),
        (dict(matrix_lr=0.5), "not the same flags (rule 4)"),
    ],
)
def test_a_broken_rule_is_named(base_dir, change, said):
    leave("a", 1, 0.262)
    leave("b", 2, 0.26)
    leave("c", **{"seed": 3, **change})
    assert said in told("a", "b", "c")


def test_missing_results_name_the_command(base_dir):
    with pytest.raises(ValueError, match="base_train --model-tag none"):
        leaderboard.entry("none")
    leave("half")
    (paths.results_dir("half") / "base_eval.json").unlink()
    with pytest.raises(ValueError, match="base_eval --model-tag half"):
        leaderboard.entry("half")


def test_the_line_is_that_of_the_public_project():
    """CORE = 0.664 x mean + 0.017 over the four GPT-2 models, R2 0.996; PIQA alone does nearly as well."""
    models = estimate_core.examined([])
    found = estimate_core.fit(models, estimate_core.SHARED)
    assert round(found["line"]["slope"], 3) == 0.664 and round(found["line"]["height"], 3) == 0.017
    assert round(found["line"]["r2"], 3) == 0.996
    assert estimate_core.fit(models, ("piqa",))["line"]["r2"] > 0.98


def test_estimates_are_near_those_of_the_public_project():
    """It does not say which shots it took; ours lie within 0.011 of its."""
    found = estimate_core.fit(estimate_core.examined([]), estimate_core.SHARED)
    ours = [one["value"] for one in estimate_core.estimates(found)]
    theirs = [0.148, 0.216, 0.266, 0.291, 0.329, 0.361, 0.385, 0.427]
    assert all(abs(a - b) < 0.011 for a, b in zip(ours, theirs, strict=True)) and ours == sorted(ours)


def test_ones_own_models_join_the_fit_and_the_page_is_written(base_dir, tmp_path, capsys):
    leave("mine", core=0.25)
    estimate_core.main(estimate_core.parse_args(["--model-tags", "mine", "--out", str(tmp_path / "out")]))
    said = capsys.readouterr().out
    assert "mine" in said and "GPT-3 175B" in said
    found = json.loads((tmp_path / "out" / "estimate_core.json").read_text())
    assert len(found["means"]) == len(GPT2_CORE) + 1
    assert (tmp_path / "out" / "estimate_core.png").read_bytes().startswith(b"\x89PNG")
    estimate_core.main(estimate_core.parse_args(["--search", "1"]))
    assert "piqa" in capsys.readouterr().out
    leave("other", bundle="eval_bundle_tinyworld")
    path = paths.results_dir("other") / "base_eval.json"
    path.write_text(json.dumps({"core": {"tasks": {"x": {}}, "bundle": "eval_bundle_tinyworld", "metric": 0.1}}))
    with pytest.raises(SystemExit, match="not the published one"):
        estimate_core.main(estimate_core.parse_args(["--model-tags", "other"]))
    with pytest.raises(SystemExit):
        estimate_core.parse_args(["--tasks", "nonsense"])
