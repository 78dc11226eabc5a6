"""The doctor finds what computes wrong numbers, and later runs do without it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from nanochat import attention, checks, paths, runtime
from nanochat.compilation import will_compile
from scripts import doctor


def test_on_this_machine_what_has_no_replacement_is_right(base_dir, capsys):
    doctor.main(doctor.parse_args(["--device-type", "cpu", "--checks", "blocked,sdpa,loss,optimizer,decoding"]))
    *_, last = capsys.readouterr().out.splitlines()
    said = json.loads(last)
    assert said["ok"] and said["disabled"] == {} and set(said["checks"]) == {
        "blocked", "sdpa", "loss", "optimizer", "decoding"
    }  # fmt: skip
    assert all(found["error"] > 0 for found in said["checks"].values())  # something was compared
    assert not paths.machine_file().exists()  # a part of the checks decides nothing


@pytest.mark.parametrize("part", ["attention", "loss", "optimizer", "decoding", "graphs"])
def test_a_part_that_computes_something_else_is_seen(part, monkeypatch):
    machine = runtime.Runtime(torch.device("cpu"), torch.float32)
    name = "blocked" if part == "attention" else part
    assert doctor.judge({name: checks.CHECKS[name](machine)}, by_speed=False) == ({}, [])
    if part == "attention":  # a window that is off by one
        real = attention.BACKENDS["blocked"]
        monkeypatch.setitem(attention.BACKENDS, "blocked", lambda q, k, v, window: real(q, k, v, window - 1))
    elif part == "loss":
        real = checks.cross_entropy
        monkeypatch.setattr(checks, "cross_entropy", lambda *args: real(*args[:4], 14.9, *args[5:]))
    elif part == "optimizer":
        monkeypatch.setattr(checks, "orthogonalization_dtype", lambda *args: torch.float8_e5m2)
        monkeypatch.setattr("nanochat.optim.polar_express", lambda x: x.to(torch.float32))
    elif part == "graphs":  # smear takes the token itself for the one before it
        monkeypatch.setattr("nanochat.decoding.StaticPass.before", lambda self, idx: idx)
    else:
        monkeypatch.setattr(checks.Pass, "end", lambda self: None)
    disabled, broken = doctor.judge({name: checks.CHECKS[name](machine)}, by_speed=False)
    assert [*disabled, *broken] == [name]


def test_what_is_wrong_or_slower_is_disabled_and_what_nothing_replaces_is_broken():
    results = {
        "rates": {"tflops": 1.0},
        "flash": {"error": 0.01, "tolerance": 0.04, "ms": 12.0},
        "flex": {"error": 1e30, "tolerance": 0.04, "ms": 3.0},
        "sdpa": {"error": 0.01, "tolerance": 0.04, "ms": 10.0},
        "loss": {"error": 0.5, "tolerance": 0.04},
        "compile": {"failed": "RuntimeError: no"},
        "fp8_head": {"error": 0.01, "tolerance": 0.2, "ms": 12.0, "ms_without": 10.0},
    }
    disabled, broken = doctor.judge(results, by_speed=True)
    assert set(disabled) == {"flash", "flex", "compile", "fp8_head"} and broken == ["loss"]
    assert "12.0 ms" in disabled["flash"] and "sdpa" in disabled["flash"] and disabled["compile"] == "RuntimeError: no"
    assert set(doctor.judge(results, by_speed=False)[0]) == {"flex", "compile"}
    results["flash"]["ms"] = 10.5  # a small difference does not count
    assert "flash" not in doctor.judge(results, by_speed=True)[0]


def test_a_check_that_takes_its_process_with_it_fails_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 3)
    program = tmp_path / "checks.py"
    program.write_text(
        "import json, os, sys, time\n"
        "for name in sys.argv[1].split(','):\n"
        "    if name == 'dies':\n        print('the last words', file=sys.stderr, flush=True)\n        os.abort()\n"
        "    if name == 'hangs':\n        time.sleep(60)\n"
        "    print(json.dumps({'check': name, 'error': 0.0, 'tolerance': 1.0}), flush=True)\n"
        f"    if name == 'spoils':\n        sys.exit({doctor.RESTART})\n"
    )
    results = doctor.watch(["one", "dies", "spoils", "hangs", "last"], [sys.executable, str(program)])
    assert list(results) == ["one", "dies", "spoils", "hangs", "last"]
    assert "the last words" in results["dies"]["failed"] and "failed" in results["hangs"]
    assert all("failed" not in results[name] for name in ("one", "spoils", "last"))


def test_later_runs_on_this_machine_do_without_what_was_disabled(base_dir, capsys):
    machine = runtime.start("cpu")
    assert attention.choose_backend(machine, 64) == "blocked"
    doctor.remember(machine, {"blocked": "error 0.5", "compile": "no"}, {})
    capsys.readouterr()
    again = runtime.start("cpu")
    assert again.disabled == ("blocked", "compile") and "blocked, compile" in capsys.readouterr().out
    assert attention.choose_backend(again, 64) == "sdpa"
    assert not will_compile(1, again) and "doctor" in capsys.readouterr().out
    findings = json.loads(paths.machine_file().read_text())
    paths.write_json(paths.machine_file(), {"another card": next(iter(findings.values()))})
    assert runtime.start("cpu").disabled == ()


def test_an_unknown_check_is_named():
    with pytest.raises(SystemExit, match="nonsense.*loss"):
        doctor.main(SimpleNamespace(device_type="cpu", checks="nonsense", in_this_process=False))
