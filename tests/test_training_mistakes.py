"""What people get wrong with the training stages is said in one line, with what mends it."""

import shutil

import pytest
from small_runs import BASE, complaint, make_world, pretrain, rename_model, teach, the_tokenizer

from nanochat import checkpoint, dataset, paths
from nanochat.tokenizer import Tokenizer
from scripts import base_train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    yield from make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ("--vocab-size 999", ["no tokenizer", "python -m scripts.tok_train --corpus tinyworld --vocab-size 999"]),
        ("--total-batch-size 500", ["500", "448 or 512"]),
        ("--head-dim 15", ["15", "even"]),
        ("--window-pattern SXL", ["SXL", "S and L"]),
        ("--num-iterations -1 --target-param-data-ratio 0.001", ["less than one batch", "--num-iterations"]),
        ("--resume-from-step 5", ["'wrong'"]),
        ("--device-type tpu", ["'tpu'", "cuda, cpu or mps"]),
    ],
)
def test_base_train_says_what_is_wrong_with_its_flags(world, flags, parts):
    message = complaint(pretrain, "wrong", f"--num-iterations 2 {flags}")
    assert all(part in message for part in parts), message
    assert not paths.checkpoint_dir("base", "wrong").exists()


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 0",
        "--depth x",
        "--total-batch-size 0",
        "--total-batch-size -512",
        "--device-batch-size 0",
        "--max-seq-len 0",
        "--num-iterations 0",
        "--resume --resume-from-step 4",
        "--fp8-recipe other",
        "--keep 0",
        "--stop-after 0",
        "--save-minutes 0",
        "--on-nan ignore",
    ],
)
def test_flags_that_cannot_be_are_refused_before_anything_starts(flags, capsys):
    with pytest.raises(SystemExit) as error:
        base_train.parse_args(f"{BASE} {flags}".split())
    assert error.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_a_corpus_that_is_not_there_names_the_command(world):
    shutil.copytree(paths.tokenizer_dir("tinyworld-512"), paths.tokenizer_dir("nowhere-512"))
    message = complaint(pretrain, "wrong", "--corpus nowhere --num-iterations 2")
    assert "nowhere" in message and "nanochat.dataset" in message


def test_text_without_tokens_names_the_command(world):
    Tokenizer.train(["some other text, and more of it"] * 9, 270).save(paths.tokenizer_dir("tinyworld-270"))
    message = complaint(pretrain, "wrong", "--vocab-size 270 --num-iterations 2")
    assert "python -m nanochat.dataset tokenize --corpus tinyworld" in message


def test_a_resume_with_another_model_says_so(world):
    message = complaint(pretrain, "d2", "--num-iterations 20 --resume --aspect-ratio 32")
    assert "step_000012" in message and "32" in message
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "d2")) == [4, 8, 12]


@pytest.fixture
def retrained(world):
    """The tokenizer was trained anew since the models were."""
    path = paths.tokenizer_dir("tinyworld-512") / "tokenizer.json"
    old = path.read_bytes()
    other = [text[::-1] for text in dataset.iter_documents("tinyworld", "train")]
    Tokenizer.train(other, 512).save(path.parent)
    dataset.tokenize("tinyworld", the_tokenizer(), num_workers=1, progress=False)
    yield
    path.write_bytes(old)


def test_a_model_is_not_resumed_with_another_tokenizer(world, retrained):
    shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", "stranger"))
    assert "tokenizer" in complaint(pretrain, "stranger", "--num-iterations 20 --resume")


def test_a_model_is_not_taught_with_another_tokenizer(world, retrained):
    message = complaint(teach, "d2", "--num-iterations 1")
    assert "tinyworld-512" in message and "python -m scripts.base_train" in message


@pytest.mark.parametrize(
    ("tag", "flags", "parts"),
    [
        ("nobody", "", ["'nobody'", "python -m scripts.base_train"]),
        ("d2", "--model-step 5", ["no step 5", "4, 8, 12"]),
        ("d2", "--max-seq-len 60", ["512", "480 or 540"]),
        ("d2", "--mixture default --identity /no/such/file.jsonl", ["/no/such/file.jsonl"]),
    ],
)
def test_chat_sft_says_what_is_wrong_with_its_flags(world, tag, flags, parts):
    message = complaint(teach, tag, f"--num-iterations 1 {flags}")
    assert all(part in message for part in parts), message


def test_a_base_model_without_moments_says_so(world):
    shutil.copytree(paths.checkpoint_dir("base", "d2"), paths.checkpoint_dir("base", "bare"))
    rename_model("bare")
    for path in paths.checkpoint_dir("base", "bare").glob("*/optim_*"):
        path.unlink()
    assert "no optimizer state" in complaint(teach, "bare", "--num-iterations 1")
    teach("bare", "--num-iterations 1 --load-optimizer 0")
