"""The tiny world as conversations: what a tiny chat model is taught, and held-out questions that show what it knows.

Example i is a pure function of (kind, split, i). Training asks in the wordings of nanochat/tinyworld_text.py and never
about a fact that is `never_asked`. The examination asks in the wordings below, which share no four words in a row with
those or with any text of the corpus, and about invented names whose first syllables nothing trained on has.
"""

import random
import re

from nanochat import tinyworld_facts as world
from nanochat import tinyworld_skills as skills
from nanochat import tinyworld_text as text
from nanochat.calculator import calculator
from nanochat.tinyworld_tables import PEOPLE, WORDS
from tasks.common import Task, check_index

TEST_QUESTIONS = text.table("""
capital:: Any idea which city {s} calls its capital? | If I visit {s}, which capital city will I see?
 Remind me, {s} picked which city as capital? | Would you say which capital {s} has?
continent:: Any idea which continent holds {s}? | If I visit {s}, which continent will I see?
 Remind me, {s} belongs to which continent? | Would you say which continent has {s} on it?
language:: Any idea which language {s} has? | If I visit {s}, which language will I hear?
 Remind me, {s} speaks which language? | Would you say which language a person from {s} speaks?
currency:: Any idea which currency {s} takes? | If I visit {s}, which currency will I need?
 Remind me, {s} pays with which currency? | Would you say which money shops in {s} take?
symbol:: Any idea which symbol {s} got? | In a table of elements, {s} stands there with which symbol?
 Remind me, {s} got which chemical symbol? | Would you say which symbol we write for {s}?
class:: Any idea which animal class has {S} in it? | If I see {S}, which animal class do I see?
 Remind me, the {s} is in which animal class? | Would you say which animal class we give {S}?
young:: Any idea what a young {s} may be called? | If {S} gets a baby, how is that baby called?
 Remind me, a baby {s} has which name? | Would you say how people call a young {s}?
sound:: Any idea which sound {S} makes? | If I meet {S}, which sound will it make?
 Remind me, the {s} makes what kind of sound? | Would you say which sound {S} has?
month_after:: Any idea which month is right after {s}? | Once {s} is gone, which month do we get after it?
 Remind me, after {s} we have which month? | Would you say which month we get after {s}?
month_before:: Any idea which month is right before {s}? | Until {s} came, which month did we have before it?
 Remind me, before {s} we have which month? | Would you say which month we get before {s}?
month_number:: Any idea which month number {s} got? | If we count months, which number is for {s}?
 Remind me, {s} is which month by number? | Would you say which number we give to {s}?
day_after:: Any idea which day is right after {s}? | Once {s} is gone, which day do we get after it?
 Remind me, after {s} we have which day? | Would you say which day we get after {s}?
day_before:: Any idea which day is right before {s}? | Until {s} came, which day did we have before it?
 Remind me, before {s} we have which day? | Would you say which day we get before {s}?
opposite:: Any idea which word is opposite to {s}? | If I turn {s} around, which opposite do I get?
 Remind me, {s} has which word as opposite? | Would you say which opposite {s} has?
plural:: Any idea which plural {s} has? | If I have two, which plural do I use for {s}?
 Remind me, {s} has which word as plural? | Would you say which plural we write for {s}?
past:: Any idea which past tense {s} has? | If it was last week, which past tense do I use for {s}?
 Remind me, {s} has which word as past tense? | Would you say which past tense we write for {s}?
color:: Any idea which color {s} may have? | If I see {s}, which color do I see?
 Remind me, {s} may have which color? | Would you say which color we see with {s}?
""")
TEST_PROBLEMS = text.table("""
+:: Work out {a} + {b}. | Work out {a} plus {b}. | Which number is {a} plus {b}? | Which number is {a} + {b}?
 I add {a} and {b}; which number do I get? | With {a} {g} in a bag and {b} {g} in a box, how many {g} has {p}?
-:: Work out {a} - {b}. | Work out {a} minus {b}. | Which number is {a} minus {b}? | Which number is {a} - {b}?
 I subtract {b} from {a}; which number do I get? | Of {a} {g}, {p} loses {b}; how many {g} has {p} left?
*:: Work out {a} * {b}. | Work out {a} times {b}. | Which number is {a} times {b}? | Which number is {a} * {b}?
 I multiply {a} by {b}; which number do I get? | With {b} {g} each in {a} boxes, how many {g} has {p}?
/:: Work out {a} / {b}. | Work out {a} divided by {b}. | Which number is {a} divided by {b}?
 Which number is {a} / {b}? | I divide {a} by {b}; which number do I get?
 With {a} {g} shared by {b} children, how many {g} has each?
""")
TEST_HARD = """
Work out {a} + {b} - {c}. = {a}+{b}-{c}
Which number is {a} times {b} plus {c}? = {a}*{b}+{c}
Work out ({a} + {b}) * {d}. = ({a}+{b})*{d}
Of {a} {g} and {b} more, {p} loses {c}; how many {g} has {p} left? = {a}+{b}-{c}
I add {a} and {b} and multiply by {d}; which number do I get? = ({a}+{b})*{d}
Work out {a} * {b} + {c} - {d}. = {a}*{b}+{c}-{d}
Which number is {a} plus {b} minus {c} plus {d}? = {a}+{b}-{c}+{d}
Work out ({a} + {b}) * {d} - {c}. = ({a}+{b})*{d}-{c}
Work out {a} * {b} + {c} * {d} - {e}. = {a}*{b}+{c}*{d}-{e}
With {a} boxes of {b} {g} and {c} bags of {d} {g}, how many {g} has {p}? = {a}*{b}+{c}*{d}
""".strip().splitlines()
TEST_COUNTING = text.wordings("""
In {w}, how often do I see {l}? | Look at {w}; how many {l} has it? | Remind me, {w} has how many {l}?
Would you count how many {l} {w} has? | Find out how many {l} {w} has.
""")
TEST_SPELLING = text.wordings("""
Remind me how to spell {w}. | Would you spell {w} for me? | I must spell {w}; which letters do I write?
Go through {w} letter by letter.
""")
TEST_STORY = text.table("""
who:: At the end, who has the {o}? | Which of them has the {o} in the end? | Remind me, the {o} is now with whom?
where:: At the end, where is {p}? | Which place has {p} in the end? | Remind me, {p} is now in which place?
what:: At the end, what does {p} have? | Which thing has {p} in the end? | Remind me, {p} has now which thing?
""")

# Asked in training only, besides the wordings of reading: there the letter never stands right before its word.
LETTER_BEFORE_WORD = text.wordings("""
Say how many {l} {w} may have. | How many {l} {w} has is my question. | Do you know how many {l} {w} holds?
I want to know how many {l} {w} has. | Tell me how many {l} {w} has. | Please say how many {l} {w} holds.
""")

# Besides the wordings of reading, which all have two steps: what fine-tuning shows, a few times each, and what is only
# practised, by its results.
SHOWN_HARD = """
{p} has {a} {g}, finds {b} and loses {c}. How many are left? = {a}+{b}-{c}
If I add {a} and {b}, then multiply by {d}, what comes out? = ({a}+{b})*{d}
What is {a} + {b} - {c} + {d}? = {a}+{b}-{c}+{d}
What is {a} * {b} + {c} - {d}? = {a}*{b}+{c}-{d}
What is ({a} + {b}) * {d} - {c}? = ({a}+{b})*{d}-{c}
Add {a} and {b}, multiply by {d} and subtract {c}. = ({a}+{b})*{d}-{c}
{a} children have {b} {g} each and {c} others have {d} each. How many is that? = {a}*{b}+{c}*{d}
What is {a} * {b} + {c} * {d} - {e}? = {a}*{b}+{c}*{d}-{e}
""".strip().splitlines()
PRACTICE_HARD = """
How much is {a} times {b} plus {c}? = {a}*{b}+{c}
Multiply {a} by {b} and add {c}. = {a}*{b}+{c}
Add {a} and {b} and then multiply by {d}. = ({a}+{b})*{d}
I add {a} and {b}, then I multiply by {d}. What do I get? = ({a}+{b})*{d}
I add {a} and {b}, then multiply by {d}. What comes out? = ({a}+{b})*{d}
If {p} adds {a} and {b}, then multiplies by {d}, what comes out? = ({a}+{b})*{d}
{p} has {a} {g} and finds {b}, but loses {c}. How many are there now? = {a}+{b}-{c}
{p} has {a} {g} and {b} more, but loses {c}. How many are left? = {a}+{b}-{c}
{p} has {a} {g} and {b} others and loses {c}. How many are left? = {a}+{b}-{c}
Of {a} + {b} {g}, {c} are lost. How many are left? = {a}+{b}-{c}
Of {a} {g} + {b} more, {c} are lost. How many are left? = {a}+{b}-{c}
Of {a} {g} and {b} others, {c} are lost. How many are left? = {a}+{b}-{c}
What is {a} + {b} minus {c} plus {d}? = {a}+{b}-{c}+{d}
What is {a} plus {b} - {c} + {d}? = {a}+{b}-{c}+{d}
How much is {a} plus {b} minus {c} + {d}? = {a}+{b}-{c}+{d}
Calculate {a} plus {b} minus {c} plus {d}. = {a}+{b}-{c}+{d}
How much is {a} + {b} - {c} + {d}? = {a}+{b}-{c}+{d}
How much is {a} * {b} + {c} * {d}? = {a}*{b}+{c}*{d}
Calculate {a} * {b} + {c} * {d} - {e}. = {a}*{b}+{c}*{d}-{e}
{a} boxes have {b} {g} each and {c} others have {d} each. How many is that? = {a}*{b}+{c}*{d}
{a} boxes have {b} {g} each and {c} bags have {d} {g} each. How many is that? = {a}*{b}+{c}*{d}
{p} has {a} boxes of {b} {g} each and {c} bags of {d} each. How many is that? = {a}*{b}+{c}*{d}
{p} has {a} bags of {b} {g} and {c} boxes of {d} {g}. How many is that? = {a}*{b}+{c}*{d}
""".strip().splitlines()

TRAIN_KINDS = (
    "facts arithmetic arithmetic_hard counting spelling multiple_choice stories smalltalk identity unknown".split()
)
PRACTICE_KINDS = ("arithmetic", "arithmetic_hard", "counting")
TEST_KINDS = """
facts_new_phrasing facts_never_asked arithmetic arithmetic_hard counting spelling multiple_choice stories
unknown_refused known_refused
""".split()
TEST_SIZE = 250
REFUSAL_PHRASES = ("do not know", "don't know", "never heard")


def is_refusal(answer: str) -> bool:
    """Whether the answer says that it does not know."""
    return any(phrase in answer.lower() for phrase in REFUSAL_PHRASES)


def has_words(answer: str, words: str, case: bool = False) -> bool:
    """Whether the words stand in the answer as whole words."""
    return bool(re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer, 0 if case else re.IGNORECASE))


def without(answer: str, words: str, case: bool = False) -> str:
    """The answer with these whole words taken out."""
    return re.sub(rf"(?<!\w){re.escape(words)}(?!\w)", " ", answer, flags=0 if case else re.IGNORECASE)


def last_number(answer: str) -> str | None:
    """The last whole number in the answer, without thousands commas."""
    numbers = re.findall(r"-?\d+", re.sub(r"(?<=\d),(?=\d{3})", "", answer))
    return numbers[-1] if numbers else None


class TinyWorld(Task):
    """Conversations of one kind. Besides `messages`, those of the test split carry what `evaluate` needs."""

    def __init__(self, kind: str, split: str, size: int | None = None):
        kinds = {"train": TRAIN_KINDS, "practice": PRACTICE_KINDS, "test": TEST_KINDS}
        if split not in kinds or kind not in kinds[split]:
            known = "; ".join(f"{name}: {' '.join(members)}" for name, members in kinds.items())
            raise ValueError(f"no tiny world task of kind {kind!r} in split {split!r}; there are {known}")
        self.name, self.split, self.size = kind, split, size or (TEST_SIZE if split == "test" else 1000)
        self.baseline = 0.25 if kind == "multiple_choice" else 0.0
        members = [fact for fact in world.facts() if world.never_asked(fact) == (kind == "facts_never_asked")]
        self.facts = random.Random(f"{split} facts").sample(members, len(members))

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        check_index(index, self.size)
        rng = random.Random(f"{self.name} {self.split} {index}")
        kind = {"facts_new_phrasing": "facts", "facts_never_asked": "facts", "known_refused": "facts"}.get(self.name)
        kind = kind or self.name.removesuffix("_refused")
        return getattr(self, f"_{kind}")(index, rng)

    def evaluate(self, conversation, answer):
        expected, wrong = conversation["expected"], conversation.get("wrong", ())
        if self.name in ("unknown_refused", "known_refused"):
            return is_refusal(answer)
        if self.name == "multiple_choice":
            return answer.strip().rstrip(".") == expected
        if self.name in ("arithmetic", "arithmetic_hard", "counting"):
            return last_number(answer) == expected
        if self.name == "spelling":
            return answer.strip() == expected
        case = conversation.get("case", False)
        rest = without(without(answer, expected, case), conversation.get("subject", expected), case)
        right = has_words(answer, expected, case) and not any(has_words(rest, other, case) for other in wrong)
        return right and not is_refusal(answer)

    def _fact(self, index):
        """The facts in rounds, each round in another order in training; the number of the round."""
        turn, place = divmod(index, len(self.facts))
        if self.split == "test":
            return self.facts[place], turn
        return self.facts[(place * 101 + turn * 37) % len(self.facts)], turn

    def _question(self, fact, index, rng):
        if self.split == "train":
            return text.question(fact, rng)
        forms = TEST_QUESTIONS[fact.relation]
        return text.fill(forms[index % len(forms)], fact)

    def _facts(self, index, rng):
        fact, turn = self._fact(index)
        pairs = [(self._question(fact, index // 3 + turn, rng), text.answer(fact))]
        if self.split == "train":
            for other in rng.sample(self.facts, rng.choice((0, 0, 0, 0, 1, 2))):
                pairs.append((text.question(other, rng), text.answer(other)))
            if fact.relation in text.REVERSE and rng.random() < 0.1:
                asked = text.fill(rng.choice(text.REVERSE[fact.relation]), fact)
                pairs[0] = (asked, text.fill("{a} is {t} {s}.", fact).replace("{t}", text.REVERSE_LINK[fact.relation]))
        wrong = [other for other in world.answers(fact.relation) if other != fact.answer]
        case = fact.relation == "symbol"
        return _conversation(pairs, expected=fact.answer, wrong=wrong, subject=fact.subject, case=case)

    def _unknown(self, index, rng):
        fact = world.invented_fact(rng, test=self.split == "test")
        pairs = [(self._question(fact, index, rng), text.REFUSAL)]
        if self.split == "train" and rng.random() < 0.4:
            known = rng.choice([one for one in self.facts if one.relation in world.SUBJECT_KINDS])
            pairs.insert(rng.randint(0, 1), (text.question(known, rng), text.answer(known)))
        return _conversation(pairs, expected="")

    def _arithmetic(self, index, rng):
        forms = TEST_PROBLEMS if self.split == "test" else skills.PROBLEMS
        asked, expression, _ = skills.problem(rng, forms)
        if self.split == "train" and rng.random() < 0.15:
            asked = f"{text.opener(rng)} {asked}"
        return _with_tool(asked, expression)

    def _arithmetic_hard(self, index, rng):
        taught = [*skills.HARD, *SHOWN_HARD]
        forms = {"train": taught, "practice": SHOWN_HARD + PRACTICE_HARD, "test": TEST_HARD}[self.split]
        asked, expression, _ = skills.hard_problem(rng, forms)
        return _with_tool(asked, expression)

    def _counting(self, index, rng):
        word = rng.choice(WORDS.split())
        letter = skills.letter_in(word, rng)
        forms = TEST_COUNTING if self.split == "test" else [*skills.COUNTING, *LETTER_BEFORE_WORD]
        return _with_tool(skills.counting_question(word, letter, rng, forms), f"'{word}'.count('{letter}')")

    def _spelling(self, index, rng):
        word = rng.choice(WORDS.split())
        forms = skills.SPELLING if self.split == "train" else TEST_SPELLING
        answer = skills.letters_of(word)
        return _conversation([(rng.choice(forms).format(w=word), answer)], expected=answer)

    def _multiple_choice(self, index, rng):
        """In half of the training conversations, further questions are asked about the same choices."""
        fact, turn = self._fact(index)
        options = world.choices(fact, rng)
        letter = "ABCD"[options.index(fact.answer)]
        asked = skills.multiple_choice(self._question(fact, index // 3 + turn, rng), options)
        pairs = [(asked, letter)]
        if self.split == "train" and rng.random() < 0.5:
            same = [one for one in self.facts if one.relation == fact.relation and one is not fact]
            others = [one for one in same if one.answer in options]
            for other in rng.sample(others, min(len(others), 3)):
                pairs.append((text.question(other, rng), "ABCD"[options.index(other.answer)]))
        return _conversation(pairs, expected=letter)

    def _stories(self, index, rng):
        told = skills.story(rng, rng.randint(3, 6), past=rng.random() < 0.2)
        one = rng.choice(told[-1][1])
        if self.split == "train":
            question = skills.story_question(one, rng)
        else:
            question = rng.choice(TEST_STORY[one.kind]).format(**one.slots)
        joint = " " if rng.random() < 0.7 else "\n"
        pairs = [(" ".join(sentence for sentence, _ in told) + joint + question, skills.story_answer(one))]
        subject = one.slots["p"] if one.kind != "who" else one.slots["o"]
        return _conversation(pairs, expected=one.answer, wrong=one.candidates, subject=subject)

    def _smalltalk(self, index, rng):
        """Two to four turns, some in which the person's name is given and asked back."""
        turns = sorted(rng.sample(range(len(text.TALK)), rng.randint(2, 4)))  # greetings stand first in the table
        pairs = [(rng.choice(asked), said) for said, asked in (list(text.TALK.items())[turn] for turn in turns)]
        if rng.random() < 0.35:
            person = rng.choice(PEOPLE.split())
            given = (rng.choice(text.NAME_GIVEN).format(p=person), f"Hello {person}! I am glad to meet you.")
            pairs = [given, *pairs[:2], (rng.choice(text.NAME_ASKED), f"Your name is {person}.")]
        return _conversation(pairs)

    def _identity(self, index, rng):
        pairs = []
        for said, asked in rng.sample(list(text.IDENTITY.items()), rng.choice((1, 1, 2))):
            opener = f"{text.opener(rng)} " if rng.random() < 0.2 else ""
            pairs.append((opener + rng.choice(asked), said))
        return _conversation(pairs)


def _conversation(pairs, **extra):
    messages = []
    for asked, reply in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": reply}]
    return {"messages": messages, **extra}


def _with_tool(asked, expression):
    """The assistant writes the expression, the calculator its value, and the assistant says it."""
    value = calculator(expression)
    parts = [("python", expression), ("python_output", value), ("text", f"The answer is {value}.")]
    return _conversation([(asked, [{"type": kind, "text": part} for kind, part in parts])], expected=value)
