"""MMLU (arXiv 2009.03300): multiple choice over 57 subjects."""

from nanochat.dataset import hub_rows
from tasks.common import Task, check_index, multiple_choice_conversation, row_check, shuffled

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
        question = row_check({"question": str, "subject": str, "choices": list, "answer": int}, wrong_answer)
        if subset == "auxiliary_train":  # here each row sits inside a struct
            rows = hub_rows(REPO, subset, split, row_check({"train": dict}, lambda row: question(row["train"])))
            self.rows = shuffled([row["train"] for row in rows])
        else:
            self.rows = shuffled(hub_rows(REPO, subset, split, question))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = self.rows[check_index(index, len(self))]
        conversation = multiple_choice_conversation(row["question"], LETTERS, row["choices"], LETTERS[row["answer"]])
        return conversation | {"subject": row["subject"]}

    def evaluate(self, conversation, answer):
        return answer == conversation["messages"][-1]["content"]


def wrong_answer(row):
    texts = sum(isinstance(choice, str) for choice in row["choices"])
    if len(row["choices"]) != len(LETTERS) or texts != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
        return (
            f"expected 4 choices, all text, and an answer from 0 to 3, "
            f"got {len(row['choices'])} choices, {texts} of them text, and the answer {row['answer']}"
        )
