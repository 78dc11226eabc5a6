"""HumanEval (arXiv 2107.03374): write the body of a Python function; its tests decide."""

import re
import secrets

from nanochat.dataset import hub_rows
from nanochat.sandbox import run_python
from tasks.common import Task, check_index, check_rows, shuffled

SOURCE = ("openai/openai_humaneval", "openai_humaneval", "test")
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
SECONDS, MEMORY_MB = 5.0, 256


class HumanEval(Task):
    """164 problems, one split."""

    name = "HumanEval"

    def __init__(self):
        fields = ("prompt", "canonical_solution", "test", "entry_point")
        self.rows = shuffled(check_rows(hub_rows(*SOURCE), SOURCE, dict.fromkeys(fields, str)))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[check_index(index, len(self))]
        return {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["prompt"] + row["canonical_solution"]},
            ],
            "test": row["test"],
            "entry_point": row["entry_point"],
        }

    def evaluate(self, conversation, answer):
        # The last line of the output has to be a word that nobody knew: a program that leaves early has not passed.
        passed = secrets.token_hex(16)
        source = program(conversation, answer) + f"\nprint()\nprint({passed!r})\n"
        outcome = run_python(source, timeout=SECONDS, memory_mb=MEMORY_MB)
        return outcome.status == "ok" and outcome.stdout.rstrip().rpartition("\n")[2] == passed


def program(conversation, answer):
    """The prompt's leading imports, the answer's code, the tests, and the call that runs them."""
    imports = leading_imports(conversation["messages"][0]["content"])
    return "\n".join([*imports, code_of(answer), conversation["test"], f"check({conversation['entry_point']})"])


def leading_imports(prompt):
    """The import lines of the prompt before any other code."""
    imports = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return imports


def code_of(answer):
    """The first fenced block of the answer, else all of it."""
    block = FENCED.search(answer)
    return block[1] if block else answer
