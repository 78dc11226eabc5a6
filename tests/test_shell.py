"""The shell scripts: they parse, they run on an old bash, and --dry-run prints the commands of every profile."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import base_train

ROOT = Path(__file__).resolve().parents[1]
STAGES = sorted((ROOT / "runs").glob("0*.sh"))
SCRIPTS = sorted([ROOT / "speedrun.sh", *(ROOT / "runs").glob("*.sh"), ROOT / ".ci" / "run"])

pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="no bash on this machine")


@pytest.fixture
def bash(tmp_path):
    """Runs `bash ARGUMENTS` on a machine with the given GPUs: (name, MiB) each."""

    def run(*arguments, gpus=(), folder=ROOT, **environment):
        tools = tmp_path / "tools"
        tools.mkdir(exist_ok=True)
        smi = tools / "nvidia-smi"
        lines = "\n".join(f"echo '{memory}, {name}'" for name, memory in gpus) or "exit 9"
        smi.write_text(f"#!/bin/sh\n{lines}\n")
        smi.chmod(0o755)
        skip = "NANOCHAT_|WANDB_|CUDA_|SINGLE_HOURS|IDENTITY|OMP_"
        env = {k: v for k, v in os.environ.items() if not re.match(skip, k)}
        env |= {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
        command = ["bash", *map(str, arguments)]
        return subprocess.run(command, cwd=folder, env=env | environment, capture_output=True, text=True, timeout=60)

    return run


def dry(bash, *flags, **keywords):
    done = bash("speedrun.sh", "--dry-run", *flags, **keywords)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def modules(lines):
    return [found[1] for line in lines if (found := re.search(r"-m (nanochat\.\w+|scripts\.\w+)", line))]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses(bash, script):
    done = bash("-n", script)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "-x", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What macOS's bash 3.2 and BSD tools do not know.
TOO_NEW = {
    "associative array": r"\b(declare|local|typeset)\s+-[a-zA-Z]*A",
    "mapfile": r"\b(mapfile|readarray)\b",
    "case conversion": r"\$\{\w+(,,?|\^\^?)",
    "name reference": r"\b(declare|local)\s+-n\b",
    "wait -n": r"\bwait\s+-n\b",
    "|&": r"\|&",
    "&>>": r"&>>",
    "coproc": r"\bcoproc\b",
    "negative substring": r"\$\{\w+:[^}]*:\s*-",
    "EPOCHSECONDS": r"\$\{?EPOCH",
    "printf time": r"%\(.*\)T",
    "${x@Q}": r"\$\{\w+@[A-Z]\}",
    "readlink -f": r"\breadlink\s+-f",
    "realpath": r"\brealpath\b",
    "sed -i": r"\bsed\s+(-[a-zA-Z]+\s+)*-i",
    "GNU sed or grep": r"\bsed\s+-r\b|\bgrep\s+(-\w+\s+)*-\w*P",
    "date -d": r"\bdate\s+(-\w+\s+)*(-d|--)",
    "date %N": r"\bdate\b.*%[0-9]*N",
    "stat": r"\bstat\s+-",
    "nproc, free": r"(^|\$\(|[|;&])\s*(nproc|free)(\s|\)|$)",
    "xargs -r": r"\bxargs\s+-\w*r",
    "head in a pipe (what it cuts off dies of SIGPIPE, and pipefail takes the script along)": r"\|\s*head\b",
    "timeout": r"^\s*timeout\s|[|&(]\s*timeout\s",
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_nothing_needs_a_newer_bash_or_gnu_tools(script):
    lines = [line for line in script.read_text().splitlines() if not line.lstrip().startswith("#")]
    found = [f"{what}: {line}" for what, pattern in TOO_NEW.items() for line in lines if re.search(pattern, line)]
    assert not found


def test_the_gpt2_dry_run_is_the_gpt2_speedrun(bash):
    lines = dry(bash, "--profile", "gpt2")
    run = "torchrun --standalone --nproc_per_node=8 -m"
    tokenizer = "--corpus=climbmix --vocab-size=32768"
    assert lines[:7] == [
        "bash runs/00_setup.sh",
        "python -m nanochat.dataset -n 8",
        "python -m nanochat.dataset -n 170 &",
        f"python -m scripts.tok_train {tokenizer} --num-files=8",
        f"python -m nanochat.dataset tokenize {tokenizer} -n 170 --wait",
        "wait",
        f"python -m scripts.tok_eval {tokenizer}",
    ]
    pretrain, base_eval, base_chat, identity, sft, chat_eval, rl, report = lines[7:]
    assert pretrain.startswith(f"{run} scripts.base_train -- --depth=24 --target-param-data-ratio=8 ")
    assert {"--fp8", "--device-batch-size=16", "--model-tag=d24", "--run=dummy"} < set(pretrain.split())
    evaluation = "--eval=core,bpb,sample --bundle=eval_bundle --model-tag=d24"
    assert base_eval.startswith(f"{run} scripts.base_eval -- {evaluation}")
    assert base_chat == f"{run} scripts.chat_eval -- -i base -a 'ARC-Easy|ARC-Challenge|MMLU' -g d24"
    assert identity == "python dev/make_identity.py"
    assert sft.startswith(f"{run} scripts.chat_sft -- --mixture=default") and "--identity" not in sft
    assert chat_eval == f"{run} scripts.chat_eval -- -i sft -g d24"  # all six tasks
    assert rl.startswith("# 07_rl: off in profile gpt2") and f"{run} scripts.chat_rl -- --model-tag=d24" in rl
    assert report == "python -m nanochat.report generate --model-tag=d24"


@pytest.mark.parametrize("profile", ["smoke", "tiny"])
def test_small_profiles_run_offline_in_one_process(bash, profile):
    lines = dry(bash, "--profile", profile)
    wanted = (
        "tinyworld tok_train dataset tok_eval base_train base_eval chat_eval chat_sft chat_eval chat_rl chat_eval "
        "report".split()
    )
    assert [name.split(".")[1] for name in modules(lines)] == wanted
    assert not [line for line in lines if "torchrun" in line or "climbmix" in line]
    assert len([line for line in lines if f"={profile}" in line or f"-g {profile}" in line]) >= 5


@pytest.mark.parametrize(
    "gpus, tag, launcher",
    [
        ([], "tiny", "python -m scripts.base_train"),
        ([("NVIDIA GeForce RTX 4090", 24564)], "d12", "--nproc_per_node=1 "),
        ([("NVIDIA H100 80GB HBM3", 81559)] * 3, "d18", "--nproc_per_node=2 "),
        ([("NVIDIA H100 80GB HBM3", 81559)] * 8, "d24", "--nproc_per_node=8 "),
        ([("Some Card", 8192)], "d8", "--nproc_per_node=1 "),
    ],
)
def test_the_profile_follows_the_machine(bash, gpus, tag, launcher):
    (line,) = dry(bash, "--only", "pretrain", gpus=gpus)
    assert f"--model-tag={tag} " in line and launcher in line


def test_hidden_gpus_do_not_count(bash):
    gpus = [("NVIDIA H100 80GB HBM3", 81559)] * 8
    (line,) = dry(bash, "--only", "03", gpus=gpus, CUDA_VISIBLE_DEVICES="")
    assert "--model-tag=tiny" in line
    (line,) = dry(bash, "--only", "03", gpus=gpus, CUDA_VISIBLE_DEVICES="2,3")
    assert "--nproc_per_node=2 " in line


def test_more_hours_buy_depth_and_less_memory_fewer_rows(bash):
    def pretrain(memory, hours):
        gpus = [("NVIDIA A100", memory)]
        lines = dry(bash, "--profile=single", "--from=3", gpus=gpus, SINGLE_HOURS=str(hours))[:2]
        return [int(re.search(rf"--{flag}=(\d+)", " ".join(lines))[1]) for flag in ("depth", "device-batch-size")]

    assert pretrain(81920, 24)[0] > pretrain(81920, 4)[0]
    assert pretrain(20480, 2)[1] < pretrain(81920, 2)[1]


def test_the_long_runs_save_by_the_clock_and_keep_two(bash):
    for profile in ("single", "gpt2"):
        lines = dry(bash, "--profile", profile)
        for stage in ("base_train", "chat_sft"):
            (line,) = [line for line in lines if f"scripts.{stage} " in line]
            assert "--save-minutes=10" in line and "--keep=2" in line


# -- several nodes

STAND_IN = '#!/bin/sh\necho "$*"\nenv | grep -E "^(PET_|TORCH_|OMP_|HEAD|NODES|JOB)"\n'


@pytest.fixture
def stand_in(tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    return str(python)


def test_a_node_of_several_starts_torchrun_which_goes_on(bash, stand_in):
    gpus = [("NVIDIA H100 80GB HBM3", 81559)] * 4
    where = dict(NANOCHAT_PYTHON=stand_in, HEAD="node0", NODES="2", JOB="long")
    done = bash("runs/multinode.sh", "scripts.base_train", "--depth=24", gpus=gpus, **where)
    command, *environment = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert command.startswith("-m torch.distributed.run --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d ")
    assert "--rdzv-endpoint=node0:29400 --rdzv-id=long" in command
    assert command.endswith("-m scripts.base_train -- --depth=24 --resume")
    assert "PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" in environment
    back = bash("runs/multinode.sh", "scripts.base_train", "--resume-from-step=5", **where)
    assert back.returncode == 2 and "every restart" in back.stderr


@pytest.mark.parametrize(
    ("missing", "stage"), [("HEAD", "scripts.base_train"), ("NODES", "scripts.base_train"), ("stage", "--depth=24")]
)
def test_several_nodes_say_what_is_missing(bash, stand_in, missing, stage):
    where = {"NANOCHAT_PYTHON": stand_in, "HEAD": "node0", "NODES": "2"}
    where.pop(missing, None)
    done = bash("runs/multinode.sh", stage, **where)
    assert done.returncode == 2 and missing in done.stderr and not done.stdout


def test_a_slurm_job_whose_time_is_up_stops_its_training_and_queues_again(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    ready = tmp_path / "ready"
    for name, text in {
        "scontrol": f'if [ "$1" = show ]; then echo node3; echo node4; else echo "$*" >>{tmp_path}/queued; fi',
        # a step that ends with 1 a second after its signal, as torchrun does
        "srun": f"trap 'sleep 1; exit 1' USR1\necho $HEAD $NODES $* >{ready}\nwhile :; do sleep 0.1; done",
    }.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    slurm = dict(
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_NODELIST="node[3-4]",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_ID="77",
        SLURM_CPUS_PER_TASK="8",
    )
    env = os.environ | slurm | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "runs/slurm.sh", "scripts.base_train", "--depth=24"], cwd=ROOT, env=env)
    deadline = time.time() + 30
    while not (ready.exists() and ready.read_text()) and time.time() < deadline:
        time.sleep(0.05)
    assert (
        ready.read_text()
        == "node3 2 --cpus-per-task=8 --kill-on-bad-exit=1 bash runs/multinode.sh scripts.base_train --depth=24\n"
    )
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=30) == 1
    assert (tmp_path / "queued").read_text() == "requeue 77\n"


@pytest.mark.parametrize("stage", ["3", "03", "pretrain", "03_pretrain"])
def test_only_takes_a_number_or_a_name(bash, stage):
    assert modules(dry(bash, "--profile", "tiny", "--only", stage)) == ["scripts.base_train"]


def test_from_takes_the_stage_and_all_after_it(bash):
    names = modules(dry(bash, "--profile=tiny", "--from=sft", "--serve"))
    assert names[0] == "scripts.chat_sft" and names[-1] == "scripts.chat_web" and "scripts.base_train" not in names


def test_depth_gives_another_model_another_tag(bash):
    (line,) = dry(bash, "--profile", "gpt2", "--depth", "12", "--only", "3")
    assert "--depth=12 " in line and "--model-tag=d12 " in line
    (line,) = dry(bash, "--profile", "tiny", "--depth", "6", "--only", "3")
    assert "--depth=6 " in line and "--model-tag=tiny-d6 " in line


@pytest.mark.parametrize(
    "profile, gpus, shape",
    [
        ("tiny", [], "--vocab-size=4096 --aspect-ratio=32 --head-dim=64 --max-seq-len=256 --window-pattern=L "),
        ("single", [("NVIDIA A100", 81920)] * 3, "--vocab-size=32768 --target-param-data-ratio=10.5 --gpus=2"),
        ("gpt2", [], "--target-param-data-ratio=8 --device-batch-size=16 --fp8 --gpus=8 --gpu=NVIDIA H100"),
    ],
)
def test_hours_give_the_depth_that_the_planner_finds_for_the_profile(bash, tmp_path, profile, gpus, shape):
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh\necho "$*" >>{tmp_path}/asked\necho '{{"depth": 14, "machine": {{"depth": 9}}}}'\n"""
    )
    python.chmod(0o755)
    flags = ("--profile", profile, "--only", "3", "--hours", "2.5")
    note, line = dry(bash, *flags, gpus=gpus, NANOCHAT_PYTHON=str(python))
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("-m scripts.plan --json --hours=2.5 --corpus=") and shape in asked
    assert note.startswith("# --hours 2.5: depth 14, by python -m scripts.plan --hours=2.5 ")
    assert line == dry(bash, *flags[:4], "--depth=14", gpus=gpus)[0]


def test_more_depth_than_24_reads_more_shards(bash):
    def shards(depth):
        lines = dry(bash, "--profile=gpt2", "--depth", depth)
        return {int(number) for line in lines for number in re.findall(r"(?:-n |--num-files=)(\d+)", line)} - {8}

    assert shards("12") == shards("24") == {170}
    (deeper,) = shards("30")
    assert 300 < deeper < 350


def test_the_wandb_name_is_passed_on(bash):
    lines = dry(bash, "--profile", "tiny", WANDB_RUN="my run")
    assert [line for line in lines if "base_train" in line][0].endswith("'--run=my run'")
    assert len([line for line in lines if "'--run=my run'" in line]) >= 2


@pytest.mark.parametrize("profile", ["smoke", "tiny", "single", "gpt2"])
def test_every_profile_teaches_a_description_of_ones_own(bash, tmp_path, profile):
    description = tmp_path / "my model.txt"
    description.write_text("name: Ann")
    make, sft = dry(bash, "--profile", profile, "--only=sft", IDENTITY=str(description))
    file = f"{tmp_path}/base/task_data/identity_of_my model.jsonl"
    assert make == f"python dev/make_identity.py '--about={description}' '--output={file}' --force"
    assert f"'--identity={file}'" in sft


def test_a_description_that_is_not_there_is_one_line_at_the_beginning(bash):
    for script in ("speedrun.sh", "runs/05_sft.sh"):
        done = bash(script, "--profile=smoke", IDENTITY="nowhere.txt")
        assert done.returncode == 1 and not done.stdout
        assert len(done.stderr.splitlines()) == 1 and f"{ROOT}/nowhere.txt" in done.stderr


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--profile", "huge"], "smoke, tiny, single or gpt2"),
        (["--profile"], "needs a value"),
        (["--depth", "many"], "whole number"),
        (["--depth=0"], "whole number"),
        (["--only", "nine"], "no stage 'nine'"),
        (["--from", "3", "--only", "4"], "exclude each other"),
        (["--hours", "2", "--depth", "4"], "exclude each other"),
        (["--hours"], "needs a value"),
        (["--hours=0.0"], "above 0"),
        (["--hours=2h"], "number of hours"),
        (["--hours=1.2.3"], "number of hours"),
        (["--profile=smoke", "--hours=1"], "tiny, single and gpt2"),
        (["--fast"], "unknown flag '--fast'"),
        (["tiny"], "unknown flag 'tiny'"),
    ],
)
def test_bad_flags_get_one_line_and_exit_2(bash, flags, word):
    done = bash("speedrun.sh", *flags)
    assert done.returncode == 2 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and word in done.stderr


def test_gpu_profiles_refuse_a_machine_without_one(bash):
    done = bash("speedrun.sh", "--profile", "gpt2")
    assert done.returncode == 1 and not done.stdout
    assert len(done.stderr.splitlines()) == 1 and "--profile tiny" in done.stderr


@pytest.mark.parametrize(
    "script", [ROOT / "speedrun.sh", ROOT / "runs" / "test.sh", *STAGES], ids=lambda path: path.name
)
def test_help_says_what_a_script_is_for(bash, script):
    done = bash(script, "--help")
    assert done.returncode == 0 and len(done.stdout.splitlines()) >= 2 and "shellcheck source" not in done.stdout


# -- sweeps


def words_of(done):
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines() if line.startswith("-m ")]


def test_the_sweeps_are_commands_only(bash, stand_in):
    """A driver, and what it says together; base_train's flags come last, so that a user's own win."""
    where = dict(NANOCHAT_PYTHON=stand_in)
    (quick,) = words_of(bash("runs/quick.sh", "--matrix-lr=0.03", SEEDS="3", **where))
    assert quick[:7] == "-m scripts.sweep quick --vary depth=12 --seeds 3".split() and quick[-1] == "--matrix-lr=0.03"
    (series,) = words_of(bash("runs/miniseries.sh", **where))
    assert "depth=12,14,16,18,20,22,24,26" in series and series[2:5] == "miniseries --then series".split()
    own = dict(NAME="mine", BUDGETS="1e18,1e19", DEPTHS="8,10", NPROC="4")
    (laws,) = words_of(bash("runs/scaling_laws.sh", "--fp8", **own, **where))
    assert laws[2:7] == "mine --then fit --drop-models --nproc=4".split() and laws[-1] == "--fp8"
    assert "target-flops=1e18,1e19" in laws and "depth=8,10" in laws
    for words in (quick, series, laws):
        flags = words[words.index("--") + 1 :]
        base_train.parse_args([*flags, "--depth=12", "--model-tag=x"])


@pytest.mark.parametrize("script", ["quick", "miniseries", "scaling_laws"])
def test_a_sweep_says_what_it_does(bash, script):
    done = bash(f"runs/{script}.sh", "--help")
    assert done.returncode == 0 and f"bash runs/{script}.sh" in done.stdout and "NAME" in done.stdout
