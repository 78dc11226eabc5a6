"""What a model says, for people to read: a base model's continuations, a chat model's answers to the same as questions,
and whole conversations."""

from nanochat import chat
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
QUESTIONS = (  # the same, in order, to ask a chat model
    "What is the capital of Italy?",
    "What is the chemical symbol for iron?",
    "Which day comes after Monday?",
    "What is the opposite of tall?",
    "Which planets go around the Sun?",
    "Which colour do you like best?",
    "If x + 4 = 9, what is x?",
)
CONVERSATIONS = (  # what a person says in them, one turn after the other; some answers need a tool
    ("Hello! Who are you?", "What is the capital of France?", "And what is the capital of Japan?"),
    ("What is 344 + 62?", "How many times is the letter r in strawberry?", "What is 12 * (7 + 5)?"),
    ("How do you spell the word garden?", "What is the opposite of cold?", "Who is the king of Blorvania?"),
)
PROMPT_TOKENS, ANSWER_TOKENS = 16, 96


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


def conversations(model, tokenizer) -> list[list[dict]]:
    """Conversations of one turn about QUESTIONS, then CONVERSATIONS, at temperature 0: [[{"role", "content"}]], the
    content of answers in parts, so that calls of a tool are told from text. They go on side by side."""
    turns = [(question,) for question in QUESTIONS] + list(CONVERSATIONS)
    asked = [
        [chat.prompt(tokenizer, {"messages": [{"role": "user", "content": text}]})[1:] for text in said]
        for said in turns
    ]
    room = max(1 + sum(len(ids) + ANSWER_TOKENS + 1 for ids in each) for each in asked)
    engine = Engine(model, tokenizer, len(turns), room)
    talks, ids = [[] for _ in turns], [[tokenizer.bos] for _ in turns]
    for turn in range(max(map(len, turns))):
        under_way = {}  # request -> which conversation
        for i, said in enumerate(turns):
            if turn < len(said):
                ids[i] += asked[i][turn]
                talks[i].append({"role": "user", "content": said[turn]})
                under_way[engine.submit(Request(list(ids[i]), max_tokens=ANSWER_TOKENS))] = i
        pieces = {request: [] for request in under_way}
        while engine.busy:
            for event in engine.step():
                pieces[event.id] += event.pieces
                if event.token is not None:
                    ids[under_way[event.id]].append(event.token)
        for request, i in under_way.items():
            ids[i].append(tokenizer.special["<|assistant_end|>"])
            talks[i].append({"role": "assistant", "content": chat.parts(pieces[request])})
    return talks
