"""What the tasks make of rows as the hub has them, and how they judge answers."""

import json
import pickle
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.calculator import calculator
from tasks import arc, customjson, gsm8k, humaneval, mmlu, smoltalk, spellingbee
from tasks.common import Mixture, Slice, Task, text_of

ARC_ROW = {
    "question": "Which is a metal?",
    "choices": {"text": ["iron", "wood", "milk"], "label": ["1", "2", "3"]},
    "answerKey": "1",
}
MMLU_ROW = {"question": "2 + 2?", "subject": "maths", "choices": ["1", "2", "3", "4"], "answer": 3}
GSM8K_ROW = {
    "question": "Two for $1.50 and one more. How many thousands?",
    "answer": "It is 2*1.5=<<2*1.5=3>>3.\nThen <<=1>><<7>>so <<a==b=1>> it is.\n#### 1,003",
}
HUMANEVAL_ROW = {
    "task_id": "made/0",
    "prompt": '\nfrom math import sqrt\nimport re\n\n\ndef root(x: float) -> float:\n    """import that"""\n',
    "canonical_solution": "    return sqrt(x)\n",
    "test": "def check(candidate):\n    assert candidate(9) == 3\n",
    "entry_point": "root",
}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def serve(monkeypatch, tmp_path):
    """Lets the mirror have these rows of a data set, and no other: what asks for another finds nothing."""

    def write(repo, config, split, rows):
        file = tmp_path / "mirror" / repo / config / f"{split}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", str(tmp_path / "mirror"))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    return write


@pytest.fixture
def words(monkeypatch, tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("banana\nkiwi\r\nstrawberry\nfig\n")
    monkeypatch.setattr(spellingbee, "plain_file", lambda url, name: path)
    return path.read_text().split()


def test_multiple_choice_is_rendered_with_the_rows_own_letters(serve):
    serve("allenai/ai2_arc", "ARC-Challenge", "test", [ARC_ROW])
    task = arc.ARC("ARC-Challenge", "test")
    assert (task.name, task.kind, task.baseline) == ("ARC-Challenge", "categorical", 0.25)
    assert task[0]["letters"] == ["1", "2", "3"]
    assert task[0]["messages"] == [
        {
            "role": "user",
            "content": "Multiple Choice question: Which is a metal?\n- iron=1\n- wood=2\n- milk=3\n\n"
            "Respond only with the letter of the correct answer.",
        },
        {"role": "assistant", "content": "1"},
    ]
    assert task.evaluate(task[0], "1") and not task.evaluate(task[0], "2")


@pytest.mark.parametrize(
    "subset, split, row", [("all", "test", MMLU_ROW), ("auxiliary_train", "train", {"train": MMLU_ROW})]
)
def test_mmlu_is_read_from_both_layouts(serve, subset, split, row):
    serve("cais/mmlu", subset, split, [row])
    task = mmlu.MMLU(subset, split)
    assert task[0]["letters"] == ["A", "B", "C", "D"] and task[0]["subject"] == "maths"
    assert task[0]["messages"][0]["content"].splitlines()[1:5] == ["- 1=A", "- 2=B", "- 3=C", "- 4=D"]
    assert task.evaluate(task[0], "D") and not task.evaluate(task[0], "A")


def test_gsm8k_marks_become_tool_calls(serve):
    serve("openai/gsm8k", "main", "train", [GSM8K_ROW])
    task = gsm8k.GSM8K("train")
    assert [(part["type"], part["text"]) for part in task[0]["messages"][1]["content"]] == [
        ("text", "It is 2*1.5="),
        ("python", "2*1.5"),
        ("python_output", "3"),
        ("text", "3.\nThen "),
        ("python", ""),
        ("python_output", "1"),
        ("python", "7"),
        ("python_output", ""),
        ("text", "so "),
        ("python", "a==b"),
        ("python_output", "1"),
        ("text", " it is.\n#### 1,003"),
    ]


@pytest.mark.parametrize(
    "answer, right",
    [
        ("so\n#### 1003", True),
        ("#### 1,003 buttons", True),
        ("#### 1003 or #### 5", True),
        ("#### 5 or #### 1003", False),
        ("#### 1003.0", False),
        ("#### -1003", False),
        ("1003", False),
        ("####1003", False),
        ("", False),
    ],
)
def test_gsm8k_compares_the_first_final_number_as_a_string(serve, answer, right):
    serve("openai/gsm8k", "main", "test", [GSM8K_ROW])
    task = gsm8k.GSM8K("test")
    assert task.evaluate(task[0], answer) is right
    assert task.reward(task[0], answer) == float(right)


FENCED = "Sure:\n```python\ndef root(x):\n    return sqrt(x)\n```\nand\n```python\n1/0\n```\n"


@pytest.mark.parametrize(
    "answer, right",
    [
        (HUMANEVAL_ROW["prompt"] + HUMANEVAL_ROW["canonical_solution"], True),
        (FENCED, True),
        ("def root(x):\n    return x", False),
        ("I do not know.", False),
        ("def root(x):\n    return 3\nimport os\nos._exit(0)", False),
        ("raise SystemExit", False),
        ("", False),
    ],
)
def test_humaneval_runs_the_tests_on_the_answers_code(serve, answer, right):
    serve("openai/openai_humaneval", "openai_humaneval", "test", [HUMANEVAL_ROW])
    task = humaneval.HumanEval()
    assert task.evaluate(task[0], answer) is right


def test_humaneval_says_why_an_answer_is_wrong(serve):
    serve("openai/openai_humaneval", "openai_humaneval", "test", [HUMANEVAL_ROW])
    task = humaneval.HumanEval()
    assert task.verdict(task[0], task[0]["messages"][1]["content"]) == "right"
    assert task.verdict(task[0], "def root(x):\n    return 4") == "wrong: AssertionError"
    assert task.verdict(task[0], "def root(x):\n    return 'x' * 10**10") == "wrong: memory"
    assert task.verdict(task[0], "def root(x) return 3") == "wrong: SyntaxError: expected ':'"


FORGED = "def helper(x):\n    return 0\n\ndef solve(x):\n    return 0\n"


def test_humaneval_tests_call_the_prompts_helpers_not_the_answers(serve):
    prompt = 'import math\n\ndef helper(x):\n    return math.floor(x) + 1\n\ndef solve(x):\n    """The inverse."""\n'
    test = "def check(candidate):\n    assert all(helper(candidate(n)) == n for n in range(3))\n"
    row = {"prompt": prompt, "canonical_solution": "    return x - 1\n", "test": test, "entry_point": "solve"}
    serve("openai/openai_humaneval", "openai_humaneval", "test", [HUMANEVAL_ROW | row])
    task = humaneval.HumanEval()
    assert task.verdict(task[0], task[0]["messages"][1]["content"]) == "right"
    assert task.verdict(task[0], FORGED) == "wrong: AssertionError"
    assert task.verdict(task[0], "def solve(x): return x - 1") == "right"


@pytest.mark.parametrize("fence", ["```python\n{}```", "```Python3\r\n{}```", "```\n{}```", "```py\n{}", "{}"])
def test_the_code_of_an_answer_is_found(fence):
    assert humaneval.code_of(fence.format("x = 1\n")) == "x = 1\n"


def test_humaneval_takes_only_the_leading_imports_of_the_prompt():
    assert humaneval.leading_imports(HUMANEVAL_ROW["prompt"]) == ["from math import sqrt", "import re"]
    assert humaneval.leading_imports("import re\ndef f(): pass\nimport os\n") == ["import re"]


def test_rows_come_in_the_published_order(serve):
    rows = [{"messages": [{"role": "user", "content": str(i)}, TALK[1]]} for i in range(20)]
    serve("HuggingFaceTB/smol-smoltalk", "default", "train", rows)
    task = smoltalk.SmolTalk("train")
    order = [int(conversation["messages"][0]["content"]) for conversation in task]
    assert order == np.random.default_rng(42).permutation(20).tolist()


def without(row, field):
    return {name: value for name, value in row.items() if name != field}


SOURCES = {
    "arc": ("allenai/ai2_arc", "ARC-Easy", "test"),
    "mmlu": ("cais/mmlu", "all", "test"),
    "aux": ("cais/mmlu", "auxiliary_train", "train"),
    "gsm8k": ("openai/gsm8k", "main", "test"),
    "humaneval": ("openai/openai_humaneval", "openai_humaneval", "test"),
    "smoltalk": ("HuggingFaceTB/smol-smoltalk", "default", "test"),
}
MAKE = {
    "arc": lambda: arc.ARC("ARC-Easy", "test"),
    "mmlu": lambda: mmlu.MMLU("all", "test"),
    "aux": lambda: mmlu.MMLU("auxiliary_train", "train"),
    "gsm8k": lambda: gsm8k.GSM8K("test"),
    "humaneval": humaneval.HumanEval,
    "smoltalk": lambda: smoltalk.SmolTalk("test"),
}


@pytest.mark.parametrize(
    "task, good, bad, names",
    [
        ("arc", ARC_ROW, without(ARC_ROW, "answerKey"), "answerKey"),
        ("arc", ARC_ROW, ARC_ROW | {"answerKey": "9"}, "'9'"),
        ("arc", ARC_ROW, ARC_ROW | {"choices": {"text": []}}, "labels None"),
        ("mmlu", MMLU_ROW, MMLU_ROW | {"answer": "D"}, "str 'D'"),
        ("mmlu", MMLU_ROW, MMLU_ROW | {"answer": 4}, "0 to 3"),
        ("aux", {"train": MMLU_ROW}, MMLU_ROW, "'train'"),
        ("aux", {"train": MMLU_ROW}, {"train": MMLU_ROW | {"answer": 4}}, "0 to 3"),
        ("arc", ARC_ROW, ARC_ROW | {"choices": {"text": [None, "x", "y"], "label": ["1", "2", "3"]}}, "all text"),
        ("mmlu", MMLU_ROW, MMLU_ROW | {"choices": [None, "a", "b", "c"]}, "3 of them text"),
        ("gsm8k", GSM8K_ROW, GSM8K_ROW | {"answer": "it is 3"}, "it is 3"),
        ("humaneval", HUMANEVAL_ROW, without(HUMANEVAL_ROW, "test"), "'test'"),
        ("smoltalk", {"messages": TALK}, {"messages": TALK[::-1]}, "message 0"),
        ("smoltalk", {"messages": TALK}, {"messages": TALK[:1]}, "at least"),
        ("smoltalk", {"messages": TALK}, ["not fields"], "list"),
    ],
)
def test_a_row_of_another_shape_is_named_with_its_file(serve, task, good, bad, names):
    file = serve(*SOURCES[task], [good, bad])
    with pytest.raises(ValueError, match="line 2: (expected|message)") as error:
        MAKE[task]()
    assert str(file) in str(error.value) and names in str(error.value)


def test_a_bad_row_of_a_parquet_file_is_named_with_its_file(serve, tmp_path):
    file = serve(*SOURCES["gsm8k"], [])
    rows = [GSM8K_ROW, GSM8K_ROW, GSM8K_ROW | {"answer": "none"}]
    for number, part in enumerate((rows[:1], rows[1:])):
        pq.write_table(pa.Table.from_pylist(part), file.with_name(f"test-0000{number}-of-00002.parquet"))
    with pytest.raises(ValueError, match="test-00001-of-00002.parquet, row 2: .*#### NUMBER"):
        MAKE["gsm8k"]()


def test_no_rows_is_an_error_not_an_empty_task(serve):
    serve(*SOURCES["smoltalk"], [])
    with pytest.raises(ValueError, match="smol-smoltalk/default/test.jsonl: expected at least one row"):
        MAKE["smoltalk"]()


def test_spelling_writes_every_letter(words):
    task = spellingbee.SimpleSpelling(size=30)
    for conversation in task:
        word = conversation["messages"][0]["content"].removeprefix("Spell the word: ")
        assert word in words
        assert conversation["messages"][1]["content"] == f"{word}:{','.join(word)}"
        assert task.evaluate(conversation, f"{word}:{','.join(word)}") and not task.evaluate(conversation, word)


def test_spelling_bee_counts_by_hand_and_with_the_tool():
    parts = spellingbee.worked_answer("kiwi", "i")
    assert [part["type"] for part in parts] == ["text", "python", "python_output", "text"]
    assert "kiwi:k,i,w,i\n\n1:k\n2:i hit! count=1\n3:w\n4:i hit! count=2\n" in parts[0]["text"]
    assert parts[1]["text"] == "'kiwi'.count('i')"
    assert parts[2]["text"] == "2"
    assert parts[3]["text"].endswith("#### 2")


def test_spelling_bee_answers_are_what_the_calculator_says(words):
    task = spellingbee.SpellingBee(size=100, split="train")
    for conversation in task:
        parts = conversation["messages"][1]["content"]
        assert calculator(parts[1]["text"]) == parts[2]["text"]
        assert task.evaluate(conversation, text_of(parts))
        assert not task.evaluate(conversation, f"#### {int(parts[2]['text']) + 1}")


def test_spelling_bee_asks_in_many_ways(words):
    assert len(set(spellingbee.PHRASINGS)) >= 50
    assert all(phrasing.count("{word}") == phrasing.count("{letter}") == 1 for phrasing in spellingbee.PHRASINGS)
    questions = [conversation["messages"][0]["content"] for conversation in spellingbee.SpellingBee(300, "train")]
    assert len(set(questions)) > 250
    for feature in ("?", "'", '"'):
        assert 30 < sum(feature in question for question in questions) < 270
    counts = [text_of(c["messages"][1]["content"])[-1] for c in spellingbee.SpellingBee(1000, "train")]
    assert 30 < counts.count("0") < 120  # one letter in ten comes from the alphabet


def test_spelling_examples_are_drawn_by_their_number(words):
    train, test = spellingbee.SpellingBee(50, "train"), spellingbee.SpellingBee()
    assert len(test) == 256
    assert train[7] == spellingbee.SpellingBee(8, "train")[7]
    assert [train[i] for i in range(50)] != [test[i] for i in range(50)]
    for task, seed in ((train, 7), (test, 10_000_007)):
        assert random.Random(seed).choice(words) in task[7]["messages"][0]["content"]


def test_word_list_of_another_shape_is_refused(monkeypatch, tmp_path):
    (tmp_path / "words.txt").write_text("banana\n<html>\n")
    monkeypatch.setattr(spellingbee, "plain_file", lambda url, name: tmp_path / "words.txt")
    with pytest.raises(ValueError, match="<html>"):
        spellingbee.SpellingBee()


def test_own_conversations_come_in_both_forms(tmp_path):
    path = tmp_path / "mine.jsonl"
    system = [{"role": "system", "content": "Be brief."}, *TALK]
    path.write_text("\n".join([json.dumps(TALK), "", json.dumps({"messages": system, "id": 1})]) + "\n")
    task = customjson.CustomJSON(path)
    assert [conversation["messages"] for conversation in task] == [TALK, system]
    assert task.name == "mine"


@pytest.mark.parametrize(
    "line, says",
    [
        ("{not json", "expected JSON, got '{not json"),
        ('"text"', "list of messages"),
        ("[]", "list of messages"),
        ('{"rows": []}', "list of messages"),
        (json.dumps(TALK[:1]), "at least"),
        (json.dumps([TALK[0], TALK[0]]), "message 1: expected role 'assistant'"),
        (json.dumps(TALK + TALK[:1]), "last message"),
        (json.dumps([TALK[0], {"role": "assistant"}]), "message 1"),
        (json.dumps([TALK[0], {"role": "assistant", "content": 3}]), "message 1"),
        (json.dumps([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, TALK[1]]), "message 0"),
        (json.dumps([TALK[0], {"role": "assistant", "content": [{"type": "image", "text": ""}]}]), "message 1"),
    ],
)
def test_a_bad_line_of_ones_own_file_is_named(tmp_path, line, says):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(TALK) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=says) as error:
        customjson.CustomJSON(path)
    assert f"{path}, line 2" in str(error.value)


def test_a_missing_or_empty_file_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="found none"):
        customjson.CustomJSON(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty file"):
        customjson.CustomJSON(tmp_path / "empty.jsonl")


class Numbers(Task):
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"asked": f"{self.name}{range(self.size)[index]}"}

    def evaluate(self, conversation, answer):
        return conversation["asked"] == answer


def test_mixture_holds_every_row_once_in_a_seeded_order():
    a, b = Numbers("a", 30), Numbers("b", 10)
    mixture = Mixture([a, b, b])
    assert sorted(row["asked"] for row in mixture) == sorted(row["asked"] for row in [*a, *b, *b])
    assert list(mixture) == list(Mixture([a, b, b])) != list(Mixture([a, b, b], seed=1))
    pairs = [(t, row) for t, size in enumerate((30, 10, 10)) for row in range(size)]
    random.Random(42).shuffle(pairs)
    assert list(mixture) == [{"asked": f"{'abb'[t]}{row}", "of": t} for t, row in pairs]


def test_slice_is_a_part_of_a_task():
    part = Slice(Numbers("a", 10), 2, 5)
    assert [row["asked"] for row in part] == ["a2", "a3", "a4"] and len(part) == 3
    assert part.name == "a" and part.evaluate(part[0], "a2")


def test_tasks_travel_between_processes(serve, words):
    serve(*SOURCES["arc"], [ARC_ROW])
    for task in (arc.ARC("ARC-Easy", "test"), spellingbee.SpellingBee(size=3), Mixture([Numbers("a", 3)])):
        assert list(pickle.loads(pickle.dumps(task))) == list(task)
