"""Your own conversations, one a line: a bare array of messages, or {"messages": [...]}.

dev/make_identity.py writes such a file about who the model is, from a short description of it.
"""

import json
from pathlib import Path

from nanochat.dataset import plain_file
from tasks.common import Task, check_index, check_messages

IDENTITY = "identity_conversations.jsonl"
IDENTITY_URL = f"https://karpathy-public.s3.us-west-2.amazonaws.com/{IDENTITY}"


class CustomJSON(Task):
    """The conversations of a JSON-lines file, in its order. Blank lines are skipped."""

    def __init__(self, path):
        path = Path(path)
        self.name = path.stem
        if not path.is_file():
            raise ValueError(f"{path}: expected a file with one conversation a line as JSON, found none")
        with open(path, "rb") as file:
            self.rows = [_messages(line, f"{path}, line {n}") for n, line in enumerate(file, 1) if line.strip()]
        if not self.rows:
            raise ValueError(f"{path}: expected at least one conversation, got an empty file")

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"messages": self.rows[check_index(index, len(self))]}


def identity():
    """Who the model is: what dev/make_identity.py wrote (the speedrun runs it), else the public file, fetched once."""
    return CustomJSON(plain_file(IDENTITY_URL, IDENTITY))


def _messages(line, place):
    try:
        value = json.loads(line)
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{place}: expected JSON, got {str(line[:60])[1:]} ({error})") from None
    messages = value.get("messages") if isinstance(value, dict) else value
    problem = check_messages(messages)
    if problem:
        raise ValueError(f"{place}: {problem}")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{place}: expected the last message from the assistant, got one from the user")
    return messages
