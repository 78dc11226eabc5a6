"""A planned run as a table to read."""

import math

from nanochat.results import duration


def as_text(found: dict) -> str:
    """found: as scripts.plan --json gives it."""
    config, counts, the_plan = found["model"]["config"], found["model"]["parameters"], found["plan"]
    data, room = found["data"], found["memory"]
    gpus = max(1, found["machine"]["gpus"])
    T, heads = config["sequence_len"], config["n_head"]
    lines = [f"depth {found['depth']} on {found['machine']['title']}", found["recipe"]]
    if not found["fits"]:
        needed, usable = min(room["rows_gb"].values()), room["usable"] * room["there_gb"]
        lines.append(
            f"DOES NOT FIT: one row takes {needed:,.1f} GB, {usable:,.1f} are usable: a smaller --depth, or more memory"
        )

    def section(title, *rows):
        lines.extend(["", title])
        lines.extend(f"  {name:<20}{value:>18}  {note}".rstrip() for name, value, note in rows)

    section(
        "model",
        ("layers", f"{config['n_layer']}", f"windows {config['window_pattern']}"),
        ("width", f"{config['n_embd']:,}", f"{heads} head{'s' * (heads > 1)} of {config['n_embd'] // heads}"),
        ("row", f"{T:,}", "tokens"),
        ("vocabulary", f"{config['vocab_size']:,}", "tokens"),
    )
    names = {
        "transformer_matrices": ("matrices", ""),
        "lm_head": ("head", ""),
        "wte": ("embedding", ""),
        "value_embeds": ("value embeddings", ""),
        "scalars": ("scalars", ""),
        "total": ("all", f"{the_plan['scaling_params']:,} scale: matrices and head"),
    }
    section("parameters", *((name, f"{counts[key]:,}", note) for key, (name, note) in names.items()))
    each = found["flops_per_second"] / gpus / 1e12
    flops = f"{each:,.3g} TFLOP/s{' a GPU' if gpus > 1 else ''}"
    section(
        "training",
        (
            "tokens",
            f"{the_plan['tokens']:,}",
            f"{the_plan['tokens'] / the_plan['scaling_params']:.3g} a scaling parameter",
        ),
        (
            "batch",
            f"{the_plan['total_batch_size']:,}",
            f"tokens, {room['rows_a_step']:,} row{'s' * (room['rows_a_step'] > 1)}",
        ),
        ("steps", f"{the_plan['num_iterations']:,}", ""),
        ("compute", f"{the_plan['total_flops']:.2e}", f"FLOPs, {the_plan['flops_per_token'] / 1e9:.3g} G a token"),
        ("speed", f"{found['tokens_per_second']:,.0f}", f"tokens/s, {flops}"),
        ("", "", found["how"]),
    )
    if data["shards"]:
        shards = [("shards", f"{data['shards']:,}", f"of {data['corpus']}, {data['shards'] / 10:.1f} GB to download")]
    section("disk", *(shards if data["shards"] else []), ("all", f"{data['disk_gb']:,.1f} GB", "checkpoints included"))
    section(f"memory{' of a GPU' if gpus > 1 else ''}, {room['there_gb']:.0f} GB", *memory_rows(room, gpus))
    section("time", *time_rows(found))
    expected = found["expected"]
    bpb, core = expected["bits_per_byte"], expected["core"]
    result = [("bits per byte", f"{bpb:.3f}" if bpb else "not known", expected["source"])]
    section("result", *result, *([("CORE", f"{core:.4f}", "")] if core else []))
    return "\n".join([*lines, *([""] if found["commands"] else []), *found["commands"]])


def memory_rows(room: dict, gpus: int) -> list[tuple]:
    limit = room["usable"] * room["there_gb"]
    rows = []
    for size, gigabytes in room["rows_gb"].items():
        notes = ["too much"] if gigabytes > limit else []
        if size == room["rows"] and not notes:
            times = math.ceil(room["rows_a_step"] / gpus / size)
            notes.insert(0, f"<- chosen, {times:,} time{'s' * (times > 1)} a step")
        rows.append((f"{size} row{'s' * (size > 1)} at once", f"{gigabytes:,.1f} GB", ", ".join(notes)))
    return rows


def time_rows(found: dict) -> list[tuple]:
    price, gpus = found["machine"]["dollars_an_hour"], max(1, found["machine"]["gpus"])
    names = {"pretraining": "pretraining", "rest": "the rest", "speedrun": "whole speedrun"}
    rows = []
    for key, seconds in found["seconds"].items():
        cost = f"${found['dollars'][key]:,.2f}" if price else ""
        rows.append((names[key], duration(seconds), cost))
    each = (
        f"at ${price / gpus:.2f} {'per GPU-hour' if gpus > 1 else 'an hour'}" if price else "no price is known: --price"
    )
    rows[-1] = (*rows[-1][:2], f"{rows[-1][2]} {each}, downloads aside".strip())
    return rows
