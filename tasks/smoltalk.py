"""SmolTalk, the edition for small models: general conversations to learn from. No examination."""

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, check_messages, check_rows, shuffled

REPO, CONFIG = "HuggingFaceTB/smol-smoltalk", "default"


class SmolTalk(Task):
    """`split` is "train" (460K conversations) or "test" (24K)."""

    name = "SmolTalk"

    def __init__(self, split):
        source = (REPO, CONFIG, split)
        rows = check_rows(hub_rows(*source), source, {"messages": list})
        for i, row in enumerate(rows):
            problem = check_messages(row["messages"])
            if problem:
                raise ValueError(f"{'/'.join(source)} row {i}: {problem}")
        self.rows = shuffled(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"messages": self.rows[check_index(index, len(self))]["messages"]}
