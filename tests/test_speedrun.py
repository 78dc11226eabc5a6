"""The marks of the speedrun, and the set-up, with a stand-in for Python that only writes down what it is asked."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
H100 = "81559, NVIDIA H100 80GB HBM3"

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash on this machine")

# Appends its arguments to `calls`. Fails where the file `fail` holds a part of them; waits where `wait` does.
STAND_IN = """#!/bin/bash
here=$(dirname "$0")
echo "$*" >>"$here/calls"
if [ -s "$here/wait" ] && [[ "$*" == *"$(cat "$here/wait")"* ]]; then exec sleep 60; fi
if [ -s "$here/fail" ] && [[ "$*" == *"$(cat "$here/fail")"* ]]; then echo "no such luck"; exit 7; fi
if [[ "$*" == *nanochat.report* ]]; then echo "# Report" | tee report.md >report.html; fi
if [[ "$*" == *scripts.plan* ]]; then cat "$here/plan"; fi
"""


class Clone:
    """A copy of the scripts whose `.venv` is ready and holds the stand-in."""

    def __init__(self, folder: Path):
        self.root = folder / "clone"
        self.base = folder / "base"
        shutil.copytree(ROOT / "runs", self.root / "runs")
        for name in ("speedrun.sh", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        self.bin = self.root / ".venv" / "bin"
        self.bin.mkdir(parents=True)
        write_tool(self.bin / "python", STAND_IN)
        self.tools = folder / "tools"
        self.tools.mkdir()
        self.gpus([])
        self.free_disk(900)
        checksum = subprocess.run(["cksum"], stdin=open(self.root / "pyproject.toml"), capture_output=True, text=True)
        ready = f"{self.root} {checksum.stdout.strip()}\ngpu\nwandb\n"
        (self.root / ".venv" / ".nanochat-ready").write_text(ready)
        skip = "NANOCHAT_|WANDB_|CUDA_|SINGLE_HOURS|IDENTITY|PIP_|UV_"
        self.env = {k: v for k, v in os.environ.items() if not re.match(skip, k)}
        self.env |= {"PATH": f"{self.tools}{os.pathsep}{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(self.base)}

    def gpus(self, lines):
        body = "\n".join(f"echo '{line}'" for line in lines) or "exit 9"
        write_tool(self.tools / "nvidia-smi", f"#!/bin/sh\n{body}\n")

    def free_disk(self, gigabytes):
        write_tool(self.tools / "df", f"#!/bin/sh\necho Filesystem\necho '/dev/x 9 9 {gigabytes}000000 1% /'\n")

    def set(self, name, text):
        (self.bin / name).write_text(text)

    def start(self, *flags, script="speedrun.sh", folder=None, **environment):
        (self.bin / "calls").write_text("")
        return subprocess.Popen(
            ["bash", script, *flags],
            cwd=folder or self.root,
            env=self.env | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *flags, code=0, **keywords):
        process = self.start(*flags, **keywords)
        self.output, _ = process.communicate(timeout=60)
        assert process.returncode == code, self.output
        return self.called()

    def called(self):
        """The modules that were run, with --resume where it was given."""
        found = []
        for line in (self.bin / "calls").read_text().splitlines():
            name = re.search(r"(?:scripts\.|nanochat\.|dev/)(\w+)", line)[1]
            found.append(name + (" --resume" if "--resume" in line else ""))
        return found

    def change_setting(self, name, value):
        with open(self.root / "runs" / "profiles.sh", "a") as file:
            file.write(f'{name}="{value}"\n')

    def mark(self, stage, tag="tiny"):
        return self.base / "marks" / tag / stage


def write_tool(path, text):
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def clone(tmp_path):
    return Clone(tmp_path)


ALL = (
    "tinyworld tok_train dataset tok_eval base_train base_eval chat_eval chat_sft chat_eval chat_rl chat_eval report"
).split()
FROM_SFT = ALL[7:]


def test_a_rerun_skips_what_is_done(clone):
    assert clone.run() == ALL
    assert clone.run() == ["report"]
    assert f"03_pretrain: done (delete {clone.mark('03_pretrain')} or use --from to redo)" in clone.output
    assert clone.run(script="runs/03_pretrain.sh") == []


def test_it_says_what_it_will_do_and_how_to_chat(clone):
    clone.run()
    lines = clone.output.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["profile", "model", "download", "time", "lands"]
    assert lines[5] == ""
    assert (
        lines[-2] == f"report: {clone.root}/report.html (and report.md)"
        and (clone.root / "report.md").read_text() == "# Report\n"
    )
    assert lines[-1].endswith(".venv/bin/python -m scripts.chat_cli -i rl -g tiny")
    assert str(clone.base) in lines[-1]


def test_the_report_lands_where_one_is(clone, tmp_path):
    clone.run("--only=8", folder=tmp_path, script=str(clone.root / "speedrun.sh"))
    assert (tmp_path / "report.md").exists() and not (clone.root / "report.md").exists()


def test_changed_inputs_are_done_again_with_everything_that_stands_on_them(clone):
    clone.run()
    clone.change_setting("SFT_FLAGS", "--device-batch-size=3")
    assert clone.run() == FROM_SFT
    clone.change_setting("BASE_TRAIN_FLAGS", "--num-iterations=3")
    assert clone.run() == ALL[4:]
    clone.change_setting("VOCAB_SIZE", 333)
    assert clone.run() == ALL[1:]
    clone.change_setting("DATA_FLAGS", "--seed=3")
    assert clone.run() == ALL
    assert clone.run() == ["report"]


def test_what_a_description_says_is_an_input(clone, tmp_path):
    (tmp_path / "me.txt").write_text("name: Ann")
    mine = dict(folder=tmp_path, script=str(clone.root / "speedrun.sh"), IDENTITY="me.txt")
    clone.run()
    assert clone.run(**mine) == ["make_identity", *FROM_SFT]
    calls = (clone.bin / "calls").read_text()
    file = clone.base / "task_data" / "identity_of_me.jsonl"
    assert f"--about={tmp_path}/me.txt --output={file} --force\n" in calls and f" --identity={file} " in calls
    assert clone.run(**mine) == ["report"]
    (tmp_path / "me.txt").write_text("name: Bob")
    assert clone.run(**mine) == ["make_identity", *FROM_SFT]


def test_hours_are_planned_once_and_then_stay_with_their_model(clone):
    """A second timing might find another depth, and the interrupted model would not be gone on with."""
    clone.set("plan", '{"depth": 8, "hours": 1}\n')
    clone.set("fail", "chat_sft")
    calls = clone.run("--hours=0.5", code=7)
    assert calls[0] == "plan" and calls[-1] == "chat_sft" and "base_train" in calls
    assert "--depth=8 " in (clone.bin / "calls").read_text() and clone.mark("03_pretrain", "tiny-d8").exists()
    assert "at most 0.5 hours" in clone.output
    clone.set("fail", "")
    clone.set("plan", '{"depth": 10}\n')
    assert clone.run("--hours=0.5")[0] == "chat_sft --resume"
    assert clone.run("--hours=1")[:2] == ["plan", "base_train"]
    assert clone.mark("03_pretrain", "tiny-d10").exists()


def test_hours_for_which_nothing_is_found_stop_before_anything_runs(clone):
    clone.set("fail", "scripts.plan")
    assert clone.run("--hours=0.1", code=7) == ["plan"]
    assert not (clone.base / "marks").exists()
    clone.set("fail", "")
    clone.set("plan", "nothing\n")
    assert clone.run("--hours=0.1", code=1) == ["plan"]
    assert not (clone.base / "marks").exists()


def test_hours_need_the_set_up_first(clone):
    (clone.root / ".venv" / ".nanochat-ready").unlink()
    clone.run("--hours=1", "--dry-run", code=1)
    assert len(clone.output.splitlines()) == 1 and "bash runs/00_setup.sh" in clone.output
    (clone.root / "runs" / "00_setup.sh").write_text("echo set-up\n")
    clone.set("plan", '{"depth": 8}\n')
    assert clone.run("--hours=1", "--only=3")[0] == "plan"
    assert clone.output.splitlines()[:2] == ["--hours needs the planner: set-up comes first", "set-up"]


def test_number_of_gpus_and_wandb_name_are_no_inputs(clone):
    clone.gpus([H100] * 8)
    assert clone.run("--profile=gpt2", "--only=3") == ["base_train"]
    assert clone.run(script="runs/03_pretrain.sh") == []
    clone.gpus([H100] * 4)
    environment = {"WANDB_RUN": "another"}
    assert clone.run("--profile=gpt2", script="runs/03_pretrain.sh", **environment) == []


def test_an_interrupted_stage_goes_on(clone):
    clone.set("fail", "base_train")
    assert clone.run(code=7) == ALL[:5]
    assert "03_pretrain: stopped (exit 7)" in clone.output
    clone.set("fail", "")
    assert clone.run() == ["base_train --resume", *ALL[5:]]


def test_other_inputs_do_not_go_on_with_the_interrupted_work(clone):
    clone.set("fail", "base_train")
    clone.run(code=7)
    clone.set("fail", "")
    clone.change_setting("BASE_TRAIN_FLAGS", "--num-iterations=3")
    assert clone.run()[0] == "base_train"


def test_ctrl_c_leaves_no_mark(clone):
    clone.set("wait", "base_train")
    process = clone.start()
    deadline = time.time() + 30
    while "base_train" not in clone.called() and time.time() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == 130, output
    assert not clone.mark("03_pretrain").exists()
    clone.set("wait", "")
    assert clone.run()[0] == "base_train --resume"


def test_from_and_only_redo_finished_stages(clone):
    clone.run()
    assert clone.run("--from", "sft") == FROM_SFT
    assert clone.run("--only", "4") == ["base_eval", "chat_eval"]
    assert clone.run() == ["report"]
    assert clone.run("--only", "pretrain") == ["base_train"]
    assert clone.run() == ALL[5:]


def test_a_deleted_mark_redoes_what_stands_on_it(clone):
    clone.run()
    clone.mark("05_sft").unlink()
    assert clone.run() == FROM_SFT


def test_another_profile_on_the_same_corpus_does_not_undo_a_model(clone):
    clone.run("--profile=tiny")
    assert clone.run("--profile=smoke") == ALL
    assert clone.run("--profile=tiny") == [*ALL[:4], "report"]  # the corpus was replaced; the model stands


def test_a_download_that_fails_stops_the_stage_that_waits_for_it(clone):
    clone.gpus([H100] * 8)
    clone.set("fail", "nanochat.dataset -n 170")
    clone.set("wait", "tokenize")
    began = time.time()
    clone.run("--only=2", code=1)
    assert time.time() - began < 30
    assert "failed (exit 7): no such luck" in clone.output
    assert not clone.mark("02_tokenizer", "corpus-climbmix").exists()


def test_a_disk_too_small_for_the_profile_stops_it_first(clone):
    clone.gpus([H100] * 8)
    clone.free_disk(20)
    assert clone.run(code=1) == []
    assert re.search(r"profile gpt2 needs \d+ GB .* 20 GB are free", clone.output.splitlines()[-1])


def test_without_set_up_a_stage_says_what_to_run(clone):
    shutil.rmtree(clone.root / ".venv")
    process = subprocess.run(
        ["bash", "runs/03_pretrain.sh"], cwd=clone.root, env=clone.env, capture_output=True, text=True
    )
    assert process.returncode == 1 and "bash runs/00_setup.sh" in process.stderr


# ---------------------------------------------------------------------------------------------------------- set-up

# A python3 of a given version. `-m venv` copies the stand-in; pip is the stand-in's.
SYSTEM_PYTHON = """#!/bin/bash
case "$*" in
  *version_info*) echo {version} ;;
  *"import venv"*) exit {venv} ;;
  "-m venv"*) mkdir -p "${{@: -1}}/bin" && cp {stand_in} "${{@: -1}}/bin/python" ;;
  *) exit 1 ;;
esac
"""
PIP = """#!/bin/bash
case "$*" in
  *importlib* | -) exit 1 ;;
  *"pip install"*) echo "$*" >>"{log}"; case "$*" in *{broken}*) echo "ERROR: nobody answers"; exit 1 ;; esac ;;
  *"pip config"*) exit 1 ;;
  *torch.__version__*) echo "Python 3.12 torch 2.13.0+cpu" ;;
esac
exit 0
"""


@pytest.fixture
def setup(clone, tmp_path):
    def run(version="3.12", venv=0, broken="nothing", gpus=(), **environment):
        shutil.rmtree(clone.root / ".venv", ignore_errors=True)
        clone.gpus(gpus)
        log = tmp_path / "pip"
        log.write_text("")
        write_tool(tmp_path / "stand_in", PIP.format(log=log, broken=broken))
        text = SYSTEM_PYTHON.format(version=version, venv=venv, stand_in=tmp_path / "stand_in")
        for name in ("python", "python3", *(f"python3.{minor}" for minor in range(10, 14))):
            write_tool(clone.tools / name, text)
        env = clone.env | {"PATH": f"{clone.tools}:/usr/bin:/bin"} | environment
        done = subprocess.run(["bash", "runs/00_setup.sh"], cwd=clone.root, env=env, capture_output=True, text=True)
        return done, log.read_text().splitlines()

    if shutil.which("uv", path="/usr/bin:/bin") or sys.platform != "linux":
        pytest.skip("written for Linux, with uv nowhere in /usr/bin")
    return run


def one_line(done, *words):
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and all(word in done.stderr for word in words), done.stderr


def test_set_up_names_a_python_that_is_too_old(setup, clone):
    done, installs = setup(version="3.9")
    one_line(done, "Python 3.10 or newer", "python3=3.9")
    assert not installs and not (clone.root / ".venv").exists()


def test_set_up_names_a_missing_venv_module(setup, clone):
    done, installs = setup(venv=1)
    one_line(done, "no venv module", "python3-venv")
    assert not installs and not (clone.root / ".venv").exists()


def test_set_up_names_a_full_disk(setup, clone):
    clone.free_disk(1)
    done, installs = setup()
    one_line(done, "need 3 GB", "1 GB are free")
    assert not installs and not (clone.root / ".venv").exists()


def test_set_up_without_a_gpu_never_asks_for_a_cuda_build(setup, clone):
    done, installs = setup(broken="index-url")
    one_line(done, "no CPU build of torch", "nobody answers", "PIP_FIND_LINKS")
    assert len(installs) == 1 and "torch==2.13.0+cpu" in installs[0]
    assert not (clone.root / ".venv" / ".nanochat-ready").exists()


def test_set_up_takes_the_wheel_that_find_links_offers(setup, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    done, installs = setup(PIP_FIND_LINKS=str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stderr
    assert f"--no-index --no-deps --find-links {tmp_path}/wheels torch==2.13.0+cpu" in installs[0]
    assert len(installs) == 2 and installs[1].endswith("install --disable-pip-version-check -e .")


def test_set_up_falls_back_on_the_index_when_the_wheel_does_not_fit(setup, tmp_path):
    (tmp_path / "wheels").mkdir()
    (tmp_path / "wheels" / "torch-2.13.0+cpu-cp311-cp311-linux_x86_64.whl").touch()
    done, installs = setup(broken="no-index", PIP_FIND_LINKS=str(tmp_path / "wheels"))
    assert done.returncode == 0, done.stderr
    assert "--index-url" in installs[1] and "torch==2.13.0+cpu" in installs[1]


def test_set_up_survives_the_lack_of_flash_attention(setup):
    done, installs = setup(broken="gpu", gpus=[H100])
    assert done.returncode == 0, done.stderr
    assert installs[0].endswith("torch==2.13.0") and installs[-1].endswith("-e .[gpu]")
    assert len([line for line in done.stdout.splitlines() if "flash-attn-4 could not be installed" in line]) == 1


def test_set_up_names_a_failed_installation(setup, clone):
    done, _ = setup(broken="'-e .'")
    one_line(done, "could not be installed", "nobody answers", "setup.log")
    assert not (clone.root / ".venv" / ".nanochat-ready").exists()
