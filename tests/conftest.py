"""What all tests share: two threads, an empty artifact root, a small tokenizer, random models. Needs no network."""

import os

import pytest

TEXT = """\
The river runs through the old town, past the mill and the market, and on to the sea.
On Monday the baker sells bread; on Tuesday, Wednesday and Thursday there is cake as well.
What is the capital of France? The capital of France is Paris. And of Spain? Madrid is the capital of Spain.
There were 12 apples, 7 pears and 305 plums; 12 + 7 = 19, and 305 - 19 = 286.
"Where is the key?" asked Anna. "It is under the mat," said her brother, "where it always was."
Grüße aus Köln! Das ist über die Straße. Où est la gare? La gare est là-bas. 日本語の文もある。
    def area(width, height):
        return width * height
She sold the house in the spring, bought a boat in the summer, and sailed round the world in the autumn.
Nothing that was written here was ever read by anybody, except that the tests read it again and again.
"""


@pytest.fixture(scope="session", autouse=True)
def threads():
    """Two threads, or what OMP_NUM_THREADS says: tests share their machine."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


@pytest.fixture
def base_dir(tmp_path, monkeypatch):
    """An artifact root of the test's own; not made yet, as on a new machine."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer():
    """400 ids: bytes, merges of the text above, special tokens."""
    from nanochat.tokenizer import Tokenizer

    return Tokenizer.train(TEXT.splitlines(keepends=True) * 3, 400)


@pytest.fixture(scope="session")
def random_model():
    """random_model(dtype=..., seed=..., **config) -> a GPT in which every parameter has a value that counts."""
    import torch

    from nanochat.gpt import GPT, GPTConfig

    def make(dtype=torch.float32, seed=1, **config):
        sizes = dict(sequence_len=64, vocab_size=128, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L")
        model = GPT(GPTConfig(**{**sizes, **config}), dtype)
        model.init_weights(seed)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=noise) * 0.2)
        return model.double() if dtype == torch.float64 else model

    return make
