"""SmolTalk, the edition for small models: general conversations to learn from. No examination."""

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, check_messages, row_check, shuffled

REPO, CONFIG = "HuggingFaceTB/smol-smoltalk", "default"


class SmolTalk(Task):
    """`split` is "train" (460K conversations) or "test" (24K)."""

    name = "SmolTalk"

    def __init__(self, split):
        check = row_check({"messages": list}, lambda row: check_messages(row["messages"]))
        self.rows = shuffled(hub_rows(REPO, CONFIG, split, check))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"messages": self.rows[check_index(index, len(self))]["messages"]}
