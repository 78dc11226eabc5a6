"""CORE: the rendering is the published one, and batching changes no answer."""

import json
import math
import random
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import random_model, small_config

from nanochat import core_bundle, core_eval, scoring
from nanochat.core_bundle import CoreTask
from nanochat.runtime import Runtime
from scripts import bench_core

CPU = torch.device("cpu")


class ByteTokenizer:
    bos = 256

    def encode_batch(self, texts):
        return [list(text.encode()) for text in texts]


class StandIn(torch.nn.Module):
    """Causal and random: logits from the token and from a running mean of all before it."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.config = SimpleNamespace(vocab_size=257, sequence_len=16)
        self.embed = torch.nn.Embedding(257, 24)
        self.mix = torch.nn.Linear(48, 24)
        self.head = torch.nn.Linear(24, 257)
        self.shapes = []

    def hidden(self, idx):
        self.shapes.append(tuple(idx.shape))
        x = self.embed(idx)
        past = x.cumsum(1) / torch.arange(1, idx.size(1) + 1).view(1, -1, 1)
        return torch.tanh(self.mix(torch.cat([x, past], -1)))

    def logits(self, x):
        return 3 * self.head(x)

    def forward(self, idx):
        return self.logits(self.hidden(idx))


class Constant(StandIn):
    """The same loss for every token."""

    def logits(self, x):
        return torch.zeros(*x.shape[:-1], 257)


def runtime(rank=0, world_size=1, gather=lambda value: [value]):
    return SimpleNamespace(
        device=CPU, rank=rank, world_size=world_size, is_main=False, gather=gather, print=lambda *a: None
    )


def task(kind, shots=0, delimiter=" ", path=None):
    return CoreTask("t", kind, shots, delimiter, 0.25, path)


def words(rng, count):
    return " ".join("".join(rng.choices("abcde", k=rng.randint(1, 6))) for _ in range(count))


def made_rows(kind, count, seed=3):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        text, two = words(rng, rng.randint(2, 9)), [words(rng, rng.randint(1, 3)) for _ in range(3)]
        if kind == "multiple_choice":
            choices = (
                [*two, two[0]] if rng.random() < 0.8 else [two[0], two[0] + two[1], *two[1:]]
            )  # one begins another
            rows.append({"query": text, "choices": choices, "gold": rng.randrange(4)})
        elif kind == "schema":
            rows.append({"context_options": two, "continuation": text, "gold": rng.randrange(3)})
        else:
            rows.append({"context": text, "continuation": rng.choice("abcde")})
    return rows


def made_bundle(folder, rows_of=made_rows, count=23, shots=(3, 0, 4)):
    (folder / "eval_data").mkdir(parents=True)
    entries, lines = [], ["Eval Task,Random baseline"]
    for kind, number in zip(core_bundle.FIELDS, shots, strict=True):
        entries.append(
            {"label": f"my_{kind}", "dataset_uri": f"{kind}.jsonl", "num_fewshot": [number], "icl_task_type": kind}
        )
        lines.append(f"my_{kind},{25 if kind != 'language_modeling' else 0}")
        text = "".join(json.dumps(row) + "\n" for row in rows_of(kind, count))
        (folder / "eval_data" / f"{kind}.jsonl").write_text(text)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text("\n".join(lines))
    return folder


# --- rendering, by hand


def test_multiple_choice_is_never_trimmed():
    shot = {"query": "Q one ", "choices": ["x", "y "], "gold": 1}
    row = {"query": " Q two ", "choices": ["p", "q"], "gold": 0}
    prompts = core_eval.render(task("multiple_choice"), row, [shot])
    assert prompts == ["Q one  y \n\n Q two  p", "Q one  y \n\n Q two  q"]
    answered = core_eval.render(task("multiple_choice", delimiter="\nAnswer: "), row, [])
    assert answered == [" Q two \nAnswer: p", " Q two \nAnswer: q"]


def test_schema_varies_the_context_and_is_never_trimmed():
    shot = {"context_options": ["a ", "b"], "continuation": "ends. ", "gold": 0}
    row = {"context_options": ["He ", "She"], "continuation": "left.", "gold": 1}
    prompts = core_eval.render(task("schema"), row, [shot, shot])
    assert prompts == [
        "a  ends. \n\na  ends. \n\nHe  left.",
        "a  ends. \n\na  ends. \n\nShe left.",
    ]


def test_language_modeling_trims_contexts_and_keeps_the_delimiters_blank_with_the_continuation():
    shot, row = {"context": " One\n", "continuation": "1 "}, {"context": "\tTwo ", "continuation": "2 "}
    prompts = core_eval.render(task("language_modeling", delimiter="\nAnswer: "), row, [shot])
    assert prompts == ["One\nAnswer: 1 \n\nTwo\nAnswer:", "One\nAnswer: 1 \n\nTwo\nAnswer: 2 "]
    (scored,) = core_eval.spans(task("language_modeling"), [list(text.encode()) for text in prompts])
    assert bytes(scored.ids[scored.start : scored.end]) == b" 2 "


def test_what_is_scored_after_the_common_prefix_or_in_the_common_suffix():
    first, second = core_eval.spans(task("multiple_choice"), [[9, 1, 2, 3], [9, 1, 4]])
    assert (first.start, first.end, second.start, second.end) == (2, 4, 2, 3)
    first, second = core_eval.spans(task("schema"), [[9, 1, 2, 3, 7], [9, 4, 3, 7]])
    assert (first.start, first.end, second.start, second.end) == (3, 5, 2, 4)


def test_a_context_whose_tokens_change_with_the_continuation_is_an_error():
    with pytest.raises(ValueError, match="delimiter"):
        core_eval.spans(task("language_modeling"), [[9, 1, 2], [9, 1, 3, 4]])


def test_shots_are_drawn_from_the_other_examples_and_fewer_examples_give_fewer_shots():
    rows = [{"n": i} for i in range(30)]
    expected = [rows[i] for i in random.Random(1234 + 7).sample([i for i in range(30) if i != 7], 10)]
    assert core_eval.shots_of(rows, 7, 10) == expected
    assert sorted(row["n"] for row in core_eval.shots_of(rows[:4], 1, 10)) == [0, 2, 3]
    assert core_eval.shots_of(rows[:1], 0, 10) == []


def test_rows_are_shuffled_by_a_fixed_seed_then_cut(tmp_path):
    loaded = core_bundle.load_bundle(made_bundle(tmp_path / "b"))[0]
    rows = made_rows("multiple_choice", 23)
    random.Random(1337).shuffle(rows)
    assert core_bundle.read_rows(loaded) == rows
    assert core_bundle.read_rows(loaded, 5) == rows[:5]


# --- scoring: the slow path, one example at a time with all logits, is that of the benchmark


def one_by_one(model, t, rows):
    return [bench_core.one_by_one(model, ByteTokenizer(), t, rows, i, CPU) for i in range(len(rows))]


def likely(model, rows):
    """Half of the rows are answered as the model would, so that both verdicts occur."""
    for row in rows[::2]:
        row["continuation"] = chr(int(model(torch.tensor([[256, *row["context"].encode()]]))[0, -1, :128].argmax()))
    return rows


@pytest.mark.parametrize("kind", core_bundle.FIELDS)
@pytest.mark.parametrize("budget", [1, 200, 100_000])
def test_batches_give_the_answers_of_one_example_at_a_time(kind, budget):
    model, rows, t = StandIn(), made_rows(kind, 40), task(kind, shots=2)
    if kind == "language_modeling":
        t, rows = task(kind, shots=0, delimiter=""), likely(model, rows)
    expected = one_by_one(model, t, rows)
    model.shapes.clear()
    assert core_eval.predict(model, ByteTokenizer(), t, rows, list(range(40)), CPU, budget) == expected
    assert len(set(expected)) > 1
    assert all(b == 1 or b * length <= budget for b, length in model.shapes)


@pytest.fixture(scope="module")
def gpt():
    """Windows of 128 and, in the last layer, of 160: both are shorter than the prompts with shots."""
    return random_model(small_config(257, sequence_len=160, n_layer=3, window_pattern="S"))


@pytest.mark.parametrize("kind", core_bundle.FIELDS)
@pytest.mark.parametrize("shots", [0, 1, 5])
@pytest.mark.parametrize("budget", [1, 1000, 100_000])
def test_what_is_shared_and_read_once_changes_no_answer(kind, shots, budget, gpt, monkeypatch):
    rows, t = made_rows(kind, 24), task(kind, shots)
    if kind == "language_modeling":
        t, rows = task(kind, shots, delimiter=""), likely(gpt, rows)
    assert max(len(p) for i in range(24) for p in core_eval.render(t, rows[i], core_eval.shots_of(rows, i, shots))) > (
        200 if shots == 5 else 0
    )
    grouped = []
    real = scoring.score_groups
    monkeypatch.setattr(
        scoring, "score_groups", lambda model, groups, *a: grouped.extend(groups) or real(model, groups, *a)
    )
    answers = core_eval.predict(gpt, ByteTokenizer(), t, rows, list(range(24)), CPU, budget)
    assert answers == one_by_one(gpt, t, rows)
    assert len(set(answers)) > 1
    assert bool(grouped) == (kind != "language_modeling" and shots > 0) or (kind == "multiple_choice" and grouped)


def sequences_of_a_group(rng, shared, ends):
    """Sequences that begin with `shared` common ids and go on with so many of their own, which are scored."""
    head = [256, *(rng.randrange(256) for _ in range(shared - 1))]
    return [
        scoring.Scored([*head, first, *(rng.randrange(256) for _ in range(size - 1))], shared, shared + size)
        for first, size in enumerate(ends)
    ]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_losses_of_what_is_read_together_are_those_of_what_is_read_alone(dtype, tolerance):
    model = random_model(
        small_config(257, sequence_len=160, n_layer=3, window_pattern="S"), runtime=Runtime(CPU, dtype)
    )
    rng = random.Random(4)
    shapes = [(20, [3, 1, 2]), (300, [1] * 11), (128, [40, 7]), (2, [5, 5]), (500, [9, 30, 2]), (161, [150, 140, 3])]
    groups = [sequences_of_a_group(rng, *shape) for shape in shapes]
    together = scoring.score_groups(model, groups, CPU, 2000)
    alone = [scoring.score_sequences(model, group, CPU, 1) for group in groups]
    for group, one, other in zip(groups, together, alone, strict=True):
        assert [len(losses) for losses in one] == [s.end - s.start for s in group]
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_only_scored_positions_go_through_the_head(gpt, monkeypatch):
    asked, real = [], gpt.logits
    monkeypatch.setattr(gpt, "logits", lambda x: asked.append(x.size(0)) or real(x))
    groups = [sequences_of_a_group(random.Random(1), 100, [3, 2]), sequences_of_a_group(random.Random(2), 5, [4])]
    scoring.score_alternatives(gpt, groups, CPU, 1000)
    assert sum(asked) == 3 + 2 + 4


def test_per_token_scores_do_not_depend_on_the_batch():
    rng = random.Random(0)
    sequences = [
        scoring.Scored([256, *(rng.randrange(256) for _ in range(n))], rng.randint(1, n), n + 1)
        for n in (5, 9, 2, 30, 9)
    ]
    together = scoring.score_sequences(StandIn(), sequences, CPU, 1000)
    alone = [scoring.score_sequences(StandIn(), [sequence], CPU, 1000)[0] for sequence in sequences]
    for one, other, sequence in zip(together, alone, sequences, strict=True):
        assert len(one) == sequence.end - sequence.start
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_ties_go_to_the_lower_index():
    assert core_eval.first_lowest([2.0, 1.0 + 0.9e-5, 1.0]) == 1
    assert core_eval.first_lowest([2.0, 1.0 + 2e-5, 1.0]) == 2
    rows = [{"query": "q", "choices": ["aa", "bb", "cc"], "gold": 2}]
    assert core_eval.predict(Constant(), ByteTokenizer(), task("multiple_choice"), rows, [0], CPU) == [0]


def test_a_repeated_choice_is_scored_once_and_counts_where_it_stands_first():
    model = StandIn()
    rows = [{"query": "q", "choices": ["ab", "cd", "ab"], "gold": 2}]
    answers = core_eval.predict(model, ByteTokenizer(), task("multiple_choice"), rows, [0], CPU)
    assert answers[0] in (0, 1)
    assert model.shapes == [(2, 4)]
    same = [{"query": "q", "choices": ["ab", "ab"], "gold": 1}]
    assert core_eval.predict(model, ByteTokenizer(), task("multiple_choice"), same, [0], CPU) == [0]


def test_a_choice_that_begins_another_scores_infinity():
    rows = [{"query": "q", "choices": ["a", "ab"], "gold": 1}]
    assert core_eval.predict(Constant(), ByteTokenizer(), task("multiple_choice"), rows, [0], CPU) == [1]
    assert core_eval.first_lowest([math.inf, math.inf]) == 0


def test_a_foreign_model_loses_the_left_end_of_a_long_prompt():
    model, rows = StandIn(), made_rows("multiple_choice", 12)
    t = task("multiple_choice", shots=5)
    core_eval.predict(model, ByteTokenizer(), t, rows, list(range(12)), CPU)
    assert max(length for _, length in model.shapes) > 50  # nanochat reads all of it, whatever its sequence_len
    model.shapes.clear()
    core_eval.predict(model, ByteTokenizer(), t, rows, list(range(12)), CPU, max_length=50)
    assert max(length for _, length in model.shapes) == 49


# --- the whole bundle


def test_two_ranks_find_what_one_rank_finds(tmp_path):
    folder, model, tokenizer = made_bundle(tmp_path / "b"), StandIn(), ByteTokenizer()
    alone = core_eval.evaluate_core(model, tokenizer, folder, runtime())
    assert set(alone) == {"metric", "interval", "tasks", "bundle", "baselines", "max_per_task"}
    hits = [[], []]
    for rank in (0, 1):
        core_eval.evaluate_core(
            model, tokenizer, folder, runtime(rank, 2, lambda value, r=rank: hits[r].append(value) or [value])
        )
    for entry, ours, theirs in zip(alone["tasks"].values(), *hits, strict=True):
        assert entry["examples"] == 23
        assert entry["accuracy"] == pytest.approx((ours + theirs) / 23)
        assert entry["centered"] == pytest.approx((entry["accuracy"] - entry["baseline"]) / (1 - entry["baseline"]))
    centered = [entry["centered"] for entry in alone["tasks"].values()]
    assert alone["metric"] == pytest.approx(sum(centered) / 3)


def test_the_interval_is_that_of_drawing_the_examples_again():
    rng = np.random.default_rng(5)
    hits = {"a": rng.random(300) < 0.6, "b": rng.random(40) < 0.3}
    baselines = {"a": 0.25, "b": 0.0}
    table = {
        name: {"accuracy": float(of.mean()), "examples": len(of), "baseline": baselines[name]}
        for name, of in hits.items()
    }
    drawn = [
        np.mean(
            [(rng.choice(of, len(of)).mean() - baselines[name]) / (1 - baselines[name]) for name, of in hits.items()]
        )
        for _ in range(4000)
    ]
    assert core_eval.interval(table) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.01)
    assert core_eval.interval(table) == core_eval.interval(table)


def test_bfloat16_in_batches_scores_as_one_at_a_time_does():
    model = random_model(small_config(257, sequence_len=160, n_layer=2), runtime=Runtime(CPU, torch.bfloat16))
    rows, t = made_rows("multiple_choice", 600), task("multiple_choice", shots=2)
    batched = core_eval.predict(model, ByteTokenizer(), t, rows, list(range(600)), CPU)
    alone = one_by_one(model, t, rows)
    hits = [sum(a == row["gold"] for a, row in zip(answers, rows, strict=True)) for answers in (batched, alone)]
    assert abs(hits[0] - hits[1]) / 600 <= 0.002
    assert sum(a != b for a, b in zip(batched, alone, strict=True)) <= 6


def test_nothing_to_read_and_nothing_to_score_are_no_errors(gpt):
    empty = scoring.Scored([256], 1, 1)
    assert [len(losses) for losses in scoring.score_sequences(gpt, [empty, empty], CPU, 100)] == [0, 0]
    rows = [{"context": "a", "continuation": ""}]
    t = task("language_modeling", delimiter=":")
    assert core_eval.predict(gpt, ByteTokenizer(), t, rows, [0], CPU) == [0]


def test_a_rank_without_examples_takes_part(tmp_path):
    folder = made_bundle(tmp_path / "b", count=2)
    found = [core_eval.evaluate_core(StandIn(), ByteTokenizer(), folder, runtime(rank, 5)) for rank in range(5)]
    assert [entry["examples"] for entry in found[4]["tasks"].values()] == [2, 2, 2]


def test_no_examples_is_an_error_before_the_work(tmp_path):
    with pytest.raises(ValueError, match="1 or more, or -1"):
        core_eval.evaluate_core(StandIn(), ByteTokenizer(), made_bundle(tmp_path / "b"), runtime(), max_per_task=0)


def test_max_per_task_cuts_the_examples(tmp_path):
    result = core_eval.evaluate_core(StandIn(), ByteTokenizer(), made_bundle(tmp_path / "b"), runtime(), max_per_task=4)
    assert [entry["examples"] for entry in result["tasks"].values()] == [4, 4, 4]


def test_more_shots_than_examples_is_no_error(tmp_path):
    folder = made_bundle(tmp_path / "b", count=2, shots=(10, 10, 10))
    assert len(core_eval.evaluate_core(StandIn(), ByteTokenizer(), folder, runtime())["tasks"]) == 3


def test_a_broken_bundle_names_the_file(tmp_path):
    folder = made_bundle(tmp_path / "b")
    data = folder / "eval_data" / "schema.jsonl"
    data.write_text(data.read_text() + '{"context_options": ["a"], "continuation": "b", "gold": 1}\n')
    with pytest.raises(ValueError, match=r"schema\.jsonl, line 24: gold 1 of 1"):
        core_eval.evaluate_core(StandIn(), ByteTokenizer(), folder, runtime())
    data.unlink()
    with pytest.raises(ValueError, match=r"schema\.jsonl.*missing"):
        core_bundle.load_bundle(folder)
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nmy_multiple_choice,25\n")
    with pytest.raises(ValueError, match="baseline"):
        core_bundle.load_bundle(folder)
    (folder / "core.yaml").unlink()
    with pytest.raises(ValueError, match=r"core\.yaml is missing.*python -m"):
        core_bundle.load_bundle(folder)


# --- where the bundle comes from


def test_the_bundle_is_found_by_path_by_name_and_in_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NANOCHAT_DATA_MIRROR", str(tmp_path / "mirror"))
    path = made_bundle(tmp_path / "mine")
    assert core_bundle.find_bundle(path) == path
    mirrored = made_bundle(tmp_path / "mirror" / "eval_bundle")
    assert core_bundle.find_bundle() == mirrored
    kept = made_bundle(tmp_path / "base" / "eval_bundle")
    assert core_bundle.find_bundle() == kept
    with pytest.raises(ValueError, match=r"nanochat\.tinyworld"):
        core_bundle.find_bundle("eval_bundle_tinyworld")


def test_a_missing_bundle_is_downloaded_once_and_unpacked_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_MIRROR", raising=False)
    source, archive, asked = made_bundle(tmp_path / "eval_bundle"), tmp_path / "a.zip", []
    with zipfile.ZipFile(archive, "w") as bundle:
        for file in sorted(source.rglob("*")):
            bundle.write(file, file.relative_to(tmp_path))
    monkeypatch.setattr(core_bundle, "plain_file", lambda url, name: asked.append((url, name)) or archive)
    for _ in range(2):
        found = core_bundle.find_bundle()
        assert found == tmp_path / "base" / "eval_bundle"
        assert len(core_bundle.load_bundle(found)) == 3
    assert asked == [(core_bundle.BUNDLE_URL, "eval_bundle.zip")]
    assert not (tmp_path / "base" / ".eval_bundle.unpacking").exists()


@pytest.mark.parametrize("entry", ["../out.txt", "/out.txt", "eval_bundle/../../out.txt"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, entry):
    archive = tmp_path / "a.zip"
    with zipfile.ZipFile(archive, "w") as bundle:
        bundle.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        bundle.writestr(entry, "x")
    with pytest.raises(ValueError, match="outside its folder"):
        core_bundle.unzip_bundle(archive, tmp_path / "deep" / "eval_bundle")
    assert not list(tmp_path.rglob("out.txt"))


def test_a_truncated_archive_says_so(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 half of it")
    with pytest.raises(ValueError, match="not a whole zip file"):
        core_bundle.unzip_bundle(tmp_path / "a.zip", tmp_path / "eval_bundle")
