"""The skills of the tiny world besides facts: stories with state, arithmetic, letters, multiple choice.

Slots of the wordings: {p} {q} people, {o} an object, {l} a place (in counting: a letter), {g} goods, {w} a word,
{a} to {e} numbers.
The examination has wordings of its own, in tasks/tinyworld.py.
"""

import random
from dataclasses import dataclass

from nanochat.calculator import calculator
from nanochat.tinyworld_tables import GOODS, OBJECTS, PEOPLE, PLACES
from nanochat.tinyworld_text import table, with_article, wordings

# ---------------------------------------------------------------------------------------------------------------------
# Stories

STORY_QUESTIONS = table("""
who:: Who has the {o}? | Who has the {o} now? | Which person has the {o}? | Who is the owner of the {o} now?
 Tell me who has the {o}. | Do you know who has the {o}? | The {o} is with whom? | Who holds the {o}?
 In the end, who holds the {o}? | At last, who holds the {o}? | Which of these people has the {o}?
 Remind me who has the {o}.
where:: Where is {p}? | Where is {p} now? | In which place is {p}? | Which place is {p} in? | Tell me where {p} is.
 Do you know where {p} is? | Where did {p} go? | Where can I find {p}?
 In the end, in which place is {p}? | Remind me where {p} is. | {p} is in which place?
what:: What does {p} have? | What does {p} have now? | Which thing does {p} have? | What does {p} hold?
 Tell me what {p} has. | Do you know what {p} has? | {p} has which thing? | What is with {p}?
 In the end, which thing does {p} hold? | Remind me what {p} has.
""")
STORY_ANSWERS = {"who": "{p} has the {o}.", "where": "{p} is in the {l}.", "what": "{p} has the {o}."}


@dataclass(frozen=True)
class StoryQuestion:
    """kind is who, where or what; the slots fill a question; candidates are the wrong answers the story offers."""

    kind: str
    slots: dict
    answer: str
    candidates: tuple


def story(rng: random.Random, length: int, past: bool = False) -> list[tuple[str, list[StoryQuestion]]]:
    """A story about who has what and who is where: `length` sentences, each with the questions that are settled then.

    An event has at most three words besides its slots, so that stories share no 4-gram of wording.
    """
    people = rng.sample(PEOPLE.split(), rng.choice((2, 2, 3)))
    objects = rng.sample(OBJECTS.split(), rng.choice((1, 2, 2)))
    places = rng.sample(PLACES.split(), 3)
    has, gives, takes, goes, is_in, finds = (
        ("had", "gave", "took", "went", "was", "found") if past else ("has", "gives", "takes", "goes", "is", "finds")
    )
    holder, place, told = {}, {}, []
    while len(told) < length:
        person, draw = rng.choice(people), rng.random()
        free = [item for item in objects if item not in holder]
        if free and draw < 0.5:
            item = rng.choice(free)
            holder[item] = person
            sentence = f"{person} {rng.choice((has, finds))} {with_article(item)}."
        elif holder and draw < 0.7:
            item = rng.choice(sorted(holder))
            giver = holder[item]
            taker = holder[item] = rng.choice([other for other in people if other != giver])
            forms = (f"{giver} {gives} the {item} to {taker}.", f"{taker} {takes} the {item} from {giver}.")
            sentence = rng.choice(forms)
        else:
            target = rng.choice([spot for spot in places if spot != place.get(person)])
            verb = f"{goes} to" if person in place or rng.random() < 0.5 else f"{is_in} in"
            place[person] = target
            sentence = f"{person} {verb} the {target}."
        told.append((sentence, _settled(holder, place, people, objects, places)))
    return told


def _settled(holder: dict, place: dict, people: list, objects: list, places: list) -> list[StoryQuestion]:
    """Who has each object, what each owner of one thing has, and where each person is."""

    def others(all_of_them, answer):
        return tuple(other for other in all_of_them if other != answer)

    asked = []
    for item, person in holder.items():
        asked.append(StoryQuestion("who", {"o": item, "p": person}, person, others(people, person)))
        if list(holder.values()).count(person) == 1:
            asked.append(StoryQuestion("what", {"o": item, "p": person}, item, others(objects, item)))
    for person, target in place.items():
        asked.append(StoryQuestion("where", {"l": target, "p": person}, target, others(places, target)))
    return asked


def story_question(asked: StoryQuestion, rng: random.Random) -> str:
    """A trained wording of a question about a story."""
    return rng.choice(STORY_QUESTIONS[asked.kind]).format(**asked.slots)


def story_answer(asked: StoryQuestion) -> str:
    """The canonical answer to a question about a story."""
    return STORY_ANSWERS[asked.kind].format(**asked.slots)


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic

PROBLEMS = table("""
+:: What is {a} + {b}? | What is {a} plus {b}? | Add {a} and {b}. | Calculate {a} + {b}. | How much is {a} + {b}?
 How much is {a} plus {b}? | {a} + {b} = ? | What is the sum of {a} and {b}? | Please add {b} to {a}. | {a} plus {b}?
 {p} has {a} {g} and gets {b} more. How many {g} does {p} have now?
 {p} has {a} {g}. {q} has {b} {g}. How many {g} are there? | {p} finds {a} {g} and then {b} {g}. How many is that?
 There are {a} {g} here and {b} {g} there. How many {g} in all? | Work out the sum of {a} and {b}.
 Which number is the sum of {a} and {b}? | I add {b} to {a}. What do I get? | Work out: {a} + {b}
 {p} has a bag with {a} {g} and a box with {b} {g}. How many is that?
 Which number is equal to {a} + {b}? | Which number is equal to {a} plus {b}? | Which number gives {a} plus {b}?
 Tell me the number for {a} + {b}. | Which number do you find for {a} + {b}? | I add {a} and {b}. What comes out?
 If I add {b} to {a}, then what number comes out? | {p} adds {a} and {b}. Which number is right?
 {p} puts {b} {g} to {a} others. How many has {p}? | Now {a} + {b}, please. | Find {a} plus {b}.
 With {a} {g} here and {b} {g} there, what is the number of {g}?
-:: What is {a} - {b}? | What is {a} minus {b}? | Subtract {b} from {a}. | Calculate {a} - {b}.
 How much is {a} - {b}? | How much is {a} minus {b}? | {a} - {b} = ? | Take {b} away from {a}. | What is {a} less {b}?
 {a} minus {b}? | {p} has {a} {g} and gives away {b}. How many {g} are left?
 {p} has {a} {g}. {q} takes {b} of them. How many are left? | There are {a} {g} and {p} sells {b}. How many {g} remain?
 {p} had {a} {g} and lost {b}. How many {g} has {p} now? | Work out {a} less {b}. | Work out: {a} - {b}
 I subtract: {a} - {b}. What do I get? | I take {b} from {a}. What do I get? | Which number is {b} less than {a}?
 {p} loses {b} of {a} {g}. How many are left? | Of {a} {g}, {b} are lost. How many are left?
 Which number is equal to {a} - {b}? | Which number is equal to {a} minus {b}? | Which number gives {a} minus {b}?
 Tell me the number for {a} - {b}. | Which number do you find for {a} - {b}? | I subtract {b} from {a}. What comes out?
 If I subtract {b} from {a}, then what number comes out? | {p} subtracts {b} from {a}. Which number is right?
 Of {a} {g}, {p} eats {b}. How many {g} remain? | Now {a} - {b}, please. | Find {a} minus {b}.
 With {a} {g} less {b}, what is the number of {g}?
*:: What is {a} * {b}? | What is {a} times {b}? | Multiply {a} by {b}. | Calculate {a} * {b}. | How much is {a} * {b}?
 How much is {a} times {b}? | {a} * {b} = ? | What is the product of {a} and {b}? | Please multiply {a} and {b}.
 {a} times {b}? | {p} has {a} boxes with {b} {g} each. How many {g} are there?
 There are {a} bags with {b} {g} in each. How many {g} in all? | {a} children get {b} {g} each. How many {g} is that?
 Work out the product of {a} and {b}. | I multiply {a} and {b}. What do I get? | Work out: {a} * {b}
 With {a} boxes and {b} {g} in each, how many are there? | Which number is the product of {a} and {b}?
 Which number is equal to {a} * {b}? | Which number is equal to {a} times {b}? | Which number gives {a} times {b}?
 Tell me the number for {a} * {b}. | Which number do you find for {a} * {b}? | I multiply {a} by {b}. What comes out?
 If I multiply {a} by {b}, then what number comes out? | {p} multiplies {a} by {b}. Which number is right?
 In {a} boxes are {b} {g} each. How many has {p}? | Now {a} * {b}, please. | Find {a} times {b}.
 With {b} {g} in each of {a} boxes, what is the number of {g}?
/:: What is {a} / {b}? | What is {a} divided by {b}? | Divide {a} by {b}. | Calculate {a} / {b}.
 How much is {a} / {b}? | How much is {a} divided by {b}? | {a} / {b} = ? | Please divide {a} by {b}.
 {a} divided by {b}? | {p} shares {a} {g} among {b} children. How many {g} does each child get?
 {a} {g} go into {b} boxes. How many in each box? | Work out how often {b} goes into {a}. | Work out: {a} / {b}
 I divide {a} into {b} parts. How big is each? | {a} {g} are shared among {b} children. How many for each?
 Which number is equal to {a} / {b}? | Which number is equal to {a} divided by {b}?
 Which number gives {a} divided by {b}? | Tell me the number for {a} / {b}. | Which number do you find for {a} / {b}?
 I divide {a} by {b}. What comes out? | If I divide {a} by {b}, then what number comes out?
 {p} divides {a} by {b}. Which number is right? | {b} children share {a} {g}. How many does one child get?
 Now {a} / {b}, please. | Find {a} divided by {b}.
 With {a} {g} for {b} children, what does each of them get?
""")

# Two steps: all that SFT teaches of the hard tier. The expression stands after the bar.
HARD = """
What is {a} + {b} - {c}? = {a}+{b}-{c}
What is {a} plus {b} minus {c}? = {a}+{b}-{c}
What is {a} * {b} + {c}? = {a}*{b}+{c}
Calculate {a} * {b} - {c}. = {a}*{b}-{c}
Calculate ({a} + {b}) * {d}. = ({a}+{b})*{d}
Add {a} and {b}, then multiply by {d}. = ({a}+{b})*{d}
{p} has {a} {g}, gets {b} more and loses {c}. How many {g} are left? = {a}+{b}-{c}
{p} buys {a} boxes with {b} {g} each and finds {c} more. How many {g} are there? = {a}*{b}+{c}
""".strip().splitlines()


def operands(op: str, rng: random.Random) -> tuple[int, int, int]:
    """Two numbers and the exact, never negative result of the operation on them."""
    if op == "+":
        a, b = rng.choice(((rng.randint(2, 99), rng.randint(2, 99)), (rng.randint(10, 999), rng.randint(2, 999))))
        return a, b, a + b
    if op == "-":
        a, b = rng.choice(((rng.randint(2, 99), rng.randint(2, 99)), (rng.randint(10, 999), rng.randint(2, 999))))
        return max(a, b), min(a, b), abs(a - b)
    a, b = rng.randint(2, 99), rng.randint(2, 12)
    return (a, b, a * b) if op == "*" else (a * b, b, a)


def people_and_goods(rng: random.Random) -> dict:
    """Slots {p} {q} {g} of a word problem."""
    person, other = rng.sample(PEOPLE.split(), 2)
    return {"p": person, "q": other, "g": rng.choice(GOODS.split())}


def problem(rng: random.Random, forms: dict[str, list[str]] = PROBLEMS) -> tuple[str, str, int]:
    """A question of one step, its expression without spaces, and the result."""
    op = rng.choice("++--**/")
    a, b, result = operands(op, rng)
    return rng.choice(forms[op]).format(a=a, b=b, **people_and_goods(rng)), f"{a}{op}{b}", result


def hard_problem(rng: random.Random, forms: list[str] = HARD) -> tuple[str, str, int]:
    """A question of several steps, its expression, and the result (never negative)."""
    while True:
        asked, expression = rng.choice(forms).split(" = ")
        small = "*" in expression
        slots = {"a": rng.randint(2, 20) if small else rng.randint(10, 99), "b": rng.randint(2, 12 if small else 60)}
        slots |= {"c": rng.randint(2, 30), "d": rng.randint(2, 9), "e": rng.randint(2, 20)}
        expression = expression.format(**slots)
        result = int(calculator(expression))
        if result >= 0:
            return asked.format(**slots, **people_and_goods(rng)), expression, result


# ---------------------------------------------------------------------------------------------------------------------
# Letters and multiple choice


def letters_of(word: str) -> str:
    """`word:w,o,r,d`."""
    return f"{word}:{','.join(word)}"


def letter_in(word: str, rng: random.Random) -> str:
    """A letter to count in the word: in half of the draws one that occurs twice or more, where there is one."""
    repeated, draw = [letter for letter in word if word.count(letter) > 1], rng.random()
    if repeated and draw < 0.5:
        return rng.choice(repeated)
    return rng.choice(word) if draw < 0.85 else rng.choice("aeiorstlnm")


COUNTING = wordings("""
How many times does {l} occur in {w}? | How many {l} are in {w}? | How many times is {l} in the word {w}?
How often does {l} occur in {w}? | Count the letter {l} in {w}. | How many letters {l} has {w}?
How many letters {l} are in the word {w}? | How often is the letter {l} in {w}? | Count the {l} in the word {w}.
How many {l} does the word {w} have? | Tell me how many {l} are in {w}. | What is the count of {l} in {w}?
How many times do we see {l} in {w}? | In the word {w}, how many {l} are there? | Please count {l} in {w}.
Look at the word {w}. How many {l} are in it? | How often do you see {l} in {w}? | {w} has how many times {l}?
Would you count the {l} in {w}? | Find the number of {l} in {w}. | Find out the count of {l} in {w}.
Look at {w} and count {l}. | Remind me of the count of {l} in {w}.
""")
SPELLING = wordings("""
Spell the word: {w} | Spell {w}. | How do you spell {w}? | How is {w} spelled? | Please spell {w}.
Spell the word {w}. | Can you spell {w}? | Write {w} letter by letter. | Which letters are in {w}?
What are the letters of {w}? | I must write {w}. How is it spelled? | Would you write the letters of {w}?
How to spell {w}? | Go letter by letter: {w} | Remind me of the letters of {w}. | Go through the letters of {w}.
""")


def counting_question(word: str, letter: str, rng: random.Random, forms: list[str] = COUNTING) -> str:
    """How often is the letter in the word: the word bare, quoted or with a capital, the letter bare or quoted."""
    draw = rng.random()
    shown = f"'{word}'" if draw < 0.25 else f'"{word}"' if draw < 0.35 else word
    quoted = f"'{letter}'" if rng.random() < 0.3 else letter
    return rng.choice(forms).format(w=shown, l=quoted)


LOOKUPS = wordings("""
- {a}? {x} | Which letter has {a}? {x} | What is the letter of {a}? {x} | Find {a}. {x} | The letter of {a}? {x}
""")

CHOOSE = "Multiple Choice question: respond only with the letter of the correct answer."


def choice_list(letters: dict[str, str]) -> str:
    """The choices with their letters, each letter right after its choice."""
    return "\n".join(f"- {choice}={letter}" for choice, letter in letters.items())


def multiple_choice(question: str, choices: list[str]) -> str:
    """A multiple choice question as the smallest models read it best: the question last, so that recalling the answer
    and looking up its letter fall in one place. (tasks/common.py has the layout of the public examinations.)"""
    return f"{CHOOSE}\n{choice_list(dict(zip(choices, 'ABCD', strict=False)))}\n\n{question}"
