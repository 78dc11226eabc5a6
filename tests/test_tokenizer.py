"""The tokenizer: text survives, special tokens exist only by name, and what lies on disk says what it is."""

import json
from pathlib import Path

import pytest
from helpers import MERGES, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, TokenizerError

PUBLIC = Path(__file__).parent / "data" / "public"
TEXT = "the quick brown fox jumps over the lazy dog, and then the other dog; naïve café — 你好 🌍 in 2026.\n"
LEARNED = Tokenizer.train([TEXT * 20, "hello there\n\n  then\t" * 30], 320)
SIZE = LEARNED.vocab_size
anyone = settings(deadline=None, max_examples=150)


@anyone
@given(st.text())
def test_any_text_survives_encoding(text):
    ids = LEARNED.encode(text)
    assert LEARNED.decode(ids) == text
    assert LEARNED.decode_bytes(ids) == text.encode()


@anyone
@given(st.lists(st.text(max_size=40), max_size=8))
def test_a_batch_is_encoded_as_its_texts_are(texts):
    assert LEARNED.encode_batch(texts, num_threads=2) == [LEARNED.encode(text) for text in texts]


@anyone
@given(st.lists(st.integers(0, SIZE - 1), max_size=40))
def test_any_sequence_of_ids_decodes(ids):
    raw = LEARNED.decode_bytes(ids)
    assert LEARNED.decode(ids) == raw.decode("utf-8", errors="replace")


def test_bytes_that_are_no_character_become_the_replacement_character():
    tokenizer = byte_tokenizer()
    assert tokenizer.decode([0xE4, 0xBD]) == "\ufffd"
    assert tokenizer.decode([ord("a"), 0xFF, ord("b")]) == "a\ufffdb"


def test_half_of_a_surrogate_pair_does_not_raise():
    assert LEARNED.decode(LEARNED.encode("a\ud83cb")) == "a\ufffdb"


@anyone
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " ", "hello", "<|bos"]), max_size=8).map("".join))
def test_text_that_spells_a_special_token_stays_text(text):
    ids = LEARNED.encode(text)
    assert all(token < SIZE - len(SPECIAL_TOKENS) for token in ids)
    assert all(token < SIZE - len(SPECIAL_TOKENS) for token in LEARNED.encode_batch([text])[0])
    assert LEARNED.decode(ids) == text


def test_the_special_tokens_are_the_last_ids_in_their_order():
    assert SIZE == 320
    assert LEARNED.special == {name: 311 + i for i, name in enumerate(SPECIAL_TOKENS)}
    assert LEARNED.bos == 311
    assert LEARNED.decode([LEARNED.bos, *LEARNED.encode("hi")]) == "<|bos|>hi"


def test_bytes_per_token_come_from_the_raw_bytes():
    sizes = LEARNED.token_bytes()
    assert len(sizes) == SIZE
    ordinary = SIZE - len(SPECIAL_TOKENS)
    assert sizes[:ordinary] == [len(LEARNED.decode_bytes([token])) for token in range(ordinary)]
    assert sizes[0x80] == 1 and sizes[0xFF] == 1  # half characters: three bytes, if one decoded them to text first
    assert sizes[ordinary:] == [0] * len(SPECIAL_TOKENS)
    assert sum(sizes[token] for token in LEARNED.encode(TEXT)) == len(TEXT.encode())


def test_runs_of_digits_are_cut_in_twos():
    tokenizer = Tokenizer.train(["12345 12345 1234 123 " * 200, "abc abd xyz hello world " * 20], 275)
    assert any(token.strip().isdigit() and len(token) == 2 for token in tokenizer.tokens)  # pairs were learned
    assert not any(sum(byte in b"0123456789" for byte in token) > 2 for token in tokenizer.tokens)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("12345")]
    assert pieces == ["12", "34", "5"]


def test_a_saved_tokenizer_loads_as_it_was(tmp_path):
    LEARNED.save(tmp_path / "toy-320")
    again = Tokenizer.load(tmp_path / "toy-320")
    assert (again.pattern, again.tokens, again.special) == (LEARNED.pattern, LEARNED.tokens, LEARNED.special)
    assert again.fingerprint == LEARNED.fingerprint
    assert again.encode(TEXT) == LEARNED.encode(TEXT)
    assert [path.name for path in (tmp_path / "toy-320").iterdir()] == ["tokenizer.json"]


def test_the_file_is_json_and_no_pickle(tmp_path):
    LEARNED.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    assert {"format_version", "pattern", "tokens", "special_tokens"} <= data.keys()


def test_the_fingerprint_names_pattern_tokens_and_specials():
    base = byte_tokenizer(MERGES)
    others = [
        byte_tokenizer(MERGES[:-1]),
        byte_tokenizer((*MERGES[:-2], MERGES[-1], MERGES[-2])),
        Tokenizer(base.pattern + "|x", base.tokens),
        Tokenizer(base.pattern, base.tokens, SPECIAL_TOKENS[:-1]),
    ]
    prints = [tokenizer.fingerprint for tokenizer in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert byte_tokenizer(MERGES).fingerprint == base.fingerprint
    assert int(base.fingerprint, 16) >= 0


def test_training_twice_gives_the_same_tokenizer():
    assert Tokenizer.train([TEXT * 20, "hello there\n\n  then\t" * 30], 320).fingerprint == LEARNED.fingerprint


def test_a_missing_tokenizer_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path / "my-corpus-4096")
    assert "python -m scripts.tok_train --corpus my-corpus --vocab-size 4096" in str(error.value)


def damaged(data):
    half = data[: len(data) // 2]
    tokens = json.loads(data) | {"tokens": ["not base64!"]}
    less = {key: value for key, value in json.loads(data).items() if key != "pattern"}
    return [half, "", "[1, 2]", json.dumps(tokens), json.dumps(less)]


@pytest.mark.parametrize("case", range(5))
def test_a_damaged_tokenizer_says_which_file_and_what_to_do(case, tmp_path):
    LEARNED.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(damaged(path.read_text())[case])
    with pytest.raises(TokenizerError) as error:
        Tokenizer.load(tmp_path)
    assert str(path) in str(error.value) and "again" in str(error.value)


def test_a_vocabulary_that_cannot_hold_the_bytes_is_refused():
    with pytest.raises(TokenizerError, match="265"):
        Tokenizer.train([TEXT], 264)
    assert Tokenizer.train([TEXT], 265).vocab_size == 265


def test_too_little_text_for_the_vocabulary_is_said():
    with pytest.raises(TokenizerError, match="--vocab-size"):
        Tokenizer.train(["abc"], 1000)


def test_encodings_are_those_of_the_public_tokenizer():
    expected = json.loads((PUBLIC / "expected.json").read_text())
    tokenizer = Tokenizer.load(PUBLIC)
    assert tokenizer.vocab_size == expected["vocab_size"]
    assert tokenizer.special == expected["special"]
    for example in expected["encodings"]:
        assert tokenizer.encode(example["text"]) == example["ids"]
        assert tokenizer.decode(example["ids"]) == example["text"]
