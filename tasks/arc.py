"""ARC (arXiv 1803.05457): science questions of primary school, as multiple choice."""

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, multiple_choice_conversation, row_check, shuffled

REPO = "allenai/ai2_arc"


class ARC(Task):
    """`subset` is "ARC-Easy" or "ARC-Challenge"; `split` is "train", "validation" or "test"."""

    kind = "categorical"
    baseline = 0.25

    def __init__(self, subset, split):
        if subset not in ("ARC-Easy", "ARC-Challenge"):
            raise ValueError(f"expected the subset ARC-Easy or ARC-Challenge, got {subset!r}")
        self.name = subset
        check = row_check({"question": str, "choices": dict, "answerKey": str}, wrong_labels)
        self.rows = shuffled(hub_rows(REPO, subset, split, check))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[check_index(index, len(self))]
        choices = row["choices"]  # the labels are the row's own: most are A to D, some 1 to 4, some have 3 or 5
        return multiple_choice_conversation(row["question"], choices["label"], choices["text"], row["answerKey"])

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


def wrong_labels(row):
    labels, texts = row["choices"].get("label"), row["choices"].get("text")
    texts_only = all(isinstance(text, str) for text in [*(labels or []), *(texts or [])])
    if not labels or not texts or len(labels) != len(texts) or row["answerKey"] not in labels or not texts_only:
        return (
            f"expected as many labels as choices, all text, and the answer among the labels; "
            f"got labels {labels}, {len(texts or [])} choices, answer {row['answerKey']!r}"
        )
