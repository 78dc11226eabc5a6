"""GSM8K (arXiv 2110.14168): word problems of primary school, worked with a calculator."""

import re

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, final_number, row_check, shuffled, text_of

REPO, CONFIG = "openai/gsm8k", "main"
CALL = re.compile(r"<<(.*?)>>", re.DOTALL)


class GSM8K(Task):
    """`split` is "train" or "test". The calculator calls of the answers become tool calls."""

    name = "GSM8K"

    def __init__(self, split):
        check = row_check({"question": str, "answer": str}, no_number)
        self.rows = shuffled(hub_rows(REPO, CONFIG, split, check))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[check_index(index, len(self))]
        return {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": answer_parts(row["answer"])},
            ]
        }

    def evaluate(self, conversation, answer):
        return final_number(answer) == final_number(text_of(conversation["messages"][-1]["content"]))


def answer_parts(answer):
    """The parts of an answer: each `<<48/2=24>>` is a call of the tool, `48/2`, and its output, `24`."""
    parts = []
    for i, piece in enumerate(CALL.split(answer)):
        if i % 2 == 0:
            parts += [{"type": "text", "text": piece}] if piece else []
            continue
        expression, equals, result = piece.rpartition("=")
        parts.append({"type": "python", "text": expression if equals else piece})
        parts.append({"type": "python_output", "text": result if equals else ""})
    return parts


def no_number(row):
    if final_number(row["answer"]) is None:
        return f"expected an answer that ends in '#### NUMBER', got one that ends in {row['answer'][-40:]!r}"
