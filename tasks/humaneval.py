"""HumanEval (arXiv 2107.03374): write the body of a Python function; its tests decide."""

import ast
import re

from nanochat.dataset import hub_rows
from nanochat.sandbox import run_tests, walls
from tasks.common import Task, check_index, row_check, shuffled

SOURCE = ("openai/openai_humaneval", "openai_humaneval", "test")
FENCED = re.compile(r"```[ \t]*(?:python3?|py)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)
SECONDS, MEMORY_MB = 5.0, 256


class HumanEval(Task):
    """164 problems, one split."""

    name = "HumanEval"

    def __init__(self):
        walls()  # what this machine does not keep off is said before the first verdict
        names = ("prompt", "canonical_solution", "test", "entry_point")
        self.rows = shuffled(hub_rows(*SOURCE, row_check(dict.fromkeys(names, str), wrong_prompt)))

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
        return self.verdict(conversation, answer) == "right"

    def verdict(self, conversation, answer):
        prompt, name = conversation["messages"][0]["content"], conversation["entry_point"]
        imports = "\n".join(leading_imports(prompt))
        tests = f"{helpers(prompt, name)}\n{conversation['test']}\ncheck({name})"
        outcome = run_tests(f"{imports}\n{code_of(answer)}", tests, name, timeout=SECONDS, memory_mb=MEMORY_MB)
        if outcome.status == "ok":
            return "right"
        what = outcome.stderr.strip().rpartition("\n")[2][:200] if outcome.status == "error" else outcome.status
        return f"wrong: {what}"


def leading_imports(prompt):
    """The import lines of the prompt before any other code."""
    imports = []
    for line in prompt.splitlines():
        if line.startswith(("import ", "from ")):
            imports.append(line)
        elif line.strip() and not line.startswith("#"):
            break
    return imports


def helpers(prompt, entry_point):
    """What the prompt defines besides the function asked for: imports, and functions that tests call. They are the
    prompt's own, so that no answer can bring others."""
    tree = ast.parse(prompt + "    pass\n")
    return ast.unparse([part for part in tree.body if getattr(part, "name", None) != entry_point])


def wrong_prompt(row):
    try:
        helpers(row["prompt"], row["entry_point"])
    except SyntaxError as error:
        return f"expected a prompt that is the beginning of a Python function, got {row['prompt'][:60]!r} ({error})"


def code_of(answer):
    """The first fenced block of the answer, else all of it."""
    block = FENCED.search(answer)
    return block[1] if block else answer
