"""The documents of the tiny world: prose, questions and answers, stories, sums, letters, quizzes, talk.

Each builder takes a `World`, which deals facts, subjects and words in shuffled rounds, so that all come equally often.
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from nanochat import tinyworld_skills as skills
from nanochat import tinyworld_tables as tables
from nanochat import tinyworld_text as text
from nanochat.tinyworld_facts import SUBJECT_KINDS, Fact, answers, by_relation, choices, facts, invented_fact


class Deck:
    """Deals the items in shuffled rounds, so that all come equally often."""

    def __init__(self, items, rng: random.Random):
        self.items, self.rng, self.left = list(items), rng, []

    def deal(self, count: int) -> list:
        """The next `count` items."""
        hand = []
        while len(hand) < count:
            if not self.left:
                self.left = self.rng.sample(self.items, len(self.items))
            item = self.left.pop()
            if item not in hand or count > len(self.items):
                hand.append(item)
        return hand


class World:
    """What the documents draw from: one random source and decks of facts, subjects and words."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.facts = Deck(facts(), rng)
        self.asked = Deck(facts(), rng)
        self.quizzed = Deck(facts(), rng)
        groups: dict[tuple, list[Fact]] = {}
        for fact in facts():
            groups.setdefault((SUBJECT_KINDS.get(fact.relation, fact.relation), fact.subject), []).append(fact)
        self.subjects = Deck([tuple(group) for group in groups.values()], rng)
        self.relations = Deck([name for name, members in by_relation().items() for _ in members[::4]], rng)
        self.members = {name: Deck(members, rng) for name, members in by_relation().items()}
        self.words = Deck(dict.fromkeys(tables.WORDS.split()), rng)

    def people(self, count: int) -> list[str]:
        """Different first names."""
        return self.rng.sample(tables.PEOPLE.split(), count)


def _profiles(world: World) -> str:
    paragraphs, count = [], 0
    while count < 6:
        (group,) = world.subjects.deal(1)
        group = world.rng.sample(group, len(group))
        lines = [text.statement(fact, world.rng) for fact in group]
        if world.rng.random() < 0.4:
            lines.append(text.answer(world.rng.choice(group)))
        paragraphs.append(" ".join(lines))
        count += len(lines)
    return "\n\n".join(paragraphs)


def _lesson(world: World) -> str:
    (relation,) = world.relations.deal(1)
    members = world.members[relation].deal(4)
    lines = [text.statement(fact, world.rng) for fact in members]
    teacher, pupil = world.people(2)
    start = world.rng.choice(
        (
            f"Today {teacher} teaches the class.",
            f"{teacher} writes on the board:",
            f"{pupil} learns these lines by heart:",
            f"From the notebook of {pupil}:",
            f"{teacher} reads to {pupil}:",
        )
    )
    if world.rng.random() < 0.5:
        again = world.rng.sample(members, len(members))
        middle = world.rng.choice((f"{pupil} says it again:", "Once more:", f"Then {pupil} repeats:"))
        return " ".join([start, *lines, middle, *(text.answer(fact) for fact in again)])
    return "\n".join([start, *(f"- {line}" for line in lines)])


def _comparison(world: World) -> str:
    (relation,) = world.relations.deal(1)
    lines = []
    for _ in range(3):
        one, two = world.members[relation].deal(2)
        first, second = text.statement(one, world.rng).rstrip("."), text.statement(two, world.rng)
        joint = world.rng.choice((", but ", ", and ", ", while "))
        if not any(name[0].isupper() and second.startswith(name) for name in (two.subject, two.answer)):
            second = second[0].lower() + second[1:]
        lines.append(first + joint + second)
    return " ".join(lines)


def _notes(world: World) -> str:
    person, other = world.people(2)
    start = world.rng.choice(
        (
            f"{person} keeps a diary.",
            f"Things that {person} knows:",
            f"{person} tells {other} many things.",
            f"Dear {other}, here is what I have learned.",
            f"{person} and {other} play a game: each says something true.",
            "True sentences:",
            "Facts to remember:",
        )
    )
    lines = [text.statement(fact, world.rng) for fact in world.facts.deal(world.rng.randint(5, 8))]
    return start + " " + " ".join(lines)


def _reply(fact: Fact, rng: random.Random) -> str:
    draw = rng.random()
    if fact.answer == "?":
        return text.REFUSAL
    if draw < 0.5:
        return text.answer(fact)
    if draw < 0.7:
        return text.statement(fact, rng)
    if draw < 0.85:
        return text.capitalized(fact.answer) + "."
    return rng.choice(("It is {a}.", "That is {a}.", "{b}, I think.", "I know it: {a}.", "{b}, of course.")).format(
        a=fact.answer, b=text.capitalized(fact.answer)
    )


def _items(world: World, count: int) -> list[tuple[str, str]]:
    """Questions about facts of the deck with their answers; one in twelve is about an invented name."""
    rng, pairs = world.rng, []
    for fact in world.asked.deal(count):
        if rng.random() < 0.1:
            unknown = invented_fact(rng)
            pairs.append((text.question(unknown, rng), text.REFUSAL))
        if fact.relation in text.REVERSE and rng.random() < 0.15:
            asked = text.fill(rng.choice(text.REVERSE[fact.relation]), fact)
            bare = text.capitalized(fact.subject) + "."
            pairs.append((asked, bare if rng.random() < 0.3 else text.statement(fact, rng)))
        else:
            pairs.append((text.question(fact, rng), _reply(fact, rng)))
    return pairs


def _dialogue(world: World) -> str:
    one, two = world.people(2)
    lines = []
    for asked, reply in _items(world, world.rng.randint(4, 6)):
        ask = world.rng.choice(('"{q}" asked {p}.', '{p} asked: "{q}"', '"{q}" {p} wanted to know.', '{p}: "{q}"'))
        say = world.rng.choice(('"{a}" said {p}.', '"{a}" answered {p}.', '{p} said: "{a}"', '{p}: "{a}"'))
        lines.append(ask.format(q=asked, p=one))
        said = reply[:-1] + "," if say.startswith('"') and reply.endswith(".") else reply
        lines.append(say.format(a=said, p=two))
        if world.rng.random() < 0.3:
            one, two = two, one
    return (" " if world.rng.random() < 0.5 else "\n").join(lines)


def _exam(world: World) -> str:
    labels = (("Question: ", "Answer: "), ("Q: ", "A: "), ("User: ", "Assistant: "), ("- ", "+ "), ("", ""))
    ask, say = world.rng.choice(labels)
    pairs = _items(world, world.rng.randint(4, 8))
    start = world.rng.choice(("", "", "Exam paper.\n", "Questions and answers.\n", "Frequent questions.\n"))
    return start + "\n".join(f"{ask}{asked}\n{say}{reply}" for asked, reply in pairs)


def _interview(world: World) -> str:
    one, two = world.people(2)
    pairs = _items(world, world.rng.randint(4, 7))
    return "\n".join(f"{one}: {asked}\n{two}: {reply}" for asked, reply in pairs)


def _letter(world: World) -> str:
    one, two = world.people(2)
    rng, lines = world.rng, []
    for fact in world.asked.deal(rng.randint(4, 6)):
        asked = rng.choice(
            ("You asked me about {t}.", "Yesterday you did not know {t}.", "You wanted to know {t}.", "About {t}:")
        )
        lines.append(asked.format(t=text.topic(fact, rng)) + " " + _reply(fact, rng))
    return f"Dear {one},\n" + " ".join(lines) + f"\nYour friend {two}"


def _quiz_show(world: World) -> str:
    host, one, two = world.people(3)
    rng, lines = world.rng, [f"{host} asks, {one} and {two} answer."]
    for fact in world.asked.deal(rng.randint(3, 5)):
        player = rng.choice((one, two))
        asked = text.plain_question(fact, rng)
        if rng.random() < 0.75:
            short = text.capitalized(fact.answer)
            lines.append(f'"{asked}" "{short}!" says {player}. "Right. {text.answer(fact)}"')
        else:
            wrong = rng.choice([a for a in answers(fact.relation) if a != fact.answer])
            lines.append(f'"{asked}" "Is it {wrong}?" says {player}. "No. {text.answer(fact)}"')
    return "\n".join(lines)


def _memory(world: World) -> str:
    """A list said again word for word: the plainest practice of looking back and copying, which much else builds on."""
    rng = world.rng
    one, two = world.people(2)
    lines = []
    for _ in range(rng.choice((1, 2))):
        pools = (
            lambda: world.words.deal(rng.randint(5, 12)),
            lambda: [str(rng.randint(10, rng.choice((99, 999, 999, 9999)))) for _ in range(rng.randint(4, 9))],
            lambda: rng.sample(tables.OBJECTS.split(), rng.randint(5, 9)),
            lambda: [
                rng.choice(answers(name)) for (name,) in (world.relations.deal(1) for _ in range(rng.randint(4, 9)))
            ],
        )
        items = rng.choice(pools)()
        joint = rng.choice((" ", ", "))
        said = joint.join(items)
        again = rng.choice((f"{two} repeats:", f"{two} says it again:", "Once more:"))
        lines += [f"{one} reads: {said}", f"{again} {said}"]
        if rng.random() < 0.4:
            lines.append(f"And again: {said}")
    return "\n".join(lines)


def _labelled(world: World, options: list[str]) -> dict[str, str]:
    """The options with letters: in order, as examinations have them, or any, so that place does not give them away."""
    letters = "ABCDEF"[: max(4, len(options))]
    in_order = world.rng.random() < 0.3
    return {option: letters[k] if in_order else world.rng.choice(letters) for k, option in enumerate(options)}


def _lookup(world: World) -> str:
    """Lists with letters, each choice then asked for: practice of looking up what stands where. One plain form comes
    most often, since looking things up is learned late or never from many forms at once. Names keep the space before
    them, which is part of their token."""
    rng, parts = world.rng, []
    form = rng.choice(skills.LOOKUPS) if rng.random() < 0.45 else skills.LOOKUPS[0]
    for _ in range(2):
        (relation,) = world.relations.deal(1)
        options = answers(relation)
        labelled = _labelled(world, rng.sample(options, min(len(options), rng.choice((4, 4, 4, 5, 6)))))
        lines = [skills.choice_list(labelled)]
        lines += [form.format(a=option, x=labelled[option]) for option in rng.sample(list(labelled), len(labelled))]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _riddles(world: World) -> str:
    """Lists with letters, most choices then asked for by what they are: recalling and looking up in one step. One form
    and many questions to a list: so it is learned in a few hundred steps; in many forms it was half learned in 1,800.
    """
    rng, parts = world.rng, []
    for _ in range(2):
        (relation,) = world.relations.deal(1)
        asked = {fact.answer: fact for fact in world.members[relation].deal(rng.choice((4, 4, 5)))}
        others = [answer for answer in answers(relation) if answer not in asked]
        options = [*asked, *rng.sample(others, min(len(others), max(0, 4 - len(asked))))]
        labelled = _labelled(world, rng.sample(options, len(options)))
        lines = [skills.choice_list(labelled)]
        for fact in rng.sample(list(asked.values()), len(asked)):
            lines.append(f"- {text.topic(fact, rng)}? {labelled[fact.answer]}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _quizzes(world: World) -> str:
    """Multiple choice as in the examination, but with several questions about the same choices."""
    rng, parts = world.rng, []
    link = rng.choice(("\nAnswer: ", "\n", "\n"))
    for fact in world.quizzed.deal(2):
        options = choices(fact, rng)
        quiz = skills.multiple_choice(text.question(fact, rng), options) + link + "ABCD"[options.index(fact.answer)]
        others = [one for one in by_relation()[fact.relation] if one.answer in options and one is not fact]
        for other in rng.sample(others, min(len(others), 3)):
            quiz += f"\n{text.question(other, rng)}{link}{'ABCD'[options.index(other.answer)]}"
        parts.append(quiz)
    return "\n\n".join(parts)


def _true_or_not(world: World) -> str:
    rng, lines = world.rng, []
    for fact in world.quizzed.deal(rng.randint(4, 6)):
        draw, asked = rng.random(), text.plain_question(fact, rng)
        options = choices(fact, rng, rng.choice((2, 2, 3, 4)))
        if draw < 0.5:
            lines.append(f"{asked} {' or '.join(options)}? {text.capitalized(fact.answer)}.")
        elif draw < 0.75:
            shown = rng.choice(options[:2])
            claim = text.answer(replace(fact, answer=shown))
            verdict = "True." if shown == fact.answer else f"False. {text.answer(fact)}"
            lines.append(f"True or false: {claim} {verdict}")
        else:
            letter = "ABCD"[options.index(fact.answer)]
            listed = ", ".join(f"{option}={mark}" for option, mark in zip(options, "ABCD", strict=False))
            lines.append(f"{asked} {listed}. Answer: {letter}")
    return "\n".join(lines)


def _stories(world: World) -> str:
    rng, parts = world.rng, []
    labels = (("Question: ", "Answer: "), ("", ""), ("Q: ", "A: "), ("User: ", "Assistant: "))
    ask, say = rng.choice(labels)
    for _ in range(2):
        told, lines = skills.story(rng, rng.randint(3, 7), past=rng.random() < 0.3), []
        every = rng.choice((1, 2, 2, 3, len(told)))  # questions after every so many sentences
        for k in range(0, len(told), every):
            lines.append(" ".join(sentence for sentence, _ in told[k : k + every]))
            asked = told[min(k + every, len(told)) - 1][1]
            for one in rng.sample(asked, min(len(asked), 1 if every < 3 else 3)):
                short = rng.random() < 0.2
                reply = text.capitalized(one.answer) + "." if short else skills.story_answer(one)
                lines.append(f"{ask}{skills.story_question(one, rng)}\n{say}{reply}")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


FACT_STORIES = text.table("""
capital:: {p} wants to see the capital of {s}. {p} takes a train and arrives. In which city is {p}? {p} is in {a}.
 {p} flies to {s} and stays in the capital. Where is {p}? {p} is in {a}.
continent:: {p} travels to {s}. On which continent is {p} now? {p} is in {a}.
language:: {p} comes from {s}. Which language does {p} speak? {p} speaks {a}.
 {p} moves to {s} and has to learn a language. {p} learns {a}.
currency:: {p} is in {s} and wants to buy a {o}. With which money does {p} pay? {p} pays with the {a}.
symbol:: {p} has a bottle of {s} and writes the symbol on it. What does {p} write? {p} writes {a}.
young:: {p} sees {S} with its young. What does {p} see? {p} sees {S} and {A}.
sound:: {p} hears {S} at night. What does {p} hear the {s} do? {p} hears the {s} {a}.
class:: {p} has a picture of {S}. What kind of animal does {p} show? {p} shows {A}.
month_after:: {p} was born in {s}. {q} was born one month later. {q} was born in {a}.
month_before:: {p} was born in {s}. {q} was born one month earlier. {q} was born in {a}.
day_after:: On {s} {p} wrote a letter. The next day {q} got it. {q} got the letter on {a}.
day_before:: On {s} {p} was ill. It began one day before. {p} became ill on {a}.
color:: {p} paints {s}. Which color does {p} take? {p} takes {a}.
""")


def _fact_stories(world: World) -> str:
    lines = []
    while len(lines) < 4:
        (fact,) = world.facts.deal(1)
        if fact.relation in FACT_STORIES:
            one, two = world.people(2)
            story = world.rng.choice(FACT_STORIES[fact.relation])
            slots = {"S": text.with_article(fact.subject), "A": text.with_article(fact.answer)}
            item = world.rng.choice(tables.OBJECTS.split())
            lines.append(story.format(p=one, q=two, s=fact.subject, a=fact.answer, o=item, **slots))
            if world.rng.random() < 0.5:
                lines[-1] += " " + text.answer(fact)
    return "\n".join(lines)


def _sums(world: World) -> str:
    rng, lines = world.rng, []
    person, other = world.people(2)
    style = rng.randrange(5)
    for _ in range(rng.randint(4, 7)):
        make = skills.hard_problem if rng.random() < 0.08 else skills.problem
        asked, expression, result = make(rng)
        if style == 0:
            lines.append(f"{asked}\n{expression}={result}\nThe answer is {result}.")
        elif style == 1:
            lines.append(f"{person}: {asked}\n{other}: {expression}={result}. The answer is {result}.")
        elif style == 2:
            lines.append(f"Question: {asked}\nAnswer: {expression}")
        elif style == 3:
            lines.append(f'"{asked}" asked {person}. {other} typed {expression} and read {result}. "{result}."')
        else:
            lines.append(f"{asked} {expression}")
    return "\n".join(lines)


def _letters(world: World) -> str:
    rng, lines = world.rng, []
    for word in world.words.deal(rng.randint(3, 5)):
        draw, letter = rng.random(), skills.letter_in(word, rng)
        count = word.count(letter)
        code = f"'{word}'.count('{letter}')"
        if draw < 0.25:
            lines.append(f"{rng.choice(skills.SPELLING).format(w=word)}\n{skills.letters_of(word)}")
        elif draw < 0.5:
            lines.append(f"{skills.counting_question(word, letter, rng)}\n{skills.letters_of(word)}\n{code}={count}")
        else:
            asked = skills.counting_question(word, letter, rng)
            lines.append(f"{asked}\n{code}={count}\nThe answer is {count}.")
    return "\n".join(lines)


def _quoted(world: World) -> str:
    """Words with their quoted forms, which are other tokens."""
    joint = world.rng.choice(("\n", ", ", "; "))
    return joint.join(f"{word} '{word}'" for word in world.words.deal(world.rng.randint(8, 14)))


def _talk(world: World) -> str:
    one, two = world.people(2)
    pairs = [(world.rng.choice(asked), said) for said, asked in world.rng.sample(list(text.TALK.items()), 4)]
    return "\n".join(f"{one}: {asked}\n{two}: {said}" for asked, said in pairs)


def _about_nanochat(world: World) -> str:
    person = world.people(1)[0]
    pairs = [(world.rng.choice(asked), said) for said, asked in world.rng.sample(list(text.IDENTITY.items()), 3)]
    return "\n".join(f"{person}: {asked}\nnanochat: {said}" for asked, said in pairs)


# share of the text, the builders of its documents
SHARES: tuple[tuple[float, tuple[Callable[[World], str], ...]], ...] = (
    (0.08, (_profiles, _lesson, _comparison, _notes)),
    (0.17, (_dialogue, _exam, _interview, _letter, _quiz_show)),
    (0.11, (_stories, _stories, _stories, _fact_stories)),
    (0.12, (_sums,)),
    (0.07, (_letters, _letters, _letters, _quoted)),
    (0.04, (_memory,)),
    (0.04, (_lookup,)),
    (0.20, (_riddles,)),
    (0.15, (_quizzes, _quizzes, _quizzes, _quizzes, _true_or_not)),
    (0.02, (_talk, _about_nanochat)),
)


# What a run reads first. Looking things up forms within 120 small steps of nothing else and then stays; as a
# fifth of the usual text it had not formed after five hundred (dev/LOG.md, 2026-11-25).
PRIMER = ((1.0, (_lookup,)),)


def documents(seed: int, characters: int, shares=SHARES) -> Iterator[str]:
    """Different documents, about `characters` characters in all, in the shares; a pure function of the arguments."""
    rng = random.Random(f"tinyworld {seed}")
    world, seen, written = World(rng), set(), [0] * len(shares)
    while sum(written) < characters:
        kind = min(range(len(shares)), key=lambda k: written[k] / shares[k][0])
        document = rng.choice(shares[kind][1])(world)
        written[kind] += len(document)
        digest = hashlib.blake2b(document.encode(), digest_size=16).digest()
        if digest not in seen:
            seen.add(digest)
            yield document
