"""Spelling words, and counting letters in them: what a model that reads tokens and not letters has to be taught."""

import random
import string

from nanochat.dataset import plain_file
from tasks.common import Task, check_index, final_number, text_of

WORDS = "words_alpha.txt"
WORDS_URL = f"https://raw.githubusercontent.com/dwyl/english-words/refs/heads/master/{WORDS}"
TEST_SEED = 10_000_000  # example i is drawn from Random(i), of the test split from Random(TEST_SEED + i)

PHRASINGS = [
    "How many {letter} are in {word}",
    "How many {letter} are there in {word}",
    "How many {letter} are in the word {word}",
    "How many times does {letter} occur in {word}",
    "How many times does the letter {letter} appear in {word}",
    "How many times do you see {letter} in {word}",
    "How many of the letters of {word} are {letter}",
    "How often does {letter} come up in {word}",
    "How often do I write {letter} when I write {word}",
    "In {word}, how many {letter} are there",
    "In the word {word}, how often is {letter} used",
    "What is the number of {letter} in {word}",
    "What is the count of the letter {letter} in {word}",
    "Count the {letter} in {word}",
    "Count every {letter} in the word {word}",
    "Please count how often {letter} occurs in {word}",
    "Can you count the letter {letter} in {word}",
    "Could you tell me how many {letter} {word} has",
    "Do you know how many {letter} {word} contains",
    "Tell me the number of times {letter} is in {word}",
    "I need the number of {letter} in {word}",
    "Find out how many {letter} there are in {word}",
    "Look at {word} and count {letter}",
    "Go through {word} letter by letter. How many are {letter}",
    "Number of {letter} in {word}",
    "{word}: how many {letter}",
    "If I spell {word}, how many times do I say {letter}",
    "Cuántas {letter} hay en {word}",
    "Cuántas veces aparece la letra {letter} en la palabra {word}",
    "Cuenta las {letter} de {word}",
    "Combien de {letter} y a-t-il dans {word}",
    "Combien de fois la lettre {letter} figure-t-elle dans le mot {word}",
    "Compte les {letter} dans {word}",
    "Wie viele {letter} gibt es in {word}",
    "Wie oft kommt der Buchstabe {letter} im Wort {word} vor",
    "Zähle die {letter} in {word}",
    "Quante {letter} ci sono in {word}",
    "Quante volte compare la lettera {letter} nella parola {word}",
    "Quantas letras {letter} existem em {word}",
    "Quantas vezes a letra {letter} aparece na palavra {word}",
    "Hoeveel {letter} zitten er in {word}",
    "Hur många {letter} finns det i {word}",
    "Ile razy litera {letter} występuje w słowie {word}",
    "Kolikrát je písmeno {letter} ve slově {word}",
    "{word} kelimesinde kaç tane {letter} var",
    "Сколько букв {letter} в слове {word}",
    "Скільки разів літера {letter} є в слові {word}",
    "Πόσες φορές υπάρχει το γράμμα {letter} στη λέξη {word}",
    "{word} 这个单词里有几个 {letter}",
    "单词 {word} 中字母 {letter} 出现了多少次",
    "{word} という単語に {letter} はいくつありますか",
    "{word} 에 {letter} 가 몇 개 있나요",
    "{word} में {letter} कितनी बार आता है",
    "كم مرة يظهر الحرف {letter} في كلمة {word}",
]


class SimpleSpelling(Task):
    """Write a word letter by letter."""

    name = "SimpleSpelling"

    def __init__(self, size=200_000, split="train"):
        self.size, self.split, self.words = size, split, word_list()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        word = rng_of(self.split, check_index(index, self.size)).choice(self.words)
        return {
            "messages": [
                {"role": "user", "content": f"Spell the word: {word}"},
                {"role": "assistant", "content": spelled(word)},
            ]
        }

    def evaluate(self, conversation, answer):
        return answer.strip() == conversation["messages"][-1]["content"]


class SpellingBee(Task):
    """Count a letter in a word: first by spelling it out, then with the tool."""

    name = "SpellingBee"

    def __init__(self, size=256, split="test"):
        self.size, self.split, self.words = size, split, word_list()

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        rng = rng_of(self.split, check_index(index, self.size))
        word = rng.choice(self.words)
        letter = rng.choice(word if rng.random() < 0.9 else string.ascii_lowercase)
        return {
            "messages": [
                {"role": "user", "content": question(rng, word, letter)},
                {"role": "assistant", "content": worked_answer(word, letter)},
            ]
        }

    def evaluate(self, conversation, answer):
        return final_number(answer) == final_number(text_of(conversation["messages"][-1]["content"]))


def word_list():
    """English words in lower case, fetched on first use."""
    path = plain_file(WORDS_URL, WORDS)
    words = path.read_text(encoding="utf-8").split()
    if not words or not all(word.isascii() and word.isalpha() and word.islower() for word in words):
        bad = next((word for word in words if not (word.isascii() and word.isalpha() and word.islower())), "nothing")
        raise ValueError(f"{path}: expected one word of the letters a to z a line, got {bad[:60]!r}")
    return words


def rng_of(split, index):
    if split not in ("train", "test"):
        raise ValueError(f"expected the split train or test, got {split!r}")
    return random.Random(TEST_SEED * (split == "test") + index)


def spelled(word):
    return f"{word}:{','.join(word)}"


def question(rng, word, letter):
    """The question in one of many forms: phrasing, quotes, capitals and question mark are drawn."""
    phrasing = rng.choice(PHRASINGS)
    if rng.random() < 0.3:
        phrasing = phrasing.lower()  # people do not always begin with a capital; the slots are in lower case already
    letter_quote, word_quote = rng.choice(["", "'", '"']), rng.choice(["", "'", '"'])
    slots = {"letter": f"{letter_quote}{letter}{letter_quote}", "word": f"{word_quote}{word}{word_quote}"}
    return phrasing.format(**slots) + rng.choice(["", "?"])


def worked_answer(word, letter):
    """The parts of the answer: spell, count through the letters, check in Python, conclude."""
    count, lines = 0, []
    for i, c in enumerate(word, 1):
        count += c == letter
        lines.append(f"{i}:{c}" + (f" hit! count={count}" if c == letter else ""))
    by_hand = "\n".join(
        [f"Let me go through '{word}' and look for '{letter}'.", "", spelled(word), "", *lines, ""]
        + [f"By hand I count {count}. Python shall check it:", "", ""]
    )
    return [
        {"type": "text", "text": by_hand},
        {"type": "python", "text": f"'{word}'.count('{letter}')"},
        {"type": "python_output", "text": str(count)},
        {"type": "text", "text": f"\n\nBoth ways give the same.\n\n#### {count}"},
    ]
