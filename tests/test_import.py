"""Runs of the public nanochat become ours: their numbers to the last bits, and nothing that their files say is run."""

import builtins
import copy
import io
import json
import math
import pickle
import random
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers import CPU
from safetensors.torch import load_file

from nanochat import chat, checkpoint, dataset, paths, public_files, results, tinyworld
from nanochat.engine import Engine, Request
from nanochat.optim import MuonAdamW, param_groups
from nanochat.public_run import PublicRunError, find_runs, import_run
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer
from scripts import base_eval, chat_sft
from tasks import mixtures

PUBLIC = Path(__file__).parent / "data" / "public"
RUN = PUBLIC / "run"
EXPECTED = json.loads((PUBLIC / "expected.json").read_text())
NAME = "tinyworld-600"
MODEL, OPTIM, META = "model_000030.pt", "optim_000030_rank0.pt", "meta_000030.json"


@pytest.fixture
def run(tmp_path):
    """A copy of the public run, to be changed."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def import_here(root=RUN, **options):
    return import_run(root, NAME, **options)


def refusal(root, **options):
    """The one line of an import that is refused; it has left nothing."""
    before = all_files(paths.base_dir())
    with pytest.raises(PublicRunError) as error:
        import_here(root, **options)
    assert all_files(paths.base_dir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def all_files(root):
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


def change(path, change):
    """Change what a .pt file holds, in place or by what is returned."""
    value = torch.load(path, weights_only=True)
    torch.save(change(value) or value, path)


def change_meta(root, change):
    path = root / "base_checkpoints" / "d2" / META
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


# -- what it is


def test_an_imported_run_has_the_numbers_of_the_public_one(base_dir):
    (folder,) = import_here()
    assert folder == paths.checkpoint_dir("base", "d2") / "step_000030"
    model, tokenizer, meta = checkpoint.load_model("base", CPU, "d2")
    assert tokenizer.special == EXPECTED["special"] and tokenizer.vocab_size == EXPECTED["vocab_size"]
    for example in EXPECTED["encodings"]:
        assert tokenizer.encode(example["text"]) == example["ids"]
    ids, mask = chat.render(tokenizer, EXPECTED["conversation"]["input"])
    assert (ids, mask) == (EXPECTED["conversation"]["ids"], EXPECTED["conversation"]["mask"])
    expected = load_file(PUBLIC / "expected.safetensors")
    with torch.no_grad():
        error = (model(expected["idx"]) - expected["logits"]).abs().max() / expected["logits"].abs().max()
    assert error < 2e-6  # 3e-7 was seen
    prompt, following = EXPECTED["greedy"]["prompt"], EXPECTED["greedy"]["next"]
    engine = Engine(model, tokenizer, 1, len(prompt) + len(following))
    assert engine.generate([Request(prompt, max_tokens=len(following))]) == [following]
    assert (meta["step"], meta["tag"], meta["stage"]) == (30, "d2", "base")
    assert meta["imported"]["public_meta"] == json.loads((RUN / "base_checkpoints" / "d2" / META).read_text())


def test_prefixes_of_compilation_and_bfloat16_tables_are_read(base_dir, run):
    path = run / "base_checkpoints" / "d2" / MODEL

    def as_compiled(weights):
        tables = ("transformer.wte.weight", "value_embeds.1.weight")
        return {f"_orig_mod.{k}": v.bfloat16() if k in tables else v for k, v in weights.items()}

    change(path, as_compiled)
    (folder,) = import_here(run)
    ours = load_file(folder / "model.safetensors")
    theirs = torch.load(RUN / "base_checkpoints" / "d2" / MODEL, weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == torch.float32
        table = "wte" in name or "value_embeds" in name
        assert torch.equal(weight, theirs[name].bfloat16().float() if table else theirs[name]), name


def test_names_stages_and_steps_are_chosen_as_elsewhere(base_dir, run):
    tags = run / "base_checkpoints"
    shutil.copytree(tags / "d2", tags / "other")
    shutil.copytree(tags / "d2", run / "chatsft_checkpoints" / "d2")
    for file in (MODEL, META):
        shutil.copy(tags / "d2" / file, tags / "d2" / file.replace("30", "31"))
    there = [(c.stage, c.tag, c.step) for c in find_runs(run)]
    assert there == [("base", "d2", 30), ("base", "d2", 31), ("base", "other", 30), ("sft", "d2", 30)]
    assert [path.name for path in import_here(run)] == ["step_000031", "step_000030"]  # of base and sft d2
    (folder,) = import_here(run, tag="other", new_tag="mine")
    assert folder == paths.checkpoint_dir("base", "mine") / "step_000030"
    assert checkpoint.load_model("base", CPU, "mine")[2]["tag"] == "mine"
    assert checkpoint.load_model("sft", CPU)[2]["stage"] == "sft"
    assert "rl" in refusal(run, stages=["rl"]) and "step 7" in refusal(run, step=7)
    assert "base other step 30" in refusal(run, tag="nobody")
    assert "no public run" in refusal(run / "tokenizer")


def test_a_public_run_may_lie_in_our_own_folder(base_dir):
    """The public project keeps its files in the same place by default."""
    shutil.copytree(RUN, base_dir)
    before = all_files(base_dir)
    import_here(base_dir)
    checkpoint.load_model("base", CPU)
    assert before.items() <= all_files(base_dir).items()
    assert "--force" in refusal(base_dir)


# -- the optimizer


def public_names():
    """Parameter names by their index in the public optimizer file, written down by hand."""
    attn, mlp = "transformer.h.{}.attn.{}.weight", "transformer.h.{}.mlp.{}.weight"
    return [
        *("lm_head.weight", "transformer.wte.weight", "value_embeds.1.weight", "resid_lambdas", "x0_lambdas"),
        *("smear_gate.weight", "smear_lambda", "backout_lambda", attn.format(1, "ve_gate")),
        *(attn.format(i, kind) for i in (0, 1) for kind in ("c_k", "c_v")),
        *(attn.format(i, kind) for i in (0, 1) for kind in ("c_q", "c_proj")),
        *(mlp.format(i, "c_proj") for i in (0, 1)),
        *(mlp.format(i, "c_fc") for i in (0, 1)),
    ]


def public_moments():
    """name -> state -> values, of the golden file."""
    saved = torch.load(RUN / "base_checkpoints" / "d2" / OPTIM, weights_only=True)
    names, moments = public_names(), {}
    for group in saved["param_groups"]:
        for i, index in enumerate(group["params"]):
            if group["kind"] == "adamw":
                moments[names[index]] = {key: saved["state"][index][key] for key in ("exp_avg", "exp_avg_sq")}
            else:
                moments[names[index]] = {key: stack[i] for key, stack in saved["state"][group["params"][0]].items()}
    return moments


def split(folder, world_size):
    """The golden optimizer file as so many ranks would have written it."""
    whole = torch.load(folder / OPTIM, weights_only=True)
    for rank in range(world_size):
        part = copy.deepcopy(whole)
        for group in part["param_groups"]:
            for state in (part["state"][index] for index in group["params"] if index in part["state"]):
                for key, value in state.items():
                    if key == "step" or (group["kind"] == "adamw" and value.numel() < 1024):
                        continue
                    count = math.ceil(len(value) / world_size)
                    mine = value[rank * count : (rank + 1) * count].clone()
                    if group["kind"] == "muon":
                        mine = torch.cat([mine, torch.zeros(count - len(mine), *value.shape[1:])])
                    state[key] = mine
        torch.save(part, folder / f"optim_000030_rank{rank}.pt")


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_optimizer_state_arrives_under_its_names(base_dir, run, world_size):
    if world_size > 1:
        split(run / "base_checkpoints" / "d2", world_size)
    (folder,) = import_here(run)
    assert len(list(folder.glob("optim_*"))) == world_size
    model, _, _ = checkpoint.load_model("base", CPU, "d2")
    optimizer = MuonAdamW(param_groups(model.roles(), 64))
    checkpoint.load_optimizer(folder, optimizer)
    expected = public_moments()
    assert optimizer.steps == 30
    assert optimizer.state.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name, states in expected.items():
        assert optimizer.state[name].keys() == states.keys()
        for key, value in states.items():
            assert torch.equal(optimizer.state[name][key], value) and value.any(), (name, key)


def test_a_model_without_optimizer_file_is_imported_and_that_is_said(base_dir, run, capsys):
    (run / "base_checkpoints" / "d2" / OPTIM).unlink()
    (folder,) = import_here(run)
    assert "no optimizer state" in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "model.safetensors"]
    assert "optimizer_steps" not in checkpoint.read_meta(folder)


def test_an_optimizer_file_that_does_not_fit_is_refused(base_dir, run):
    folder = run / "base_checkpoints" / "d2"
    split(folder, 3)
    (folder / "optim_000030_rank1.pt").unlink()
    assert "ranks 0, 2" in refusal(run)
    (folder / "optim_000030_rank2.pt").unlink()
    assert "exp_avg of lm_head.weight is (214, 64), expected (640, 64)" in refusal(run)
    shutil.copy(RUN / "base_checkpoints" / "d2" / OPTIM, folder / OPTIM)
    change(folder / OPTIM, lambda saved: saved["param_groups"].pop() and None)
    assert "March 2026" in refusal(run)
    change(folder / OPTIM, lambda saved: saved.pop("param_groups") and None)
    assert "KeyError" in refusal(run)


# -- what it is not


def test_another_architecture_is_refused(base_dir, run):
    path = run / "base_checkpoints" / "d2" / MODEL
    change(path, lambda weights: weights.pop("smear_lambda") and None)
    message = refusal(run)
    assert "smear_lambda is missing" in message and "March 2026" in message
    change(path, lambda weights: weights | {"smear_lambda": torch.zeros(2), "transformer.h.0.new": torch.zeros(3)})
    message = refusal(run)
    assert "smear_lambda is (2,), expected (1,)" in message and "'transformer.h.0.new' is unknown" in message
    torch.save([torch.zeros(3)], path)
    assert "no table of tensors" in refusal(run)
    path.write_bytes((RUN / "base_checkpoints" / "d2" / MODEL).read_bytes()[:9999])
    assert "fetch it again" in refusal(run) or "damaged" in refusal(run)


def test_a_meta_file_that_does_not_fit_is_refused(base_dir, run):
    change_meta(run, lambda meta: meta["model_config"].update(rope="yarn"))
    assert "'rope'" in refusal(run)
    change_meta(run, lambda meta: meta["model_config"].pop("rope"))
    for name, value in (("n_layer", 10**9), ("n_embd", True), ("n_head", "2"), ("n_head", 3), ("window_pattern", 5)):
        shutil.copy(RUN / "base_checkpoints" / "d2" / META, run / "base_checkpoints" / "d2" / META)
        change_meta(run, lambda meta, more={name: value}: meta["model_config"].update(more))
        refusal(run)
    shutil.copy(RUN / "base_checkpoints" / "d2" / META, run / "base_checkpoints" / "d2" / META)
    change_meta(run, lambda meta: meta["model_config"].update(vocab_size=601))
    assert "601" in refusal(run) and "600" in refusal(run)
    for damaged in ("", "[]", '{"model_config": 3}', "{", "[" * 100000):
        (run / "base_checkpoints" / "d2" / META).write_text(damaged)
        assert META in refusal(run)
    (run / "base_checkpoints" / "d2" / META).unlink()
    assert META in refusal(run)


def test_what_is_here_stays_unless_it_is_said_otherwise(base_dir, run):
    (folder,) = import_here()
    assert "--force" in refusal(RUN) and "--model-tag" in refusal(RUN)
    (folder / "meta.json").write_text((folder / "meta.json").read_text().replace('"step": 30', '"step": 29', 1))
    assert import_here(force=True) == [folder]
    assert checkpoint.read_meta(folder)["step"] == 30
    assert [path.name for path in folder.parent.iterdir()] == ["step_000030"]
    # a run of ours has the tag, at another step
    mine = folder.rename(folder.with_name("step_000007"))
    meta = checkpoint.read_meta(mine)
    del meta["imported"]
    (mine / "meta.json").write_text(json.dumps(meta))
    assert str(mine) in refusal(RUN)
    shutil.rmtree(mine)
    # a tokenizer of ours has the name
    other = Tokenizer.train(["one two three"] * 3, 265)
    other.save(paths.tokenizer_dir(NAME))
    assert "--tokenizer-name" in refusal(RUN)
    import_here(force=True)
    checkpoint.load_model("base", CPU, "d2")
    (moved,) = paths.tokenizer_dir(NAME).glob("tokenizer.json.before-*")
    assert json.loads(moved.read_text())["pattern"] == other.pattern


def test_an_import_that_fails_or_is_killed_half_way_leaves_nothing(base_dir, run, monkeypatch):
    (run / "base_checkpoints" / "d2" / OPTIM).write_bytes(b"PK")
    refusal(run)  # the model had been written by then

    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.public_run.read_moments", die)
        with pytest.raises(KeyboardInterrupt):
            import_here()
    assert checkpoint.list_steps(paths.checkpoint_dir("base", "d2")) == []
    import_here()
    checkpoint.load_model("base", CPU, "d2")


# -- hostile files


@pytest.fixture
def sentinel(tmp_path):
    """A path that hostile files try to make; the test asks that it is not there."""
    path = tmp_path / "ran"
    yield path
    assert not path.exists()


class Reduced:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def text(value):
    return b"\x8c" + bytes([len(value)]) + value.encode()


def encoding(state=b"}", build=b"b"):
    """A pickle of a tiktoken Encoding that is given the pickled `state`."""
    return b"\x80\x04" + text("tiktoken.core") + text("Encoding") + b"\x93)\x81" + state + build + b"."


def good_state():
    return public_files._unpickle(RUN / "tokenizer" / "tokenizer.pkl")


def with_state(state):
    return encoding(pickle.dumps(state, 4)[2:-1])


def hostile(path):
    """name -> (pickle, a part of the message)."""
    shell = f"touch {path}"
    call = text(shell) + b"\x85R"  # one argument, REDUCE
    evil = b"\x80\x04" + text("posix") + text("system") + b"\x93" + call
    opening = f"open({str(path)!r}, 'w')"
    return {
        "GLOBAL": (f"cos\nsystem\n(S'{shell}'\ntR.".encode(), "STRING"),
        "GLOBAL in protocol 2": (b"\x80\x02cos\nsystem\n" + call + b".", "'os.system'"),
        "STACK_GLOBAL": (evil + b".", "'posix.system'"),
        "eval": (pickle.dumps(Reduced(builtins.eval, opening), 4), "'builtins.eval'"),
        "exec": (pickle.dumps(Reduced(builtins.exec, opening), 4), "'builtins.exec'"),
        "in the state": (encoding(evil[2:]), "'posix.system'"),
        "in the ranks": (
            with_state({"name": "x", "mergeable_ranks": Reduced(builtins.eval, opening)}),
            "builtins.eval",
        ),
        "a method": (encoding().replace(text("Encoding"), text("Encoding.__init__")), "Encoding.__init__"),
        "globals by dots": (encoding().replace(text("Encoding"), text("Encoding.load.__globals__")), "refused"),
        "something else": (encoding().replace(text("Encoding"), text("functools")), "'tiktoken.core.functools'"),
        "copyreg": (b"\x80\x02ccopyreg\n_reconstructor\n.", "'copyreg._reconstructor'"),
        "getattr": (b"\x80\x02cbuiltins\ngetattr\n.", "'builtins.getattr'"),
        "EXT1": (b"\x80\x02\x82\x01.", "EXT1"),
        "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "EXT4"),
        "PERSID": (b"Pelsewhere\n.", "PERSID"),
        "BINPERSID": (b"\x80\x02K\x01Q.", "BINPERSID"),
        "INST": (f"(S'{shell}'\nios\nsystem\n.".encode(), "refused"),
        "INST alone": (b"(ios\ngetcwd\n.", "INST"),
        "OBJ": (b"(cos\ngetcwd\no.", "refused"),
        "NEWOBJ_EX": (encoding().replace(b")\x81", b")}\x92"), "NEWOBJ_EX"),
        "a large table": (b"\x80\x02Nr\xff\xff\xff\xff.", "remember"),
        "a large array": (b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".", "not a pickled tokenizer"),
        "the class is called": (encoding().replace(b")\x81", text("a") + b"\x85R"), "TypeError"),
        "the class is built": (encoding().replace(b")\x81", b""), "not a pickled tokenizer"),
        "slots": (encoding(b"N}" + text("find_class") + text("x") + b"s\x86"), "expected name"),
        "a dict is built": (b"\x80\x04}}" + text("a") + text("b") + b"sb.", "not a pickled tokenizer"),
        "its setstate": (encoding(b"}" + text("__setstate__") + text("x") + b"s"), "expected name"),
        "its class": (encoding(b"}" + text("__class__") + text("x") + b"s"), "expected name"),
        "no state": (encoding(b"", b""), "expected name"),
        "a public encoding": (encoding(text("cl100k_base")), "only names"),
        "a number": (b"\x80\x04K\x05.", "got a int"),
        "nothing": (b"", "not a pickled tokenizer"),
    }


@pytest.mark.parametrize("case", hostile(Path("x")))
def test_a_hostile_tokenizer_is_refused_and_nothing_ran(case, base_dir, run, sentinel):
    data, part = hostile(sentinel)[case]
    (run / "tokenizer" / "tokenizer.pkl").write_bytes(data)
    assert part in refusal(run)
    assert not base_dir.exists()


def test_what_it_takes_the_place_of_would_have_run(sentinel):
    """The attack is real: the ordinary unpickler runs it."""
    pickle.loads(hostile(sentinel)["STACK_GLOBAL"][0])
    assert sentinel.exists()
    sentinel.unlink()


def test_names_are_refused_by_the_unpickler_alone(sentinel):
    """Also without the look at the instructions that goes before."""
    for case in ("INST", "GLOBAL", "STACK_GLOBAL", "eval", "in the state", "PERSID", "BINPERSID", "EXT1", "OBJ"):
        data = hostile(sentinel)[case][0]
        with pytest.raises((PublicRunError, ValueError)):
            public_files._OneNameUnpickler(io.BytesIO(data)).load()
        assert not sentinel.exists()


@pytest.mark.filterwarnings("ignore:invalid escape:DeprecationWarning")  # pickletools looks into broken strings
def test_a_damaged_tokenizer_is_refused(tmp_path):
    path, whole = tmp_path / "tokenizer.pkl", (RUN / "tokenizer" / "tokenizer.pkl").read_bytes()
    noise = random.Random(7)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(PublicRunError):
            public_files.read_tokenizer(path)
    for _ in range(300):
        path.write_bytes(noise.randbytes(noise.randrange(200)))
        with pytest.raises(PublicRunError):
            public_files.read_tokenizer(path)
    for _ in range(300):  # a few bytes wrong: refused, or a tokenizer all the same
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[noise.randrange(len(damaged))] = noise.randrange(256)
        path.write_bytes(damaged)
        try:
            assert public_files.read_tokenizer(path).vocab_size == 600
        except PublicRunError as error:
            assert str(path) in str(error)
    path.write_bytes(whole)
    assert public_files.read_tokenizer(path).vocab_size == 600


def wrong_states():
    def changed(**changes):
        return good_state() | changes

    ranks, special = good_state()["mergeable_ranks"], good_state()["special_tokens"]
    last = max(ranks, key=ranks.get)
    return {
        "a gap": (changed(mergeable_ranks=ranks | {last: 591}), "0 to 590"),
        "twice": (changed(mergeable_ranks=ranks | {last: 0}), "0 to 590"),
        "negative": (changed(mergeable_ranks=ranks | {last: -1}), "0 to 590"),
        "a bool": (changed(mergeable_ranks=ranks | {b"\x01": True}), "table of bytes"),
        "text": (changed(mergeable_ranks={token.hex(): rank for token, rank in ranks.items()}), "table of bytes"),
        "a list": (changed(mergeable_ranks=None), "table of bytes"),
        "a byte": (changed(mergeable_ranks={(b"ZZZ" if k == b"Z" else k): v for k, v in ranks.items()}), "90"),
        "special away": (changed(special_tokens={k: v for k, v in special.items() if v < 599}), "<|output_end|>"),
        "special first": (changed(special_tokens={k: v - 591 for k, v in special.items()}), "591 to 599"),
        "special bytes": (changed(special_tokens={k.encode(): v for k, v in special.items()}), "table of str"),
        "pattern": (changed(pat_str=5), "text"),
        "a bad pattern": (changed(pat_str="(((("), "not a pickled tokenizer"),
        "name": (changed(name=None), "text"),
        "more": (changed(explicit_n_vocab=600), "expected name"),
    }


@pytest.mark.parametrize("case", wrong_states())
def test_a_tokenizer_that_is_not_whole_is_refused(case, base_dir, run):
    state, part = wrong_states()[case]
    (run / "tokenizer" / "tokenizer.pkl").write_bytes(with_state(state))
    assert part in refusal(run)


def test_a_tokenizer_may_have_more_special_tokens(tmp_path):
    state = good_state()
    state["special_tokens"]["<|more|>"] = 600
    (tmp_path / "tokenizer.pkl").write_bytes(with_state(state))
    tokenizer = public_files.read_tokenizer(tmp_path / "tokenizer.pkl")
    assert list(tokenizer.special) == [*SPECIAL_TOKENS, "<|more|>"] and tokenizer.vocab_size == 601


def test_a_tokenizer_file_that_is_too_large_or_missing_is_refused(base_dir, run):
    path = run / "tokenizer" / "tokenizer.pkl"
    with path.open("r+b") as file:
        file.truncate((64 << 20) + 1)
    assert "bytes" in refusal(run)
    path.unlink()
    assert "no tokenizer" in refusal(run)


@pytest.mark.parametrize("file", [MODEL, OPTIM])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_hostile_torch_file_is_refused_and_nothing_ran(base_dir, run, sentinel, file, legacy):
    path = run / "base_checkpoints" / "d2" / file
    value = torch.load(path, weights_only=True)
    value["state" if "state" in value else "smear_lambda"] = Reduced(builtins.eval, f"open({str(sentinel)!r}, 'w')")
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)
    message = refusal(run)
    assert "refused" in message and "eval" in message


# -- what it is for


@pytest.fixture
def taught_world(base_dir, monkeypatch):
    """The golden run beside a small corpus, whose token files are made with the run's tokenizer."""
    monkeypatch.setenv("NANOCHAT_DTYPE", "float32")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mixtures, "TINY", {"facts": 40, "arithmetic": 20})
    import_here()
    tinyworld.write_corpus(paths.corpus_dir("tinyworld"), 1, 0.05, 2)
    dataset.tokenize("tinyworld", paths.tokenizer_dir(NAME), num_workers=1, progress=False)


def test_an_imported_base_model_is_examined_and_taught(taught_world, capsys):
    command = "--eval bpb --corpus tinyworld --split-tokens 1024 --device-batch-size 4 --device-type cpu"
    base_eval.main(base_eval.parse_args(command.split()))
    bpb = json.loads((paths.results_dir("d2") / "base_eval.json").read_text())["bpb"]
    assert all(0 < value < 20 for value in bpb.values())

    rates = {}
    before = MuonAdamW.step

    def watched(optimizer):
        rates.setdefault("steps", optimizer.steps)
        rates.setdefault("matrix", optimizer.groups[-1]["initial_lr"])
        before(optimizer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MuonAdamW, "step", watched)
        flags = "--mixture tiny --num-iterations 2 --eval-every -1 --chatcore-every -1 --device-type cpu"
        chat_sft.main(chat_sft.parse_args(flags.split()))
    assert rates == {"steps": 30, "matrix": pytest.approx(0.8 * 0.02)}  # warm moments, inherited rates
    folder = checkpoint.find("sft", "d2")
    meta = checkpoint.read_meta(folder)
    assert (meta["step"], meta["optimizer_steps"], meta["device_batch_size"]) == (2, 32, 4)
    assert results.read("d2", "chat_sft")["final"]["step"] == 2


def test_user_flags_of_the_public_run_are_inherited(base_dir, run, capsys):
    said = {"embedding_lr": 0.2, "matrix_lr": 0.03, "scalar_lr": None, "total_batch_size": -1}
    change_meta(run, lambda meta: meta.update(user_config=said))
    (folder,) = import_here(run)
    meta = checkpoint.read_meta(folder)
    assert meta["flags"] == {"embedding_lr": 0.2, "unembedding_lr": 0.008, "matrix_lr": 0.03, "scalar_lr": 0.5}
    assert meta["plan"] == {"total_batch_size": 1024} and meta["device_batch_size"] == 8
    change_meta(run, lambda meta: meta.pop("total_batch_size"))
    meta = checkpoint.read_meta(import_here(run, new_tag="silent")[0])
    assert meta["plan"] == {"total_batch_size": 524288}
    assert "does not say its total batch size" in capsys.readouterr().out


def test_pretraining_does_not_go_on_from_an_import(base_dir):
    (folder,) = import_here()
    meta = checkpoint.read_meta(folder)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be resumed"):
        checkpoint.check_resumable(folder, meta, rows={"corpus": "climbmix", "seed": 42, "a_step": 4})
