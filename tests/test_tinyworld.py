"""The tiny world: balanced reading; held-out phrasings, names and facts; fair verdicts; files that others can read."""

import json
import random
import re
from collections import Counter, defaultdict

import pyarrow.parquet as pq
import pytest

from nanochat import core_bundle, tinyworld, tinyworld_documents, tinyworld_skills, tinyworld_text
from nanochat.calculator import calculator
from nanochat.tinyworld_facts import by_relation, facts, invented_name, never_asked
from nanochat.tinyworld_tables import INVENTED_FIRST, INVENTED_FIRST_TEST
from tasks import tinyworld as chat
from tasks.common import check_messages, text_of
from tasks.tinyworld import TinyWorld, has_words

SLOT = re.compile(r"\{\w\}")
CYCLES = ("month_after", "month_before", "day_after", "day_before", "month_number")


@pytest.fixture(scope="module")
def reading():
    return list(tinyworld_documents.documents(seed=3, characters=3_000_000))


def words(text):
    return re.findall(r"[a-z]+", text.lower())


def grams(text):
    """The 4-grams of words."""
    listed = words(text)
    return {tuple(listed[k : k + 4]) for k in range(len(listed) - 3)}


def flat(wordings):
    """Wordings in any nesting of dicts, lists and tuples."""
    if isinstance(wordings, str):
        return [wordings]
    values = wordings.values() if isinstance(wordings, dict) else wordings
    return [text for value in values for text in flat(value)]


def training_templates():
    rooms = (tinyworld_documents, tinyworld_text, tinyworld_skills)
    tables = [value for room in rooms for name, value in vars(room).items() if name.isupper() and name != "SHARES"]
    tables += [chat.LETTER_BEFORE_WORD, chat.SHOWN_HARD, chat.PRACTICE_HARD]
    found = [text for table in tables if isinstance(table, (str, dict, list)) for text in flat(table)]
    topics = flat(tinyworld_text.TOPICS)
    return [text.replace("{t}", topic) for text in found for topic in (topics if "{t}" in text else [""])]


def examination_templates():
    tables = [value for name, value in vars(chat).items() if name.startswith("TEST_") and name != "TEST_KINDS"]
    return [text.split(" = ")[0] for table in tables if not isinstance(table, int) for text in flat(table)]


def conversations(kind, split, size):
    task = TinyWorld(kind, split, size)
    return [task[k] for k in range(size)]


def questions(kind, split, size):
    return [m["content"] for one in conversations(kind, split, size) for m in one["messages"] if m["role"] == "user"]


# --- the facts ---


def test_there_are_enough_facts_and_each_has_one_answer():
    assert 550 <= len(facts()) <= 650
    assert max(Counter((fact.relation, fact.subject) for fact in facts()).values()) == 1
    assert all(fact.subject.isascii() and fact.answer.isascii() for fact in facts())


def test_one_fact_in_five_of_each_relation_is_never_asked():
    for relation, members in by_relation().items():
        assert sum(map(never_asked, members)) == round(len(members) / 5) >= 1, relation


def test_sft_never_asks_a_fact_that_is_only_read_about():
    held = [fact for fact in facts() if never_asked(fact) and fact.relation not in CYCLES]
    kinds = [kind for kind in chat.TRAIN_KINDS if kind != "stories"]
    turns = set()
    for kind in kinds:
        for one in conversations(kind, "train", 1000):
            contents, listed = [message["content"] for message in one["messages"]], []
            for asked, reply in zip(contents[::2], contents[1::2], strict=True):
                lines = asked.split("\n")
                listed = [line for line in lines if line.startswith("- ")] or listed  # a later question's are above it
                chosen = [line for line in listed if line.endswith(f"={reply}")]
                asked_for = [line for line in lines if not line.startswith("- ")]
                turns.add("\n".join([*asked_for, *chosen, text_of(reply)]))
    by_word = defaultdict(list)
    for turn in turns:
        for word in set(words(turn)):
            by_word[word].append(turn)
    for fact in held:
        for turn in by_word[words(fact.subject)[-1]]:
            case = fact.relation == "symbol"
            assert not (has_words(turn, fact.subject) and has_words(turn, fact.answer, case)), (fact, turn)


def test_reading_asks_and_states_every_fact_about_equally_often(reading):
    by_subject = defaultdict(list)
    for fact in facts():
        by_subject[words(fact.subject)[-1]].append(fact)
    counts = Counter()
    for document in reading:
        for line in re.split(r"[.\n]", document):
            listed = set(words(line))
            for word in listed & by_subject.keys():
                here = [fact for fact in by_subject[word] if listed >= {*words(fact.subject), *words(fact.answer)}]
                counts.update(here)
    seen = sorted(counts[fact] for fact in facts() if fact.relation != "month_number")
    assert seen[0] >= 10
    assert seen[0] > 0.4 * seen[len(seen) // 2]


def test_statements_questions_and_quizzes_deal_every_fact_before_any_comes_again():
    world = tinyworld_documents.World(random.Random(0))
    for deck in (world.facts, world.asked, world.quizzed):
        assert {fact for _ in range(len(facts())) for fact in deck.deal(1)} == set(facts())


def test_every_letter_asked_for_in_a_list_is_the_right_one(reading):
    primer = list(tinyworld_documents.documents(3, 100_000, tinyworld_documents.PRIMER))
    asked = 0
    for part in "\n\n".join(primer).split("\n\n"):
        lines = part.split("\n")
        letters = dict(line[2:].split("=") for line in lines if "=" in line)
        right = {form.format(a=a, x=x) for form in tinyworld_skills.LOOKUPS for a, x in letters.items()}
        replies = [line for line in lines if "=" not in line]
        assert replies and set(replies) <= right, part
        asked += len(replies)
    assert asked > 3000
    topics = {
        (tinyworld_text.fill(form, fact), fact.answer)
        for fact in facts()
        for form in tinyworld_text.TOPICS[fact.relation]
    }
    answer_to = {f"- {topic}?".lower(): answer for topic, answer in topics}
    riddles = 0
    for document in reading:
        letters = {}
        for line in document.split("\n"):
            letters = letters if line else {}
            if line.startswith("- ") and "=" in line and "?" not in line:
                name, letter = line[2:].split("=")
                letters[name] = letter
            asked, _, reply = line.rpartition(" ")
            if asked.lower() in answer_to:
                assert letters[answer_to[asked.lower()]] == reply, document
                riddles += 1
    assert riddles > 5000


# --- what the examination holds back ---


def test_no_test_template_shares_four_words_with_a_training_template():
    trained = set().union(*(grams(SLOT.sub(" ", text)) for text in training_templates()))
    assert len(trained) > 300 and len(examination_templates()) > 90
    for template in examination_templates():
        assert not grams(SLOT.sub(" ", template)) & trained, template


def test_no_test_template_shares_four_words_with_a_training_text(reading):
    asked = [text for kind in chat.TRAIN_KINDS for text in questions(kind, "train", 300)]
    asked += [text for kind in chat.PRACTICE_KINDS for text in questions(kind, "practice", 300)]
    trained = set().union(*(grams(text) for text in reading + asked))
    for template in examination_templates():
        for part in SLOT.split(template):
            assert not grams(part) & trained, template


def test_invented_names_of_the_examination_occur_in_no_training(reading):
    names = {invented_name(kind, random.Random(k), test=True) for k in range(300) for kind in ("country", "element")}
    trained = set(words(" ".join(reading + questions("unknown", "train", 1000))))
    assert not {name.lower() for name in names} & trained
    first, reserved = INVENTED_FIRST.lower().split(), INVENTED_FIRST_TEST.lower().split()
    assert not any(one.startswith(other) or other.startswith(one) for one in first for other in reserved)


def test_each_test_kind_has_two_hundred_distinct_questions():
    for kind in chat.TEST_KINDS:
        assert len(set(questions(kind, "test", chat.TEST_SIZE))) >= 200, kind


# --- conversations and verdicts ---


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_example_is_a_function_of_kind_split_and_number(split):
    for kind in chat.TRAIN_KINDS if split == "train" else chat.TEST_KINDS:
        assert conversations(kind, split, 20) == [TinyWorld(kind, split, 20)[k] for k in range(20)]
        assert all(check_messages(one["messages"]) is None for one in conversations(kind, split, 20))


def test_the_reference_answer_is_right_and_a_refusal_is_wrong():
    for kind in chat.TEST_KINDS:
        task = TinyWorld(kind, "test")
        for one in conversations(kind, "test", 100):
            assert task.evaluate(one, text_of(one["messages"][-1]["content"])) == (kind != "known_refused")
            assert task.evaluate(one, tinyworld_text.REFUSAL) == kind.endswith("_refused")


def test_an_answer_that_hedges_or_is_wrong_does_not_count():
    task = TinyWorld("facts_new_phrasing", "test")
    one = next(c for c in conversations("facts_new_phrasing", "test", 250) if c["expected"] == "euro")
    assert task.evaluate(one, "Euro.") and task.evaluate(one, f"The currency of {one['subject']} is the euro.")
    for answer in ("The yen.", "The euro or the yen.", "The euros.", "The euro, but I do not know.", ""):
        assert not task.evaluate(one, answer), answer
    sums = TinyWorld("arithmetic", "test")
    assert sums.evaluate({"expected": "1228"}, "The answer is 1,228.")
    assert not sums.evaluate({"expected": "1228"}, "1228 is not 12")
    story = TinyWorld("stories", "test")
    assert not story.evaluate({"expected": "Tom", "wrong": ("Anna",), "subject": "ball"}, "Tom or Anna has the ball.")
    quiz = TinyWorld("multiple_choice", "test")
    assert quiz.evaluate({"expected": "B"}, "B") and not quiz.evaluate({"expected": "B"}, "A B")


def test_the_calculator_gives_what_the_conversation_says():
    for kind in ("arithmetic", "arithmetic_hard", "counting"):
        for split in ("train", "practice", "test"):
            for one in conversations(kind, split, 100):
                code, output, said = (part["text"] for part in one["messages"][-1]["content"])
                assert calculator(code) == output == one["expected"] and said == f"The answer is {output}."
                assert output.isdigit()


def test_the_right_letter_is_as_often_each_of_the_four():
    for split in ("train", "test"):
        letters = Counter(one["expected"] for one in conversations("multiple_choice", split, 250))
        assert set(letters) == set("ABCD") and min(letters.values()) > 40


def test_a_multiple_choice_question_stands_after_its_choices():
    asked = tinyworld_skills.multiple_choice("What is the capital of France?", ["Rome", "Paris"])
    assert asked.split("\n") == [
        "Multiple Choice question: respond only with the letter of the correct answer.",
        "- Rome=A",
        "- Paris=B",
        "",
        "What is the capital of France?",
    ]


def test_an_unknown_kind_names_those_there_are():
    with pytest.raises(ValueError, match="facts_new_phrasing"):
        TinyWorld("facts_new_phrasing", "train")


# --- files ---


def test_the_same_seed_gives_the_same_text_and_no_document_twice(reading):
    again = list(tinyworld_documents.documents(seed=3, characters=50_000))
    assert again == reading[: len(again)]
    assert len(set(reading)) == len(reading)
    assert not set(again) & set(tinyworld_documents.documents(seed=4, characters=50_000))


def test_no_document_comes_twice_even_where_few_are_possible(monkeypatch):
    monkeypatch.setattr(tinyworld_documents, "SHARES", ((1.0, (tinyworld_documents._about_nanochat,)),))
    written = list(tinyworld_documents.documents(seed=1, characters=2_000_000))
    assert len(set(written)) == len(written)


def test_the_corpus_is_whole_and_its_validation_is_not_in_training(tmp_path):
    assert tinyworld.write_corpus(tmp_path, seed=1, megabytes=0.5, shards=3)
    assert not tinyworld.write_corpus(tmp_path, seed=1, megabytes=0.5, shards=3)  # there already
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    texts = {}
    for entry in manifest["shards"]:
        texts[entry["file"]] = pq.read_table(tmp_path / entry["file"])["text"].to_pylist()
        assert len(texts[entry["file"]]) == entry["documents"]
    (held_out,) = manifest["validation"]
    validation = set(texts.pop(held_out))
    train = [document for part in texts.values() for document in part]
    primer = texts["shard_00000.parquet"]
    assert primer == list(
        tinyworld_documents.documents(1, int(0.5e6 * tinyworld.PRIMER_SHARE), tinyworld_documents.PRIMER)
    )
    assert len(texts) == 3 and validation and len(set(train)) == len(train)
    assert not validation & set(train)
    assert {path.name for path in tmp_path.iterdir()} == {"manifest.json", held_out, *texts}
    assert tinyworld.write_corpus(tmp_path, seed=2, megabytes=0.5, shards=3)  # another seed, another text


def test_the_command_writes_corpus_and_bundle_and_says_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    tinyworld.main(tinyworld.parse_args(["--megabytes", "0.2"]))
    assert (tmp_path / "corpora" / "tinyworld" / "manifest.json").exists()
    tasks = core_bundle.load_bundle(core_bundle.find_bundle("eval_bundle_tinyworld"))
    assert {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    assert all(len(core_bundle.read_rows(task)) >= 70 for task in tasks)
    tinyworld.main(tinyworld.parse_args(["--megabytes", "0.2"]))
    assert "already there" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--megabytes"):
        tinyworld.main(tinyworld.parse_args(["--megabytes", "0"]))
