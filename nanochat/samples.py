"""What a base model says: greedy continuations of seven short prompts, and free text."""

from nanochat.engine import Engine, Request

PROMPTS = (
    "The capital city of Italy is",
    "The chemical symbol for iron is",
    "The day that comes after Monday is",
    "The opposite of tall is",
    "The planets that go around the Sun are:",
    "The colour that I like best is",
    "If x + 4 = 9, then x is",
)
PROMPT_TOKENS = 16


def prompted(model, tokenizer) -> list[dict]:
    """[{"prompt", "text"}], at temperature 0."""
    prompts = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in PROMPTS]
    engine = Engine(model, tokenizer, len(prompts), max(map(len, prompts)) + PROMPT_TOKENS)
    answers = engine.generate([Request(ids, max_tokens=PROMPT_TOKENS) for ids in prompts])
    return [{"prompt": prompt, "text": tokenizer.decode(ids)} for prompt, ids in zip(PROMPTS, answers, strict=True)]


def unconditioned(model, tokenizer, count: int = 8, max_tokens: int = 128) -> list[str]:
    """Free text from the beginning mark at temperature 1."""
    requests = [Request([tokenizer.bos], max_tokens, temperature=1.0, top_k=0, seed=seed) for seed in range(count)]
    engine = Engine(model, tokenizer, count, max_tokens + 1)
    return [tokenizer.decode(ids) for ids in engine.generate(requests)]
