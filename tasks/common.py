"""What every task is: a fixed sequence of conversations, and a verdict on a model's answer to each."""

import random
import re

import numpy as np


class Task:
    """A sequence of conversations whose last message is the reference assistant answer.

    A subclass sets the attributes, and writes `__len__`, `__getitem__` and, if it is an examination, `evaluate`.
    Plain data only: tasks are pickled and shared between processes.
    """

    name = "task"
    kind = "generative"  # or "categorical": the answer is one of conversation["letters"], read off the logits
    baseline = 0.0  # accuracy of guessing

    def __len__(self):
        raise NotImplementedError(f"{type(self).__name__} has no __len__")

    def __getitem__(self, index):
        """The conversation of row `index`: {"messages": [...]}, and "letters": [...] when the task is categorical."""
        raise NotImplementedError(f"{type(self).__name__} has no __getitem__")

    def evaluate(self, conversation, answer):
        """Whether `answer`, the visible text (or, categorical, the chosen letter), is right for this conversation."""
        raise NotImplementedError(f"{self.name} is for training only: it has no verdict on an answer")

    def verdict(self, conversation, answer):
        """What evaluate() says, in words: "right", or "wrong" and maybe why."""
        return "right" if self.evaluate(conversation, answer) else "wrong"

    def reward(self, conversation, answer):
        """What reinforcement learning pays for the answer."""
        return float(self.evaluate(conversation, answer))


class Mixture(Task):
    """Several tasks as one, their rows shuffled together once. A task listed twice is seen twice. A conversation says
    in "of" which of them it is from, and that one has the verdict."""

    name = "mixture"

    def __init__(self, tasks, seed=42):
        self.tasks = list(tasks)
        self.rows = [(t, row) for t, task in enumerate(self.tasks) for row in range(len(task))]
        random.Random(seed).shuffle(self.rows)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        t, row = self.rows[check_index(index, len(self))]
        return {**self.tasks[t][row], "of": t}

    def evaluate(self, conversation, answer):
        return self.tasks[conversation["of"]].evaluate(conversation, answer)

    def verdict(self, conversation, answer):
        return self.tasks[conversation["of"]].verdict(conversation, answer)

    def reward(self, conversation, answer):
        return self.tasks[conversation["of"]].reward(conversation, answer)


class Slice(Task):
    """Rows `start` to `stop` of a task, for a validation set or a trial of bounded size."""

    def __init__(self, task, start=0, stop=None):
        self.task, self.rows = task, range(len(task))[start:stop]
        self.name, self.kind, self.baseline = task.name, task.kind, task.baseline

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.task[self.rows[check_index(index, len(self))]]

    def evaluate(self, conversation, answer):
        return self.task.evaluate(conversation, answer)

    def verdict(self, conversation, answer):
        return self.task.verdict(conversation, answer)

    def reward(self, conversation, answer):
        return self.task.reward(conversation, answer)


def shuffled(rows, seed=42):
    """The rows in a fixed random order: the order in which published scores on part of a task were taken."""
    return [rows[i] for i in np.random.default_rng(seed).permutation(len(rows))]


def check_index(index, length):
    """The row number, so that a Task ends a `for` loop as a list does. Negative rows are not served."""
    if not 0 <= index < length:
        raise IndexError(f"row {index} of a task with {length} rows")
    return index


def multiple_choice_prompt(question, letters, choices):
    """The letter stands after its choice with no space between: small models bind it better so."""
    lines = [f"- {choice}={letter}" for letter, choice in zip(letters, choices, strict=True)]
    return "\n".join(
        [f"Multiple Choice question: {question}", *lines, "", "Respond only with the letter of the correct answer."]
    )


def multiple_choice_conversation(question, letters, choices, answer):
    """A categorical conversation; `answer` is the right letter."""
    return {
        "messages": [
            {"role": "user", "content": multiple_choice_prompt(question, letters, choices)},
            {"role": "assistant", "content": answer},
        ],
        "letters": list(letters),
    }


def text_of(content):
    """The visible text of a message's content: its text parts, without tool calls and their outputs."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def check_messages(messages):
    """None if the messages are a conversation that chat.render takes, else what is wrong with them, in words."""
    if not isinstance(messages, list) or not messages:
        return f"expected a list of messages, got {type(messages).__name__} {str(messages)[:60]!r}"
    offset = int(isinstance(messages[0], dict) and messages[0].get("role") == "system")
    if len(messages) - offset < 2:
        return f"expected at least a user and an assistant message, got {len(messages)} message(s)"
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            return f'message {i}: expected {{"role": ..., "content": ...}}, got {str(message)[:60]!r}'
        expected = "system" if i < offset else ("user", "assistant")[(i - offset) % 2]
        if message["role"] != expected:
            return f"message {i}: expected role {expected!r} (user and assistant take turns), got {message['role']!r}"
        problem = _check_content(message["content"], parts_allowed=expected == "assistant")
        if problem:
            return f"message {i}: {problem}"
    return None


def _check_content(content, parts_allowed):
    if isinstance(content, str):
        return None
    if not parts_allowed:
        return f"expected content as text, got {type(content).__name__}"
    if not isinstance(content, list) or not content:
        return f"expected content as text or a list of parts, got {type(content).__name__}"
    for part in content:
        if not isinstance(part, dict) or part.get("type") not in ("text", "python", "python_output"):
            return f"expected parts of type text, python or python_output, got {str(part)[:60]!r}"
        if not isinstance(part.get("text"), str):
            return f'expected "text" as a string in each part, got {str(part)[:60]!r}'
    return None


def row_check(schema, further=lambda row: None):
    """What hub_rows shall check: a function that says what is wrong with a row, or None. The row has the fields of
    `schema` {name: type}, and then nothing that `further` finds wrong."""

    def problem(row):
        if not isinstance(row, dict):
            return f"expected fields by name, got {type(row).__name__} {str(row)[:60]!r}"
        for field, kind in schema.items():
            if field not in row:
                return f"expected a field {field!r}, got {sorted(row)}"
            if not isinstance(row[field], kind):
                got = type(row[field]).__name__
                return f"expected {field!r} as {kind.__name__}, got {got} {str(row[field])[:60]!r}"
        return further(row)

    return problem


FINAL_NUMBER = re.compile(r"#### (\-?[0-9\.\,]+)")


def final_number(text):
    """What stands after the first `#### `, without commas, as a string to be compared; None if there is none."""
    match = FINAL_NUMBER.search(text)
    return match[1].replace(",", "") if match else None
