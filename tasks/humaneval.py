"""HumanEval (arXiv 2107.03374): write the body of a Python function; its tests decide."""

import re

from nanochat.dataset import hub_rows
from nanochat.sandbox import run_tests, walls
from tasks.common import Task, check_index, row_check, shuffled

SOURCE = ("openai/openai_humaneval", "openai_humaneval", "test")
FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
FUNCTION = re.compile(r"^def (\w+)", re.MULTILINE)
SECONDS, MEMORY_MB = 5.0, 256


class HumanEval(Task):
    """164 problems, one split."""

    name = "HumanEval"

    def __init__(self):
        walls()  # what this machine does not keep off is said before the first verdict
        names = ("prompt", "canonical_solution", "test", "entry_point")
        self.rows = shuffled(hub_rows(*SOURCE, row_check(dict.fromkeys(names, str))))

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
        prompt = conversation["messages"][0]["content"]
        imports = "\n".join(leading_imports(prompt))
        tests = f"{imports}\n{conversation['test']}\ncheck({conversation['entry_point']})"
        functions = [conversation["entry_point"], *FUNCTION.findall(prompt)]  # tests call the prompt's helpers, too
        outcome = run_tests(f"{imports}\n{code_of(answer)}", tests, functions, timeout=SECONDS, memory_mb=MEMORY_MB)
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


def code_of(answer):
    """The first fenced block of the answer, else all of it."""
    block = FENCED.search(answer)
    return block[1] if block else answer
