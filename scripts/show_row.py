"""A row of training, as the model reads it: its tokens, and which of them it learns.

python -m scripts.show_row                          what fine-tuning taught, its first row
python -m scripts.show_row -i base --row 1000       a row of pretraining
python -m scripts.show_row --table --probabilities  a line a token, and how likely the trained model finds it
"""

import argparse
import sys
from itertools import groupby

import numpy as np
import torch

from nanochat import batches, checkpoint, dataset, runtime, terminal
from nanochat.download import DownloadError
from tasks import mixtures
from tasks.common import Slice


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--source", choices=["base", "sft"], default="sft", help="which stage's rows")
    parser.add_argument("-g", "--model-tag", default=None, help="which model's run (default: the largest d<N>)")
    parser.add_argument("-s", "--step", type=int, default=None, help="which checkpoint of it (default: the newest)")
    parser.add_argument("-r", "--row", type=int, default=0, help="which row of the run, from 0")
    parser.add_argument("--table", action="store_true", help="a line a token")
    parser.add_argument("--probabilities", action="store_true", help="with --table: as the trained model finds them")
    parser.add_argument("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    if args.row < 0:
        parser.error(f"--row is {args.row}, expected 0 or more")
    if args.probabilities and not args.table:
        parser.error("--probabilities needs --table")
    return args


def pretraining_rows(meta: dict, tokenizer) -> batches.TextRows:
    """The rows of the run that made this checkpoint."""
    if "imported" in meta:
        raise ValueError(f"{meta['tag']} was imported: the rows that it was trained on are not here")
    files = dataset.token_files(meta["corpus"], tokenizer.fingerprint, "train")
    read = set(meta["shards"])
    files = [file for file in files if file.tokens.name in read]
    if len(files) != len(read):
        raise ValueError(f"of the {len(read)} shards that the run read, {len(files)} are here")
    length, seed = meta["model_config"]["sequence_len"], meta["rows"]["seed"]
    return batches.TextRows(files, length, tokenizer.bos, tokenizer.vocab_size, seed)


def fine_tuning_rows(meta: dict, tokenizer, row: int, machine) -> batches.ConversationRows:
    """The first rows of the run that made this checkpoint, `row` among them: only as many conversations are rendered as
    could have come into them."""
    flags = meta["flags"]
    conversations = mixtures.training(flags["mixture"], flags["identity"], flags["mmlu_epochs"], flags["gsm8k_epochs"])
    count = 0
    while count < len(conversations):
        count = min(max(512, 2 * count), len(conversations))
        some = Slice(conversations, stop=count)
        rows = batches.render_conversations(some, tokenizer, meta["rows"]["length"], machine, None)
        if sum(map(len, rows.rows[: row + 1])) + batches.WAITING <= count and row < rows.num_rows:
            break
    return rows


def probabilities(args, machine, ids: np.ndarray) -> list[float | None]:
    """Of each token after those before it."""
    model, _, _ = checkpoint.load_model(args.source, machine, args.model_tag, args.step)
    idx = torch.from_numpy(ids).to(machine.device).unsqueeze(0)
    with torch.no_grad():
        logits = model.logits(model.hidden(idx[:, :-1])).float()
    found = torch.log_softmax(logits, dim=-1).gather(2, idx[:, 1:, None]).flatten()
    return [None, *found.tolist()]


def print_text(ids, learned, names, tokenizer, colour: bool) -> None:
    """One after the other, a new line for each document."""
    bar = terminal.paint("│", "dim", on=colour)
    for i, (id, is_learned) in enumerate(zip(ids, learned, strict=True)):
        if id == tokenizer.bos and i:
            print()
        text = terminal.plain(names.get(id) or tokenizer.decode_bytes([id]).decode("utf-8", "backslashreplace"))
        style = ("green", "bold") if is_learned else ("cyan", "dim") if id in names else ("dim",)
        shown = terminal.paint(text.replace("\n", "⏎"), *style, on=colour)
        print(shown if colour or not is_learned else f"[{shown}]", end=bar if colour else "")
        print("\n" * text.count("\n"), end="")
    print()


def print_table(ids, learned, names, tokenizer, colour: bool, found: list | None) -> None:
    print(f"{'place':>6} {'id':>7}  learned" + ("  probability" if found else "") + "  token")
    for i, (id, is_learned) in enumerate(zip(ids, learned, strict=True)):
        text = names.get(id) or tokenizer.decode_bytes([id]).decode("utf-8", "backslashreplace")
        share = "" if not found else f"  {terminal.percent(found[i]) if found[i] is not None else '':>11}"
        line = f"{i:6d} {id:7d}  {'yes' if is_learned else '':7}{share}  {terminal.token(text)}"
        print(terminal.paint(line, *(("green",) if is_learned else ("dim",)), on=colour))


def main(args: argparse.Namespace) -> None:
    with runtime.stage(args.device_type, (ValueError, DownloadError)) as machine:
        show(args, machine)


def show(args, machine) -> None:
    meta = checkpoint.read_meta(checkpoint.find(args.source, args.model_tag, args.step))
    tokenizer = checkpoint.load_tokenizer(meta)
    if args.source == "base":
        rows = pretraining_rows(meta, tokenizer)
    else:
        rows = fine_tuning_rows(meta, tokenizer, args.row, machine)
    inputs, targets = (part[0].numpy() for part in rows.read(args.row, 1))
    ids = inputs if targets[-1] == batches.IGNORE else np.append(inputs, targets[-1])
    learned = [False, *(targets != batches.IGNORE)][: len(ids)]
    padding = 0
    if args.source == "sft":
        padding = next(len(list(same)) for _, same in groupby(reversed(ids.tolist())))
        padding = padding if ids[-1] == tokenizer.bos else 0
    colour = runtime.colours(sys.stdout)
    what = "documents or parts of them" if args.source == "base" else "conversations"
    kept = len(ids) - padding
    shown, mask = ids[:kept], learned[:kept]
    print(
        f"{meta['tag']}, {args.source}, row {args.row}: {len(ids)} tokens, {np.sum(shown == tokenizer.bos)} {what}, "
        f"{np.mean(learned):.0%} learned" + (f", {padding} of padding at the end" if padding else "")
    )
    learned_word, marks = (
        terminal.paint("learned", "green", "bold", on=colour),
        terminal.paint("mark", "cyan", on=colour),
    )
    print(f"{learned_word}, {terminal.paint('only read', 'dim', on=colour)}, {marks}\n" if colour else "[learned]\n")
    names = {id: name for name, id in tokenizer.special.items()}
    if args.table:
        found = probabilities(args, machine, ids) if args.probabilities else None
        print_table(shown.tolist(), mask, names, tokenizer, colour, found)
    else:
        print_text(shown.tolist(), mask, names, tokenizer, colour)


if __name__ == "__main__":
    main(parse_args())
