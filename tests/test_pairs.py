"""Did it help? Pairs of one seed, at equal steps, tokens, FLOPs and time, with an error that is that of the pairs."""

import json
import re

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


def trained(tag, seed, name=None, **how):
    return pairs.trained(tag, name or tag, *run(tag, seed, **how))


def two_arms(ends_a, ends_b, **how):
    runs = [trained(f"a{i}", i, end=end) for i, end in enumerate(ends_a)]
    runs += [trained(f"b{i}", i, end=end, matrix_lr=0.03, **how) for i, end in enumerate(ends_b)]
    return pairs.arms(runs)


def test_the_seeds_own_noise_falls_out_of_the_difference():
    a, b = two_arms([1.0, 1.5, 0.7], [0.9, 1.41, 0.58])
    found = pairs.against(a, b)["at_end"]
    assert found["difference"] == pytest.approx(-0.31 / 3) and found["pairs"] == 3
    differences = [-0.1, -0.09, -0.12]
    mean = sum(differences) / 3
    error = (sum((d - mean) ** 2 for d in differences) / 2 / 3) ** 0.5
    assert found["error"] == pytest.approx(error)
    assert found["high"] == pytest.approx(mean + 4.303 * error) and found["high"] < 0
    assert pairs.verdict(found) == "helps"
    assert pairs.verdict(pairs.against(b, a)["at_end"]) == "hurts"


def test_differences_of_both_signs_decide_nothing_and_one_pair_has_no_error():
    assert pairs.verdict(pairs.against(*two_arms([1.0, 1.0], [0.9, 1.05]))["at_end"]) == "undecided"
    one = pairs.against(*two_arms([1.0], [0.9]))["at_end"]
    assert one["error"] is None and pairs.verdict(one) == "one pair: no error bar"


def test_equal_steps_tokens_flops_and_time_are_four_places():
    """B does half the steps of A, with three times the tokens each and four times the seconds."""
    a, b = two_arms([1.0], [1.0], steps=50, a_step=30, second=4.0)
    found = pairs.against(a, b)
    assert found["equal_steps"]["place"] == 50 and found["equal_steps"]["first"] == pytest.approx(2.0)
    assert found["equal_steps"]["shares"] == [0.5, 1]
    assert found["equal_tokens"]["place"] == 1000 and found["equal_tokens"]["other"] == pytest.approx(
        3 - 2 * 1000 / 1500
    )
    assert found["equal_flops"]["place"] == 6000
    assert found["equal_time"]["place"] == 100 and found["equal_time"]["other"] == pytest.approx(2.0)
    assert found["equal_time"]["shares"] == [1, 0.5] and not found["pace"]["same"]


def test_a_machine_that_is_now_faster_now_slower_says_nothing_of_an_arm():
    """The same work in both: one run of each was slow."""
    runs = [trained("a0", 0, second=1.0), trained("a1", 1, second=1.2)]
    runs += [trained("b0", 0, second=1.1, matrix_lr=0.03), trained("b1", 1, second=1.0, matrix_lr=0.03)]
    found = pairs.against(*pairs.arms(runs))
    assert found["pace"]["same"] and found["equal_time"]["shares"] == [1, 1]
    assert found["equal_time"]["difference"] == found["equal_steps"]["difference"]
    slow = [trained("c0", 0, second=1.5, matrix_lr=0.03), trained("c1", 1, second=1.6, matrix_lr=0.03)]
    found = pairs.against(*pairs.arms(runs[:2] + slow))
    assert not found["pace"]["same"] and found["equal_time"]["shares"][1] < 1


def test_a_run_of_ten_steps_has_no_time_and_is_compared_all_the_same():
    found = pairs.against(*two_arms([1.0], [0.9], steps=10, every=1))
    assert (
        "why_not"
        in pairs.against(*pairs.arms([trained("a", 1, steps=10), trained("b", 1, steps=9, every=3, depth=3)]))[
            "equal_time"
        ]
    )
    assert found["at_end"]["difference"] == pytest.approx(-0.1)


def test_a_value_at_a_place_is_that_of_the_place():
    one = trained("a", 1)
    assert one.at(100) == 1.0 and one.at(0) == 3.0 and one.at(5) == pytest.approx(2.9) and one.at(101) is None


def test_where_it_was_measured_too_seldom_nothing_is_read_from_between():
    a, b = two_arms([1.0], [1.0], every=50, second=1.5)
    found = pairs.against(a, b)
    assert "too seldom" in found["equal_time"]["why_not"] and found["equal_steps"]["difference"] == 0
    with pytest.raises(ValueError, match="--eval-every"):
        trained("x", 1, every=1000)


def test_arms_are_runs_of_one_setting_and_are_named_by_what_differs():
    arms = two_arms([1.0, 1.0], [1.0, 1.0])
    assert [arm.name for arm in arms] == ["matrix-lr=0.02", "matrix-lr=0.03"]
    assert [list(arm.runs) for arm in arms] == [[0, 1], [0, 1]]
    beside = [trained("a", 1, eval_every=10), trained("b", 1, eval_every=20, depth=3)]
    assert [arm.name for arm in pairs.arms(beside)] == ["depth=2", "depth=3"]


def test_a_change_of_the_code_is_compared_by_the_names_of_the_runs():
    """Two sweeps of the same flags, before and after an edit."""
    runs = [
        trained(f"{name}-s{seed}", seed, name, end=end) for name, end in (("old", 1.0), ("new", 0.9)) for seed in (1, 2)
    ]
    arms = pairs.arms(runs)
    assert [arm.name for arm in arms] == ["old", "new"] and list(arms[1].runs) == [1, 2]
    assert pairs.against(*arms)["at_end"]["difference"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "runs, said",
    [
        ([("a", 1, {}), ("b", 2, {})], "the same flags but for the seed"),
        ([("a", 1, {}), ("a", 1, {})], "named twice"),
        ([("a", 1, {"name": "x"}), ("b", 1, {"name": "x"}), ("c", 1, {"depth": 3})], "same seed 1"),
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
    other = trained("b", 1, matrix_lr=1)
    other.environment = {"git_commit": "abc+", "device": "NVIDIA H100"}
    assert [note.split(":")[0] for note in pairs.notes([trained("a", 1), other])] == [
        "Made with different code",
        "Made with different devices",
    ]


def test_the_difference_along_the_way():
    a, b = two_arms([1.0, 1.2], [0.8, 0.9])
    curve = pairs.difference_curve(a, b, "tokens", None)
    assert [place for place, _ in curve] == list(range(100, 1001, 100))
    assert curve[-1][1]["difference"] == pytest.approx(-0.25) and curve[4][1]["difference"] == pytest.approx(-0.125)
    assert curve[-1][1]["high"] == pytest.approx(-0.25 + laws.t_975(1) * 0.05)
    assert pairs.difference_curve(a, b, "time", None) == []


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
    found = json.loads((folder / "compare.json").read_text())
    assert found["arms"][0]["at_end"]["pairs"] == 2
    page = (folder / "compare.html").read_text()
    assert "matrix-lr=0.03" in page and page.count('class="chart"') == 3
    numbers = re.findall(r'<data value="([^"]+)" title="([^"]+)"', page)
    assert len(numbers) >= 15
    for value, title in numbers:
        if not title.startswith("compare"):
            continue
        place = found
        for key in title.split(" › ")[1:]:
            place = place[int(key)] if isinstance(place, list) else place[key]
        assert float(value) == pytest.approx(place), title
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="no finished run or sweep 'c'; there are the runs a1, a2, b1, b2"):
        compare.main(compare.parse_args(["a1", "c"]))


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--set", "matrix-lr=0.02"], "two values or more"),
        (["--set", "eval-every=1,2"], "cannot be compared by it"),
        (["--set", "corpus=a,b"], "cannot be compared by it"),
        (["--set", "seed=1,2"], "cannot be compared by it"),
        (["--set", "matrix-lr=0.02,2e-2"], "each of its values are given once"),
        (["--set", "depth=2,3", "--", "--eval-every=-1"], "--eval-every is needed"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_any_run(base_dir, flags, said):
    with pytest.raises(SystemExit, match=said):
        compare.main(compare.parse_args(["mine", *flags]))
    assert not base_dir.exists()
    with pytest.raises(SystemExit):
        compare.parse_args(["a", "b", "--seeds", "2"])
