"""The planner: the known run comes out as it was, hours and memory are kept to, and shell and planner agree."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import CPU, small_config

from nanochat import forecast, machines, memory, probe
from nanochat.runtime import Runtime
from nanochat.scaling import model_config, plan, shape_and_plan
from scripts import base_train
from scripts import plan as planner

ROOT = Path(__file__).resolve().parents[1]
H100S = ("--gpus", "8", "--gpu", "h100")
TINY = (
    "--aspect-ratio=32 --head-dim=32 --max-seq-len=64 --window-pattern=L --device-batch-size=4 --total-batch-size=512"
)


@pytest.fixture
def planned(capsys):
    def run(*flags):
        capsys.readouterr()
        planner.main(planner.parse_args([*flags, "--json"]))
        return json.loads(capsys.readouterr().out)  # one object and nothing else

    return run


def refused(*flags):
    with pytest.raises(SystemExit) as error:
        planner.main(planner.parse_args([*flags]))
    return str(error.value)


def of_depth(depth, **settings):
    return plan(model_config(depth, 32768), model_config(12, 32768), **settings)


# -- the known run


def test_depth_24_on_eight_h100_is_the_known_run(planned):
    found = planned("--depth", "24", *H100S)
    the_plan = found["plan"]
    assert (the_plan["tokens"], the_plan["total_batch_size"], the_plan["num_iterations"]) == (
        5_838_471_168,
        1_048_576,
        5_568,
    )
    assert found["seconds"]["pretraining"] / 60 == pytest.approx(99, rel=0.15)
    assert found["flops_per_second"] / 8 == pytest.approx(590e12, rel=0.01)
    assert found["seconds"]["speedrun"] / 3600 == pytest.approx(2, rel=0.1)
    assert found["dollars"]["speedrun"] == pytest.approx(found["seconds"]["speedrun"] / 3600 * 8 * 3)
    assert (found["expected"]["bits_per_byte"], found["expected"]["core"]) == (0.718, 0.2626)
    assert found["model"]["parameters"]["total"] == 1_384_122_122


def test_eight_gpus_are_planned_as_the_speedrun_does_them(planned):
    """The recipe is that of profile gpt2, as its dry run prints it."""
    if not shutil.which("bash"):
        pytest.skip("no bash on this machine")
    command = ["bash", "speedrun.sh", "--dry-run", "--profile=gpt2", "--only=3"]
    line = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    flags = dict(re.findall(r"--([\w-]+)=(\S+)", line))
    for dial in ((), ("--target", "gpt2")):
        found = planned(*H100S, *dial)
        assert found["depth"] == int(flags["depth"])
        assert found["plan"]["horizon"] == int(
            float(flags["target-param-data-ratio"]) * found["plan"]["scaling_params"]
        )
        assert found["fp8"] == ("--fp8" in line) and found["memory"]["rows"] == int(flags["device-batch-size"])
        assert found["data"]["shards"] == int(flags["num-files"])
        assert found["recipe"] == "the recipe of profile gpt2: ratio 8, fp8"
    assert planned("--gpus=8", "--gpu=a100")["recipe"].endswith("no fp8, which this does not multiply")


def test_fewer_gpus_are_planned_by_the_rule_of_base_train(planned):
    found = planned("--depth=12", "--gpu=h100")
    assert found["plan"] == of_depth(12).as_dict() and not found["fp8"]
    assert found["commands"] == [
        "python -m scripts.base_train --depth=12",
        "bash speedrun.sh --profile single --depth 12",
    ]
    four_hours = planned("--gpu=h100")
    assert four_hours["depth"] == planned("--gpu=h100", "--hours=4")["depth"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--depth=24", *H100S),
        ("--depth=4", "--gpu=l4", *TINY.split(), "--num-iterations=100", "--vocab-size=1000", "--corpus=own"),
        ("--depth=12", "--gpu=h100", "--gpus=2", "--target-flops=1e18", "--fp8", "--compile=0"),
        ("--hours=3", "--gpu=h100", "--target-param-data-ratio=12.5"),
    ],
)
def test_the_command_that_it_ends_with_trains_what_was_planned(planned, flags):
    found = planned(*flags)
    words = found["commands"][0].split()
    assert (words[0] == "torchrun") == (found["machine"]["gpus"] > 1)
    args = base_train.parse_args(
        [word for word in words[1:] if re.match(r"--[\w-]+=|--fp8", word) and "nproc" not in word]
    )
    config, the_plan = shape_and_plan(args, args.vocab_size, args.weight_decay)
    assert config.__dict__ == found["model"]["config"] and the_plan.as_dict() == found["plan"]
    assert args.fp8 == found["fp8"] and args.corpus == found["data"]["corpus"]


# -- hours, dollars, memory


@pytest.mark.parametrize("hours", [0.5, 2, 12])
def test_hours_find_the_deepest_speedrun_that_keeps_to_them(planned, hours):
    found = planned("--hours", str(hours), *H100S)
    deeper = planned("--depth", str(found["depth"] + 2), *H100S)
    assert found["seconds"]["speedrun"] <= 3600 * hours < deeper["seconds"]["speedrun"]


def test_dollars_are_hours_at_a_price(planned):
    by_hours = planned("--hours=2", *H100S)
    assert planned("--dollars=48", *H100S) == by_hours  # 2 x 8 x $3
    dear = planned("--dollars=48", "--price=6", *H100S)
    assert dear["depth"] < by_hours["depth"] and dear["dollars"]["speedrun"] <= 48


def test_where_time_is_no_object_memory_decides(planned):
    found = planned("--hours=100000", "--gpu=4090")
    deeper = planned("--depth", str(found["depth"] + 2), "--gpu=4090")
    assert found["memory"]["most_rows"] >= 4 > deeper["memory"]["most_rows"]


def test_rows_are_what_fits_and_what_does_not_is_said(planned, capsys):
    room = planned("--depth=24", *H100S)["memory"]
    assert list(room["rows_gb"]) == ["1", "2", "4", "8", "16", "32"]
    assert room["rows"] == room["most_rows"] == 16
    usable = room["usable"] * room["there_gb"]
    assert room["rows_gb"]["16"] <= usable < room["rows_gb"]["32"]
    machine = Runtime(torch.device("cuda"), torch.bfloat16, world_size=8)
    assert room["rows_gb"]["8"] * 1e9 == pytest.approx(
        memory.training_bytes(8, model_config(24, 32768), 2048, machine, True), rel=0.01
    )
    planner.main(planner.parse_args(["--depth=24", *H100S]))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if "16 rows" in line and "chosen, 4 times a step" in line]
    assert [line for line in lines if "32 rows" in line and "too much" in line]
    assert lines[-1] == "bash speedrun.sh --profile gpt2 --depth 24"


def test_what_nothing_fits_names_what_would(planned):
    said = refused("--hours=0.1", "--gpu=h100")
    enough = re.search(r"--hours ([\d.]+) would do", said)[1]
    assert planned("--hours", enough, "--gpu=h100")["depth"] == 2
    said = refused("--dollars=0.1", *H100S)
    enough = re.search(r"--dollars ([\d.]+) would do", said)[1]
    assert planned("--dollars", enough, *H100S)["dollars"]["speedrun"] <= float(enough)
    assert "GB of memory" in refused(
        "--hours=9", "--gpu=4080", "--max-seq-len=8000000", "--num-iterations=1", "--total-batch-size=8000000"
    )


def test_of_seven_gpus_four_are_planned_for_and_seven_paid(planned):
    found, four = planned("--gpu=h100", "--gpus=7", "--depth=12"), planned("--gpu=h100", "--gpus=4", "--depth=12")
    assert found["seconds"] == four["seconds"] and found["machine"]["title"].startswith("4 of 7 x H100")
    assert found["dollars"]["speedrun"] == pytest.approx(7 / 4 * four["dollars"]["speedrun"])


def test_what_does_not_fit_is_said_and_starts_nothing(planned, capsys):
    found = planned("--depth=100", "--gpu=h100")
    assert not found["fits"] and found["commands"] == []
    planner.main(planner.parse_args(["--depth=100", "--gpu=h100"]))
    said = capsys.readouterr().out
    assert "DOES NOT FIT: one row takes 8" in said and "chosen" not in said


def test_gpus_are_known_by_whole_words():
    known = {
        "NVIDIA RTX A4000": None, "NVIDIA RTX A1000": None, "NVIDIA A100-SXM4-40GB": 40, "NVIDIA A100 80GB PCIe": 80,
        "NVIDIA GH200 480GB": 96, "NVIDIA H200": 141, "NVIDIA L40S": 48, "NVIDIA L4": 24, "NVIDIA A40": 48,
        "cpu (2 threads)": None,
    }  # fmt: skip
    found = {name: machines.find(name) for name in known}
    assert {name: device and device.memory_gb for name, device in found.items()} == known


def test_mistakes_get_one_line(capsys):
    said = refused("--gpu=v100")
    assert "v100" in said and all(device.part in said for device in machines.DEVICES)
    for flags in (("--hours=1", "--depth=4"), ("--dollars=1", "--target=gpt2"), ("--hours=0",), ("--price=-1",)):
        with pytest.raises(SystemExit):
            planner.parse_args(flags)
        assert "error: --" in capsys.readouterr().err
    wrong = ("--total-batch-size=0", "--target-flops=inf", "--price=nan", "--vocab-size=0", "--depth=100000")
    for flag in (*wrong, "--target-param-data-ratio=-3", "--num-iterations=0", "--hours=nan"):
        with pytest.raises(SystemExit):
            planner.parse_args([flag])
        assert f"error: {flag.partition('=')[0]} is" in capsys.readouterr().err


@pytest.mark.parametrize(
    "asked, title",
    [
        ("h100", "H100"),
        ("H100 PCIe", "H100 PCIe"),
        ("4090", "RTX 4090"),
        ("l4", "L4"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
    ],
)
def test_a_gpu_is_found_as_people_call_it(asked, title):
    assert machines.asked(asked).title == title


def test_fp8_does_not_pay_in_small_models():
    h100 = machines.asked("h100")
    assert h100.flops_per_second(12, True) == h100.flops_per_second(12, False)
    assert h100.flops_per_second(24, True) == pytest.approx(1.17 * h100.flops_per_second(24, False))
    a100 = machines.asked("a100")
    assert a100.flops_per_second(24, True) == a100.flops_per_second(24, False)


# -- results


def test_results_are_foretold_only_where_a_known_point_is_near():
    def bpb(the_plan, corpus="climbmix"):
        return forecast.known_result(the_plan, corpus)["bits_per_byte"]

    assert bpb(of_depth(24, ratio=8)) == 0.718
    assert forecast.known_result(of_depth(26, ratio=8), "climbmix")["core"] is None
    for flops, known in forecast.FITS:
        found = forecast.known_result(of_depth(14, target_flops=flops), "climbmix")
        if found["bits_per_byte"]:
            assert found["bits_per_byte"] == pytest.approx(known, abs=0.003)
            assert "FineWeb-EDU, not on ClimbMix" in found["source"]
    middle = of_depth(16)
    assert 0.829 < bpb(middle) < 0.862 and 2e18 < middle.total_flops < 5e18
    assert bpb(middle, "tinyworld") is None
    assert bpb(of_depth(8)) is None and bpb(of_depth(22)) is None  # below and above
    assert bpb(of_depth(30, target_flops=2.788e19)) is None  # the FLOPs, spent otherwise


# -- the shell's table, for when nothing is installed


def test_the_shells_table_of_single_agrees_with_the_planner():
    text = (ROOT / "runs" / "profiles.sh").read_text()
    table = re.search(r"<<'TABLE'\n(.*?)\nTABLE\n", text, re.S)[1]
    rows = [[int(word) for word in line.split()] for line in table.splitlines()]
    assert [row[0] for row in rows] == list(range(8, 33, 2))
    for depth, work, weights, row_mb, shards in rows:
        config, the_plan = model_config(depth, 32768), of_depth(depth)
        rest = forecast.other_seconds(1, True) - forecast.other_seconds(0, True)
        assert work == pytest.approx((1 + rest) * the_plan.total_flops / 1e15, rel=0.15), depth
        fixed = memory.fixed_bytes(config, 1, torch.bfloat16) / 1e9
        assert weights == pytest.approx(fixed, rel=0.25, abs=1.2), depth
        row = memory.row_bytes(config, 2048, torch.bfloat16, compiled=False) / 1e6
        assert row_mb >= 0.8 * row, depth
        assert forecast.shards(the_plan.tokens) <= shards <= 1.3 * forecast.shards(the_plan.tokens), depth


# -- timing this machine


def test_a_probe_times_real_steps_of_the_model(monkeypatch):
    monkeypatch.setattr(probe, "product_rate", lambda machine: 1e18)
    speed = probe.probe(small_config(300, n_layer=2), 3, CPU, compiles=False, seconds=0.2)
    assert speed.config == small_config(300, n_layer=2) and speed.rows == 3
    assert speed.micro_seconds > 0 and speed.update_seconds > 0


def test_what_would_take_too_long_is_timed_by_something_smaller(monkeypatch):
    monkeypatch.setattr(probe, "product_rate", lambda machine: 1e9)
    config, rows = probe.affordable(model_config(12, 1000), 32, CPU, False, seconds=20)
    assert rows == 1 and config.n_layer < 12 and config.head_dim == 128
    monkeypatch.setattr(probe, "product_rate", lambda machine: 1e18)
    assert probe.affordable(model_config(4, 1000), 2, CPU, False, seconds=20) == (model_config(4, 1000), 2)
    monkeypatch.setattr(Runtime, "free_memory", lambda self: int(4e9))
    config, rows = probe.affordable(model_config(12, 32768), 32, CPU, False, seconds=20)
    assert memory.most_rows(4e9, config, 2048, CPU, False) >= rows


def test_a_step_is_its_micro_batches_and_one_update_shared_by_the_ranks():
    config = model_config(4, 1000, sequence_len=256)
    speed = probe.Speed(config, rows=8, micro_seconds=0.5, update_seconds=0.2)
    assert speed.step_seconds(config, 8 * 256) == pytest.approx(0.7)
    assert speed.step_seconds(config, 3 * 8 * 256) == pytest.approx(1.7)
    assert speed.step_seconds(config, 4 * 8 * 256, ranks=4) == pytest.approx(0.55)
    larger = model_config(8, 1000, sequence_len=256)
    assert speed.step_seconds(larger, 8 * 256) > 4 * 0.7


def timed_at(monkeypatch, flops_per_second):
    """This machine, as fast as that in whatever is asked for; returns the depths that were timed."""
    asked = []

    def pretend(config, rows, machine, compiles, in_fp8=False, seconds=20):
        print("timing")
        asked.append(config.n_layer)
        tokens = rows * config.sequence_len
        return probe.Speed(config, rows, tokens * probe.meta_model(config).flops_per_token() / flops_per_second, 0.0)

    monkeypatch.setattr(planner, "probe", pretend)
    monkeypatch.setattr(probe, "LOADAVG", Path("nowhere"))  # whatever else runs here
    return asked


def test_without_a_name_this_machine_is_timed(monkeypatch, planned):
    asked = timed_at(monkeypatch, 1e10)
    found = planned("--depth=4", "--device-type=cpu", "--num-iterations=100", "--vocab-size=1000", *TINY.split())
    assert asked == [4] and found["how"] == "timed here" and found["dollars"] is None
    assert found["flops_per_second"] == pytest.approx(1e10)
    assert found["seconds"]["rest"] == pytest.approx(30 + 0.75 * found["seconds"]["pretraining"])


def test_hours_here_time_the_depth_that_is_found(monkeypatch, planned):
    asked = timed_at(monkeypatch, 1e10)
    flags = ("--device-type=cpu", "--num-iterations=100", "--vocab-size=1000", *TINY.split())
    found = planned("--hours=0.5", *flags)
    assert asked == [planner.FIRST_TIMED["cpu"], found["depth"]]
    assert found["seconds"]["speedrun"] <= 1800
    assert planned("--depth", str(found["depth"] + 2), *flags)["seconds"]["speedrun"] > 1800
    priced = planned("--dollars=1", "--price=2", *flags)
    assert priced["depth"] == found["depth"] and priced["dollars"]["speedrun"] <= 1


def test_a_machine_that_is_shared_says_so(monkeypatch, planned, tmp_path):
    timed_at(monkeypatch, 1e10)
    monkeypatch.setattr(probe, "LOADAVG", tmp_path / "loadavg")
    flags = ("--depth=4", "--device-type=cpu", "--num-iterations=100", "--vocab-size=1000", *TINY.split())
    for running, said in ((1, "timed here"), (1 + 4096, "timed here; other processes run on this host, 4096.0 on ")):
        (tmp_path / "loadavg").write_text(f"9.0 9.0 9.0 {running}/5000 77\n")
        assert planned(*flags)["how"].startswith(said) and ("other" in said) == ("faster" in planned(*flags)["how"])


def test_a_cpu_has_neither_a_price_nor_gpus(monkeypatch, base_dir):
    timed_at(monkeypatch, 1e10)
    assert "--price" in refused("--dollars=1", "--device-type=cpu")
    assert "--gpu" in refused("--gpus=8", "--device-type=cpu", "--depth=4")
