"""What a report needs of a stage's JSON. A file that a full disk or a careless copy has damaged counts as missing, and
the report says what is wrong with it."""

import math

NUMBER, TEXT = "a number", "a text"

# Of each stage: names to what stands there. A name with ! must be there, * is any name; a list is of such items.
ANY = {"seconds!": NUMBER, "command": TEXT, "started": TEXT, "environment": {"device": TEXT, "world_size": NUMBER}}
CHAT_EVAL = {
    "tasks!": {
        "*": {"accuracy!": NUMBER, "problems": NUMBER, "baseline": NUMBER, "seconds": NUMBER, "pass@k": {"*": NUMBER}}
    },
    "chatcore": NUMBER,
    "conversations": [[{"role!": TEXT}]],
}
SHAPES = {
    "data": {"corpus!": TEXT, "licence!": TEXT},
    "tok_train": {"vocab_size": NUMBER, "characters": NUMBER, "bytes_per_token": NUMBER},
    "tok_eval": {"encoders!": [TEXT], "texts!": {"*": {"bytes!": NUMBER, "tokens!": {"*": NUMBER}}}},
    "base_train": {"corpus": TEXT, "plan": {}, "model": {"config": {}, "counts": {"*": NUMBER}}, "final": {}},
    "base_eval": {
        "bpb": {"*": NUMBER},
        "core": {
            "metric!": NUMBER,
            "tasks!": {"*": {"accuracy!": NUMBER, "centered!": NUMBER, "seconds": NUMBER}},
            "bundle!": TEXT,
            "baselines!": TEXT,
            "interval": [NUMBER],
            "references": {"*": NUMBER},
            "references_by_task": {"*": {"*": NUMBER}},
        },
        "samples": {"prompted": [{"prompt!": TEXT, "text!": TEXT}], "unconditioned": [TEXT]},
    },
    "chat_eval_base": CHAT_EVAL,
    "chat_sft": {"conversations": NUMBER, "rows": NUMBER, "final": {}},
    "chat_eval_sft": CHAT_EVAL,
    "chat_rl": {"final": {}, "course": [{"*": NUMBER}], "examinations": [{"*": NUMBER}]},
    "chat_eval_rl": CHAT_EVAL,
    "rehearsal": {"forecast!": NUMBER},
    "report": {"cost": {"dollars_per_device_hour": NUMBER}, "speedrun_seconds": NUMBER, "seconds": {}},
}


def fault(stage: str, found) -> str:
    """What is wrong with a stage's JSON, or nothing."""
    common = {} if stage in ("report", "rehearsal") else ANY
    return _fault(found, common, "") or _fault(found, SHAPES.get(stage, {}), "")


def _fault(found, shape, place: str) -> str:
    if isinstance(shape, str):
        fits = is_number(found) if shape == NUMBER else isinstance(found, str)
        return "" if fits else f"{place} is {found!r:.40}, not {shape}"
    if not isinstance(found, type(shape)):
        return f"{place or 'it'} is {found!r:.40}, not {'parts by name' if isinstance(shape, dict) else 'a list'}"
    if isinstance(shape, list):
        parts = [(f"{place} › {i}", item, shape[0]) for i, item in enumerate(found)]
    else:
        parts = []
        for name, inner in shape.items():
            key = name.removesuffix("!")
            if name != key and found.get(key) is None:
                return f"{place + ' › ' if place else ''}{key} is missing"
            for each in found if key == "*" else [key]:
                if found.get(each) is not None or key == "*":
                    parts.append((f"{place + ' › ' if place else ''}{each}", found[each], inner))
    return next(filter(None, (_fault(value, inner, where) for where, value, inner in parts)), "")


def is_number(value) -> bool:
    """Whether it can be shown and drawn."""
    return (
        isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e200 and math.isfinite(value)
    )
