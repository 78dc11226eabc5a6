"""MMLU (arXiv 2009.03300): multiple choice over 57 subjects."""

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, check_rows, multiple_choice_conversation, shuffled

REPO = "cais/mmlu"
LETTERS = "ABCD"


class MMLU(Task):
    """`split` of the subset "all" is "auxiliary_train", "dev", "validation" or "test".

    The subset "auxiliary_train" has one split, "train": the same questions as all/auxiliary_train.
    """

    name = "MMLU"
    kind = "categorical"
    baseline = 0.25

    def __init__(self, subset, split):
        source = (REPO, subset, split)
        rows = hub_rows(*source)
        if subset == "auxiliary_train":  # here each row sits inside a struct
            check_rows(rows, source, {"train": dict})
            rows = [row["train"] for row in rows]
        check_rows(rows, source, {"question": str, "subject": str, "choices": list, "answer": int})
        for i, row in enumerate(rows):
            if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
                raise ValueError(
                    f"{'/'.join(source)} row {i}: expected 4 choices and an answer from 0 to 3, "
                    f"got {len(row['choices'])} choices and the answer {row['answer']}"
                )
        self.rows = shuffled(rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[check_index(index, len(self))]
        conversation = multiple_choice_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return conversation | {"subject": row["subject"]}

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]
