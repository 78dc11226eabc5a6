"""Did it help? Pairs of one seed, at equal steps, tokens, FLOPs and time, with an error that is that of the pairs."""

import json

import pytest

from nanochat import laws, pairs, paths
from scripts import compare

FLAGS = {"depth": 2, "corpus": "mine", "eval_tokens": 1024, "matrix_lr": 0.02, "max_seq_len": 64, "vocab_size": 512}


def run(tag, seed, end=1.0, steps=100, a_step=10, flops=6, second=1.0, every=10, **flags):
    """A run whose bits per byte fall from 3 to `end` along a straight line."""
    config = {**FLAGS, "seed": seed, "model_tag": tag, **flags}
    log = []
    for step in range(steps + 1):
        if step % every == 0:
            log.append({"step": step, "val/bpb": 3 + (end - 3) * step / steps})
        if step < steps:
            log.append({"step": step, "train/dt": second, "total_training_time": second * (step + 1)})
    found = {
        "plan": {"total_batch_size": a_step, "flops_per_token": flops, "num_iterations": steps},
        "final": {"step": steps},
        "config": config,
    }
    return found, log


def trained(tag, seed, **how):
    return pairs.trained(tag, *run(tag, seed, **how))


def two_arms(ends_a, ends_b, **how):
    runs = [trained(f"a{i}", i, end=end) for i, end in enumerate(ends_a)]
    runs += [trained(f"b{i}", i, end=end, matrix_lr=0.03, **how) for i, end in enumerate(ends_b)]
    return pairs.arms(runs)


def test_the_seeds_own_noise_falls_out_of_the_difference():
    a, b = two_arms([1.0, 1.5, 0.7], [0.9, 1.41, 0.58])
    found = pairs.against(a, b)["at the end"]
    assert found["difference"] == pytest.approx(-0.31 / 3) and found["pairs"] == 3
    differences = [-0.1, -0.09, -0.12]
    mean = sum(differences) / 3
    error = (sum((d - mean) ** 2 for d in differences) / 2 / 3) ** 0.5
    assert found["error"] == pytest.approx(error)
    assert found["high"] == pytest.approx(mean + 4.303 * error) and found["high"] < 0
    assert pairs.verdict(found) == "helps"
    assert pairs.verdict(pairs.against(b, a)["at the end"]) == "hurts"


def test_differences_of_both_signs_decide_nothing_and_one_pair_has_no_error():
    assert pairs.verdict(pairs.against(*two_arms([1.0, 1.0], [0.9, 1.05]))["at the end"]) == "undecided"
    one = pairs.against(*two_arms([1.0], [0.9]))["at the end"]
    assert one["error"] is None and pairs.verdict(one) == "one pair: no error bar"


def test_equal_steps_tokens_flops_and_time_are_four_places():
    """B does half the steps of A, with three times the tokens each and a time of its own."""
    a, b = two_arms([1.0], [1.0], steps=50, a_step=30, second=4.0)
    found = pairs.against(a, b)
    assert found["equal steps"]["place"] == 50 and found["equal steps"]["first"] == pytest.approx(2.0)
    assert found["equal steps"]["share_of_first"] == 0.5 and found["equal steps"]["share_of_other"] == 1
    assert found["equal tokens"]["place"] == 1000 and found["equal tokens"]["other"] == pytest.approx(
        3 - 2 * 1000 / 1500
    )
    assert found["equal FLOPs"]["place"] == 6000
    assert found["equal time"]["place"] == 100 and found["equal time"]["other"] == pytest.approx(2.0)
    assert found["equal time"]["share_of_other"] == 0.5


def test_where_it_was_measured_too_seldom_nothing_is_read_from_between():
    a, b = two_arms([1.0], [1.0], every=50, second=1.5)
    found = pairs.against(a, b)
    assert "too seldom" in found["equal time"]["why_not"] and found["equal steps"]["difference"] == 0
    with pytest.raises(ValueError, match="--eval-every"):
        trained("x", 1, every=1000)


def test_arms_are_runs_of_one_setting_and_are_named_by_what_differs():
    arms = two_arms([1.0, 1.0], [1.0, 1.0])
    assert [arm.name for arm in arms] == ["matrix-lr=0.02", "matrix-lr=0.03"]
    assert [list(arm.runs) for arm in arms] == [[0, 1], [0, 1]]
    beside = [trained("a", 1, eval_every=10), trained("b", 1, eval_every=20, depth=3)]
    assert [arm.name for arm in pairs.arms(beside)] == ["depth=2", "depth=3"]


@pytest.mark.parametrize(
    "runs, said",
    [
        ([("a", 1, {}), ("b", 2, {})], "the same flags but for the seed"),
        ([("a", 1, {}), ("a", 1, {})], "named twice"),
        ([("a", 1, {}), ("b", 1, {}), ("c", 1, {"depth": 3})], "same seed 1"),
        ([("a", 1, {}), ("b", 1, {"corpus": "other"})], "--corpus is a: mine, b: other"),
        ([("a", 1, {}), ("b", 1, {"eval_tokens": 9})], "--eval-tokens"),
    ],
)
def test_what_cannot_be_compared_is_told(runs, said):
    with pytest.raises(ValueError, match=said):
        pairs.arms([trained(tag, seed, **flags) for tag, seed, flags in runs])


def test_pairs_need_a_seed_in_common():
    first, other = pairs.arms([trained("a", 1), trained("b", 2, depth=3)])
    with pytest.raises(ValueError, match=r"no seed in common: depth=2 has \[1\].*--seeds 3"):
        pairs.against(first, other)


def test_what_pairs_do_not_share_is_said():
    notes = pairs.notes([trained("a", 1), trained("b", 1, depth=3, vocab_size=600)])
    assert "first weights" in notes[0] and "other rows" in notes[1] and "rows of a step" in notes[2]
    assert pairs.notes([trained("a", 1), trained("b", 1, matrix_lr=1)]) == []


def test_the_difference_along_the_way():
    a, b = two_arms([1.0, 1.2], [0.8, 0.9])
    curve = pairs.difference_curve(a, b, "tokens")
    assert [point["tokens"] for point in curve] == list(range(100, 1001, 100))
    assert curve[-1]["difference"] == pytest.approx(-0.25) and curve[4]["difference"] == pytest.approx(-0.125)
    assert curve[-1]["high"] == pytest.approx(-0.25 + laws.t_975(1) * 0.05)


def test_the_script_writes_page_picture_and_json(base_dir, capsys):
    for tag, seed, end, lr in (("a1", 1, 1.0, 0.02), ("a2", 2, 1.1, 0.02), ("b1", 1, 0.9, 0.03), ("b2", 2, 0.99, 0.03)):
        found, log = run(tag, seed, end=end, matrix_lr=lr)
        folder = paths.results_dir(tag)
        paths.write_json(folder / "base_train.json", found)
        (folder / "base_train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    compare.main(compare.parse_args(["a1", "a2", "b1", "b2"]))
    said = capsys.readouterr().out
    assert "matrix-lr=0.03: helps at the end (-0.1050 ± " in said and "seeds 1, 2" in said
    folder = paths.sweep_dir("a1-vs-a2-vs-b1-vs-b2")
    assert json.loads((folder / "compare.json").read_text())["arms"][0]["at the end"]["pairs"] == 2
    page = (folder / "compare.html").read_text()
    assert "matrix-lr=0.03" in page and "-0.1050" in page and page.count("<svg") >= 3
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no finished run or sweep 'c'; there are: a1, a2, b1, b2"):
        compare.main(compare.parse_args(["a1", "c"]))
