"""A checkpoint as a Hugging Face style folder, and back: weights, tokenizer, chat template, and the model's code
(hub/modeling_nanochat.py), complete or not there at all.

transformers loads it with trust_remote_code=True and gives the logits of gpt.py; the tokenizers package gives the ids
of tokenizer.py, with one difference: there, text that spells a special token becomes that token, since chat templates
need it. For a stranger's text pass split_special_tokens=True (transformers), or set encode_special_tokens (tokenizers).
"""

import json
import os
import re
import shutil
import string
from datetime import datetime, timezone
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from nanochat import checkpoint, paths, results, saver
from nanochat.gpt import GPT, GPTConfig
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

MODEL_TYPE = "nanochat_gpt"  # transformers knows a "nanochat" of another architecture
FORMAT_VERSION = 1
HUB = Path(__file__).with_name("hub")
AUTO = (("Config", "Config"), ("ModelForCausalLM", "ForCausalLM"))
COPIED = ("modeling_nanochat.py", "chat_template.jinja")
SHAPE = tuple(GPTConfig.__dataclass_fields__)
# What a meta.json has that is of no use elsewhere: the machine it was made on, and what only a resumed run needs.
LEFT_OUT = ("format_version", "rng", "environment", "optimizer_steps", "wandb_id", "model_config", "tokenizer")
TEXT_USE = 'inputs = tokenizer("<|bos|>The capital of France is", return_tensors="pt")'
CHAT_USE = """messages = [{"role": "user", "content": "What is the capital of France?"}]
options = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs = tokenizer.apply_chat_template(messages, **options)"""


class FolderError(ValueError):
    """A folder that cannot be written, or is not one that export() wrote."""


# -- out


def export(
    source: str, folder: Path, runtime: Runtime, tag: str | None = None, step: int | None = None, force: bool = False
) -> Path:
    """Write a checkpoint (source: base, sft or rl) as a folder that transformers loads, in float32. Without tag and
    step: the one that checkpoint.find() takes. force: in the place of an older export. Returns the folder, resolved."""
    checkpoint_folder = checkpoint.find(source, tag, step)
    meta = checkpoint.read_meta(checkpoint_folder)
    tokenizer = checkpoint.load_tokenizer(meta)
    config = GPTConfig(**meta["model_config"])
    weights = _read_weights(checkpoint_folder / saver.MODEL, config)
    weights = {name: tensor.float().contiguous() for name, tensor in weights.items()}
    folder = Path(folder).expanduser().resolve()
    _check_target(folder, force)
    partial = folder.with_name(f".{folder.name}.partial")
    size = sum(tensor.nbytes for tensor in weights.values())
    texts = _texts(meta, config, tokenizer, size // 4)
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
        partial.mkdir(parents=True)
        if (free := shutil.disk_usage(partial).free) < size:
            raise OSError(f"{size / 1e9:.3f} GB are needed and {free / 1e9:.3f} GB free")
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        save_file(weights, partial / saver.MODEL, metadata={"format": "pt"})
        (partial / saver.MODEL).chmod(0o644)  # safetensors gives it to its owner alone
        _to_disk(partial)
        paths.put_in_place(partial, folder)
    except saver.WRITE_ERRORS as error:
        raise FolderError(f"{folder} could not be written ({error}): make room, or choose another folder") from error
    finally:  # whatever happened, an interrupt too
        shutil.rmtree(partial, ignore_errors=True)
    runtime.print(f"{source} model {meta['tag']}, step {meta['step']}: {size / 1e6:,.1f} MB of weights in {folder}")
    return folder


def _check_target(folder: Path, force: bool) -> None:
    """Only an export is ever replaced: --force with a wrong path must not cost a person their files."""
    if folder.exists() and not folder.is_dir():
        raise FolderError(f"{folder} is a file; name a folder that is not there yet")
    if folder.exists() and any(folder.iterdir()):
        if not force:
            raise FolderError(f"{folder} is not empty; --force replaces an older export, or name another folder")
        try:
            _read_config(folder)
        except FolderError as error:
            raise FolderError(f"--force replaces exports only ({error}); name another folder") from error


def _to_disk(folder: Path) -> None:
    """Its files and their names, before its own name says that it is complete."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _texts(meta: dict, config: GPTConfig, tokenizer: Tokenizer, parameters: int) -> dict[str, str]:
    """File name -> text, of all files but the weights."""
    talks = meta["stage"] != "base"
    eos = "<|assistant_end|>" if talks else "<|bos|>"
    bos_id, end_id = tokenizer.bos, tokenizer.special["<|assistant_end|>"]
    # paths that somebody typed are nobody else's business
    flags = {name: value for name, value in meta["flags"].items() if not (isinstance(value, str) and os.sep in value)}
    # padding by a mark that also ends an answer: generate() would otherwise take each <|bos|> of a prompt for padding
    ids = {"bos_token_id": bos_id, "eos_token_id": tokenizer.special[eos], "pad_token_id": bos_id}
    values = {
        "config.json": {
            "model_type": MODEL_TYPE,
            "architectures": ["NanochatForCausalLM"],
            "auto_map": {f"Auto{kind}": f"modeling_nanochat.Nanochat{name}" for kind, name in AUTO},
            "dtype": "float32",
            **{name: getattr(config, name) for name in SHAPE},
            **ids,
            "nanochat": {
                "format_version": FORMAT_VERSION,
                "tokenizer": {**meta["tokenizer"], "pattern": tokenizer.pattern},
                "meta": {name: value for name, value in meta.items() if name not in LEFT_OUT} | {"flags": flags},
            },
        },
        "generation_config.json": {**ids, "eos_token_id": [end_id, bos_id]},
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{"bos_token": "<|bos|>", "eos_token": eos, "pad_token": "<|bos|>", "padding_side": "left"},
            **{"model_max_length": config.sequence_len, "model_input_names": ["input_ids", "attention_mask"]},
            **{"clean_up_tokenization_spaces": False, "add_prefix_space": False},
        },
    }
    said = {**meta, "corpus": f" on the corpus {meta['corpus']}" if meta.get("corpus") else ""}
    said |= {"parameters": f"{parameters:,}", "sequence_len": config.sequence_len, "vocab_size": config.vocab_size}
    copied = {name: (HUB / name).read_text(encoding="utf-8") for name in ("README.md", *COPIED)}
    copied["README.md"] = string.Template(copied["README.md"]).substitute(said, use=CHAT_USE if talks else TEXT_USE)
    return {**copied, **{name: json.dumps(value, indent=1, ensure_ascii=False) for name, value in values.items()}}


# -- the tokenizer


def byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself where it can be seen, one from 256 on elsewhere (GPT-2)."""
    seen = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(others)) for byte in range(256)]


def tokenizer_json(tokenizer: Tokenizer) -> dict:
    """What the tokenizers package reads. Its regex engine (Oniguruma) and tiktoken's (Rust) agree on the pattern for
    every code point: a test tries them all."""
    alphabet = byte_alphabet()

    def name(token: bytes) -> str:
        return "".join(alphabet[byte] for byte in token)

    vocabulary = {name(token): id for id, token in enumerate(tokenizer.tokens)}
    if clash := vocabulary.keys() & tokenizer.special.keys():
        spelled = ", ".join(sorted(clash))
        raise FolderError(f"ordinary tokens spell {spelled}, which tokenizers cannot bear: train on text without it")
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    absent = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    # ignore_merges: a piece that is a token is taken whole, even if no merges lead to it
    how = {"type": "BPE", **dict.fromkeys(absent), "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    pairs = [[name(left), name(right)] for left, right in merges(tokenizer.tokens)]
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{"id": id, "content": name, **flags} for name, id in tokenizer.special.items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "decoder": byte_level,
        "model": {**how, "vocab": vocabulary, "merges": pairs},
    }


def merges(tokens: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The merges behind a vocabulary, in order of rank; tokens that no merges lead to have none.

    tiktoken merges whatever neighbours make up a token, the lowest rank first and of equals the leftmost; tokenizers
    knows pairs. One pair a token is enough: no merge crosses the ends of what will be the token, so what happens
    between them is what happens to its bytes alone, and always ends with the same two parts.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    found = []
    for token in tokens:
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            rank, i = min((ranks.get(parts[i] + parts[i + 1], len(ranks)), i) for i in range(len(parts) - 1))
            if rank == len(ranks):
                break
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            found.append((parts[0], parts[1]))
    return found


def _read_tokenizer(folder: Path, pattern: str, fingerprint: str) -> Tokenizer:
    path = folder / "tokenizer.json"
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        special = {token["id"]: token["content"] for token in data["added_tokens"]}
        names = {id: name for name, id in data["model"]["vocab"].items() if id not in special}
        tokens = [bytes(byte_of[character] for character in names[id]) for id in range(len(names))]
        if not {bytes([byte]) for byte in range(256)} <= set(tokens):
            raise ValueError("a byte has no token")
        tokenizer = Tokenizer(pattern, tokens, [special[id] for id in sorted(special)])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({type(error).__name__}: {error}); export the model again") from error
    if tokenizer.fingerprint != fingerprint:
        raise FolderError(f"{path} is not the tokenizer that the model was exported with; export the model again")
    return tokenizer


# -- and back


def import_folder(
    folder: Path, runtime: Runtime, stage: str = "", tag: str = "", tokenizer_name: str = "", force: bool = False
) -> Path:
    """A folder that export() wrote, trained further by transformers or not, as a checkpoint without optimizer state,
    and its tokenizer. Names are those of the exported model unless given. force: an older model of that tag moves
    aside. Returns the checkpoint's folder."""
    folder = Path(folder).expanduser()
    exported = _read_config(folder)
    try:
        ours, config = exported["nanochat"], GPTConfig(**{name: exported[name] for name in SHAPE})
        if ours["format_version"] > FORMAT_VERSION:
            raise ValueError(f"format {ours['format_version']}, this nanochat reads up to {FORMAT_VERSION}")
        meta, vocabulary = ours["meta"], ours["tokenizer"]
        names = {"stage": stage or meta["stage"], "tag": tag or meta["tag"]}
        names["tokenizer name"] = tokenizer_name or vocabulary["name"]
        pattern, fingerprint, step = vocabulary["pattern"], vocabulary["fingerprint"], int(meta["step"])
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise FolderError(f"{folder / 'config.json'} is damaged ({why}); export the model again") from error
    for what, name in names.items():  # a stranger's folder must not name a place outside ours
        if not re.fullmatch(r"\w[\w.-]*", str(name)):
            raise FolderError(f"the {what} is {name!r}; expected letters, digits and . _ -")
    stage, tag, tokenizer_name = names.values()
    if stage not in paths.CHECKPOINT_FOLDERS:
        raise FolderError(f"the stage is {stage!r}; expected {', '.join(paths.CHECKPOINT_FOLDERS)}")
    tokenizer = _read_tokenizer(folder, pattern, fingerprint)
    if tokenizer.vocab_size != config.vocab_size:
        raise FolderError(f"{folder}: the model has {config.vocab_size} ids, the tokenizer {tokenizer.vocab_size}")
    weights = _read_weights(folder / saver.MODEL, config)

    home = paths.checkpoint_dir(stage, tag)
    if checkpoint.list_steps(home) and not force:
        raise FolderError(f"there is a {stage} model {tag!r} in {home}; --force moves it aside, --model-tag names anew")
    _keep_tokenizer(tokenizer, tokenizer_name)
    meta = {
        "format_version": checkpoint.FORMAT_VERSION,
        **{name: value for name, value in meta.items() if name not in LEFT_OUT},
        **{"stage": stage, "tag": tag, "step": step, "imported": {"from": folder.resolve().name}},
        "saved": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": results.environment(runtime),
        "model_config": config.__dict__,
        "tokenizer": {"name": tokenizer_name, "fingerprint": fingerprint},
    }
    target, partial = checkpoint.step_folder(home, step), home.with_name(f".{tag}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        saver.write(partial, {saver.MODEL: weights}, meta, sum(tensor.nbytes for tensor in weights.values()))
        with checkpoint.set_aside(home, runtime):
            home.mkdir(exist_ok=True)
            partial.rename(target)
    except saver.WRITE_ERRORS as error:
        raise FolderError(f"{target} could not be written ({error}): make room there") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    runtime.print(f"{stage} model {tag}, step {step}, with the tokenizer {tokenizer_name}: {target}")
    return target


def _keep_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Save it, unless it is there; never over another one, on which other models may stand."""
    directory = paths.tokenizer_dir(name)
    if not (directory / "tokenizer.json").exists():
        tokenizer.save(directory)
    elif Tokenizer.load(directory).fingerprint != tokenizer.fingerprint:
        raise FolderError(f"{directory} holds another tokenizer; --tokenizer-name gives this one a name of its own")


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        model_type = config.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise FolderError(f"{path} cannot be read ({error}); expected a folder that nanochat exported") from error
    if model_type != MODEL_TYPE or "nanochat" not in config:
        raise FolderError(f"{folder} is no export of nanochat: its model type is {model_type!r}; expected {MODEL_TYPE}")
    return config


def _read_weights(path: Path, config: GPTConfig) -> dict[str, torch.Tensor]:
    """Tensors of just the names and shapes that the model has."""
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own kinds for truncated and foreign files
        hint = "; save it in one file (max_shard_size)" if path.with_name(f"{path.name}.index.json").exists() else ""
        raise FolderError(f"{path} cannot be read ({error}){hint}") from error
    with torch.device("meta"):
        expected = {name: tuple(p.shape) for name, p in GPT(config).named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        of = f"{wrong[0]}: {found.get(wrong[0], 'not there')}, expected {expected.get(wrong[0], 'none of that name')}"
        raise FolderError(f"{path} does not fit its config: {len(wrong)} tensors differ, the first {of}")
    return weights
