"""The files of a public nanochat run: weights and moments in torch's format, a tokenizer in a pickle.

They may come from strangers, so they are read and never run: torch.load with weights_only, and an unpickler that knows
one name. public_run.py makes checkpoints of ours of them.
"""

import io
import pickle
import pickletools
import re
import zipfile
from pathlib import Path

import torch

from nanochat.checkpoint import CheckpointError
from nanochat.gpt import GPT
from nanochat.optim import SMALL, param_groups
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer

LARGEST_PICKLE = 64 << 20  # bytes; a vocabulary of 65,536 takes 1 MB
OTHER_ARCHITECTURE = "this nanochat has the architecture of March 2026, and the run is of another one"
# what a pickled tiktoken.Encoding is written with; no other instruction is followed
OPCODES = set(
    "PROTO FRAME STOP MARK POP NONE MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE "
    "NEWOBJ BUILD EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS NEWTRUE NEWFALSE BININT BININT1 "
    "BININT2 SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES".split()
)


class PublicRunError(CheckpointError):
    """A public run that is missing, damaged, hostile, of another architecture, or in the way of what is here."""


# --- tensors


def _load(path: Path):
    """What a .pt file holds, on the CPU; tensors and plain containers only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {asked[1]!a:.200}" if asked else str(error).splitlines()[0]
        raise PublicRunError(f"refused: {path} holds more than tensors, or is damaged: {what}") from error
    except Exception as error:  # torch raises whatever a damaged file leads it to
        reason = (str(error).splitlines() or [""])[0]
        raise PublicRunError(f"{path} cannot be read ({type(error).__name__}: {reason}); fetch it again") from error


def _is_plain(tensor, shape) -> bool:
    strided = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not tensor.is_meta
    return strided and tensor.is_floating_point() and tuple(tensor.shape) == tuple(shape)


def read_weights(path: Path, model: GPT) -> dict[str, torch.Tensor]:
    """Parameter name -> float32. Tables may be bfloat16 in the file, names may begin as torch.compile makes them."""
    found = _load(path)
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise PublicRunError(f"{path} holds no table of tensors by name")
    found = {name.removeprefix("_orig_mod."): tensor for name, tensor in found.items()}
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    wrong = [f"{name} is missing" for name in expected if name not in found]
    wrong += [f"{name!r:.80} is unknown" for name in found if name not in expected]
    for name, shape in expected.items():
        if name in found and not _is_plain(found[name], shape):
            had = tuple(getattr(found[name], "shape", ())) or type(found[name]).__name__
            wrong.append(f"{name} is {had}, expected {tuple(shape)}")
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise PublicRunError(f"{path}: {'; '.join(wrong[:3])}{more}; {OTHER_ARCHITECTURE}")
    return {name: found[name].float().contiguous() for name in expected}


def read_moments(path: Path, model: GPT, rank: int, world_size: int) -> tuple[int, dict[str, torch.Tensor]]:
    """(steps taken, our tensors by name:state:first row:rows of the whole) of the optimizer file of one rank.

    AdamW tensors from 1024 elements on lie there by rows, the ranks' shares in order; smaller ones are whole. Of a
    stack of Muon matrices each rank has as many, under the index of the first: beyond the last one is padding.
    """
    saved, tensors, steps = _load(path), {}, None
    groups = _public_groups(model)
    try:
        indices, state = [list(group["params"]) for group in saved["param_groups"]], saved["state"]
        if [len(members) for members in indices] != [len(group["named"]) for group in groups]:
            raise ValueError(f"it has other groups of parameters than expected; {OTHER_ARCHITECTURE}")
        for group, members in zip(groups, indices, strict=True):
            if group["kind"] == "adamw":
                for (name, parameter), index in zip(group["named"], members, strict=True):
                    steps = int(state[index]["step"])
                    tensors |= _adamw_share(name, parameter, state[index], rank, world_size)
            else:
                tensors |= _muon_share(group["named"], state.get(members[0]), rank, world_size)
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
        raise PublicRunError(f"{path} is not a whole optimizer file ({type(error).__name__}: {error})") from error
    except ValueError as error:
        raise PublicRunError(f"{path}, rank {rank} of {world_size}: {error}") from error
    return steps, tensors


def _public_groups(model: GPT) -> list[dict]:
    """Ours, but for the order within one: the gate of the smear comes before the lambdas."""
    groups = param_groups(model.roles(), model.config.n_embd)
    for group in groups:
        if group["role"] == "smear_backout":
            group["named"].sort(key=lambda item: item[0] != "smear_gate.weight")
    return groups


def _share(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """First and last + 1 of so many rows or matrices that a rank has."""
    each = -(-count // world_size)
    return min(count, rank * each), min(count, (rank + 1) * each)


def _adamw_share(name, parameter, state, rank, world_size) -> dict[str, torch.Tensor]:
    rows, is_whole = parameter.size(0), parameter.numel() < SMALL
    first, end = (0, rows) if is_whole else _share(rows, rank, world_size)
    shape = (end - first, *parameter.shape[1:])
    for key in ("exp_avg", "exp_avg_sq"):
        if not _is_plain(state[key], shape):
            raise ValueError(f"{key} of {name} is {tuple(state[key].shape)}, expected {shape}")
    return {f"{name}:{key}:{first}:{rows}": state[key].float().contiguous() for key in ("exp_avg", "exp_avg_sq")}


def _muon_share(named, state, rank, world_size) -> dict[str, torch.Tensor]:
    m, n = named[0][1].shape
    first, end = _share(len(named), rank, world_size)
    owned, tensors = named[first:end], {}
    shapes = {"momentum_buffer": (m, n), "second_momentum_buffer": (m, 1) if m >= n else (1, n)}
    for key, shape in shapes.items() if owned else ():
        stack = state[key]
        if stack.size(0) < len(owned) or not _is_plain(stack, (stack.size(0), *shape)):
            raise ValueError(f"{key} of {named[0][0]} is {tuple(stack.shape)}, expected {(len(owned), *shape)}")
        for (name, _), matrix in zip(owned, stack, strict=False):
            tensors[f"{name}:{key}:0:{shape[0]}"] = matrix.float().clone(memory_format=torch.contiguous_format)
    return tensors


# --- the tokenizer


class _PickledEncoding:
    """Stands for tiktoken's Encoding while it is read: keeps what it is given and does nothing with it."""

    state = None

    def __setstate__(self, state):
        self.state = state


class _OneNameUnpickler(pickle.Unpickler):
    def find_class(self, module, name):
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise PublicRunError(f"refused: the pickle asks for {f'{module}.{name}'!a:.200}")

    def persistent_load(self, pid):
        raise PublicRunError("refused: the pickle asks for an object from elsewhere")


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a pickled tiktoken.Encoding. Nothing that the file says is run: it can only spell out data."""
    if not path.is_file():
        raise PublicRunError(f"no tokenizer at {path}: a public run has one, and its ids mean nothing without it")
    if path.stat().st_size > LARGEST_PICKLE:
        raise PublicRunError(f"{path} has {path.stat().st_size:,} bytes, a tokenizer has {LARGEST_PICKLE:,} at most")
    try:
        state = _unpickle(path)
        return _tokenizer_of(state)
    except PublicRunError as error:
        raise PublicRunError(f"{path}: {error}") from error.__cause__
    except Exception as error:  # a damaged pickle leads to whatever it may
        reason = (str(error).splitlines() or [""])[0][:200]
        raise PublicRunError(f"{path} is not a pickled tokenizer ({type(error).__name__}: {reason})") from error


def _unpickle(path: Path):
    data = path.read_bytes()
    for opcode, argument, _ in pickletools.genops(data):  # which also finds lengths that go beyond the end
        if opcode.name not in OPCODES:
            raise PublicRunError(f"refused: the pickle uses {opcode.name}, which no tokenizer needs")
        if opcode.name.endswith("PUT") and argument > len(data):  # a table of that size would be made
            raise PublicRunError(f"refused: the pickle wants to remember {argument} things")
    found = _OneNameUnpickler(io.BytesIO(data)).load()
    if type(found) is not _PickledEncoding:
        raise PublicRunError(f"expected a tiktoken Encoding, got a {type(found).__name__}")
    return found.state


def _tokenizer_of(state) -> Tokenizer:
    if isinstance(state, str):
        raise PublicRunError(f"it only names an encoding of tiktoken's own ({state!a:.50}), with no vocabulary in it")
    if not isinstance(state, dict) or state.keys() != {"name", "pat_str", "mergeable_ranks", "special_tokens"}:
        raise PublicRunError("expected name, pat_str, mergeable_ranks and special_tokens")
    ranks, special = state["mergeable_ranks"], state["special_tokens"]
    if not isinstance(state["name"], str) or not isinstance(state["pat_str"], str):
        raise PublicRunError("name and pat_str should be text")
    tokens = _by_id(ranks, bytes, 0, "mergeable_ranks")
    names = _by_id(special, str, len(tokens), "special_tokens")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise PublicRunError(f"{len(missing)} single bytes are no tokens, {missing[0]} among them")
    if missing := [name for name in SPECIAL_TOKENS if name not in special]:
        raise PublicRunError(f"special tokens are missing: {', '.join(missing)}")
    return Tokenizer(state["pat_str"], tokens, names)


def _by_id(table, kind: type, first: int, what: str) -> list:
    """The keys of a table, which has to number them on from `first`."""
    if not isinstance(table, dict) or not all(type(key) is kind and type(i) is int for key, i in table.items()):
        raise PublicRunError(f"{what} should be a table of {kind.__name__} to numbers")
    if sorted(table.values()) != list(range(first, first + len(table))):
        raise PublicRunError(f"{what} should be numbered from {first} to {first + len(table) - 1}, each number once")
    return sorted(table, key=table.get)
