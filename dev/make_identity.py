"""Conversations in which a model says who it is, made from a short description of it, without a network.

    python dev/make_identity.py                                   the built-in description, for the speedrun
    python dev/make_identity.py --show > me.txt                   that description, as a beginning for your own
    python dev/make_identity.py --about me.txt --output me.jsonl  then: python -m scripts.chat_sft --identity me.jsonl
    python dev/make_identity.py --about me.txt --endpoint http://localhost:8000 --model NAME

A description is lines of `key: value`. What it does not say, the model is not taught to claim. With --endpoint a model
behind any OpenAI-compatible server writes the conversations (its key: OPENAI_API_KEY); otherwise templates
(dev/identity_wordings.py).
"""

import argparse
import hashlib
import json
import os
import random
import re
import string
import time
from pathlib import Path

import identity_wordings as words
import requests
from tqdm import tqdm

from nanochat import paths
from tasks.common import check_messages
from tasks.customjson import IDENTITY


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--about", help="file with the description (default: the built-in one)")
    add("--show", action="store_true", help="print the built-in description, and nothing else")
    add("--count", type=int, default=1000, help="conversations")
    add("--seed", type=int, default=42)
    add("--output", type=Path, help=f"JSONL file (default: task_data/{IDENTITY} in the base folder)")
    add("--force", action="store_true", help="replace the output if there is one")
    add("--endpoint", help="OpenAI-compatible server that writes them, such as http://localhost:8000")
    add("--model", help="its model")
    args = parser.parse_args(argv)
    if args.count < 1:
        parser.error(f"--count is {args.count}; expected 1 or more")
    if bool(args.endpoint) != bool(args.model):
        parser.error("--endpoint and --model are given together")
    if args.endpoint and not args.endpoint.startswith(("http://", "https://")):
        parser.error(f"--endpoint is {args.endpoint!r}; expected http:// or https://")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.show:
        print(words.BUILT_IN.strip())
        return
    about = read_description(args.about)
    output = args.output or paths.task_dir() / IDENTITY
    if output.exists() and not args.force:
        print(f"{output} is there and is kept (--force makes it anew)")
        return
    if args.endpoint:
        conversations = from_endpoint(args, about, output)
    else:
        conversations = from_templates(about, args.count, args.seed)
        write_lines(output, conversations)
    for messages in conversations[:2]:
        print(*(f"  {message['role']}: {message['content']}" for message in messages), "", sep="\n")
    print(f"{len(conversations):,} conversations in {output}")


# -- the description


def read_description(path):
    """{key: wordings} of a description file, or of the built-in one for None. can, cannot: {key: items}."""
    try:
        lines = Path(path).read_bytes().splitlines() if path else words.BUILT_IN.encode().splitlines()
    except OSError as error:
        raise SystemExit(f"{path}: expected a description, lines of 'key: value' ({error.strerror})") from None
    about, place_of = {}, {}
    for number, line in enumerate(lines, 1):
        place = f"{path}, line {number}"
        try:
            line = line.decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise SystemExit(f"{place}: not UTF-8 ({error.reason})") from None
        if not line or line.startswith("#"):
            continue
        key, colon, value = line.partition(":")
        key = " ".join(word if word.isupper() and word[1:] else word.lower() for word in key.split())
        known = words.ALIASES.get(key.lower(), key.lower())
        key = known if known in words.QUESTIONS else key
        if not colon or not re.fullmatch(r"[^\W\d][\w '’-]{0,39}", key):
            hint = " (a file of conversations goes to scripts.chat_sft --identity)" if line[0] in "[{" else ""
            raise SystemExit(f"{place}: expected 'key: value', got {line[:60]!r}{hint}")
        if key in about:
            raise SystemExit(f"{place}: {key!r} was given before, on line {place_of[key]}")
        about[key], place_of[key] = wordings_of(key, value), number
        if not about[key]:
            raise SystemExit(f"{place}: expected a value after '{key}:', got none")
    if "name" not in about:
        raise SystemExit(f"{path}: expected a line 'name: ...'; who has no name cannot say it")
    return about


def wordings_of(key, value):
    parts = [part.strip() for part in value.split(";" if key in words.LISTS else " | ") if part.strip()]
    if key in words.ANSWERS_IN_FULL:
        return [part[0].upper() + part[1:] + ("" if part[-1] in ".!?" else ".") for part in parts]
    parts = [part.rstrip(".") or part for part in parts]
    if key == "made":  # a bare year, with or without its month
        return [re.sub(r"^(?=(\w+ )?\d{4}$)(?!in )", "in ", part) for part in parts]
    if key == "source":
        return [re.sub(r"^(?=https?:|www\.)", "at ", part) for part in parts]
    return parts


def strangers(names, about):
    """Those that the description does not mention: what it does mention may be true."""
    said = " ".join(" ".join(values) for values in about.values()).lower()
    return [name for name in names if name.lower() not in said]


# -- from templates


def topics_of(about):
    """{topic: (questions, answers, weight)}: the wordings that this description fills."""
    slots = {None, *draw(about, random.Random(0))}  # None: text after the last slot

    def filled(frames):
        return [frame for frame in frames if all(slot in slots for _, slot, _, _ in string.Formatter().parse(frame))]

    topics = {"Foreign": (None, None, words.WEIGHTS["Foreign"])}
    for topic, questions in words.QUESTIONS.items():
        questions, answers = filled(questions), filled(words.ANSWERS[topic])
        weight = words.WEIGHTS.get(topic, 1)
        if not answers and topic in words.UNSAID:
            answers = [frame.replace("{unsaid}", words.UNSAID[topic]) for frame in words.DECLINING]
            weight = words.UNSAID_WEIGHT
        if questions and answers:
            topics[topic] = questions, answers, weight
    for key in [key for key in about if key not in words.QUESTIONS]:
        many = key.endswith("s") and not key.endswith(("ss", "us", "is", "as"))
        own = {"key": key, "is": "are" if many else "is", "value": f"{{{key}}}", "name": "{name}"}
        frames = ([frame.format(**own) for frame in some] for some in (words.OWN_QUESTIONS, words.OWN_ANSWERS))
        topics[key] = *frames, 1
    return topics


def draw(about, rng):
    """A value for every slot."""
    values = {key: rng.choice(wordings) for key, wordings in about.items() if key not in words.LISTS}
    for key, joint in (("can", "and"), ("cannot", "or")):
        if key in about:
            items = rng.sample(about[key], min(len(about[key]), rng.randint(2, 3)))
            values[f"{key.capitalize()}_item"] = items[0]
            values[key] = f" {joint} ".join(filter(None, (", ".join(items[:-1]), items[-1])))
    for slot, names in (("Other", words.OTHERS), ("Company", words.COMPANIES)):
        if unknown := strangers(names, about):
            values[slot] = rng.choice(unknown)
    return {**values, "Tongue": rng.choice(words.TONGUES)}


def from_templates(about, count, seed):
    """`count` different conversations; fewer, and a line that says so, when the templates run out."""
    rng, topics = random.Random(seed), topics_of(about)
    made, misses = {}, 0
    while len(made) < count and misses < 1000:
        messages = conversation(topics, about, rng)
        key = json.dumps(messages)
        misses = misses + 1 if key in made else 0
        made[key] = messages
    if len(made) < count:
        print(f"the templates ran out: {len(made):,} different conversations of {count:,}")
    return list(made.values())


def conversation(topics, about, rng):
    """One to four turns on different topics; the longer ones may begin with a greeting and end with thanks."""
    num_turns = rng.choice((1, 1, 1, 2, 2, 3, 4))
    pairs, left = [], dict(topics)
    values = draw(about, rng)
    if num_turns > 1 and rng.random() < 0.2:
        pairs.append((rng.choice(words.GREETINGS), rng.choice(words.GREETED).format(**values)))
    parting = num_turns > 2 and rng.random() < 0.3
    last = ""
    while len(pairs) < num_turns - parting:
        if "Sure" in left and last in ("Other", "Company") and rng.random() < 0.3:
            topic = "Sure"  # about the same stranger
        else:
            too_early = words.FOLLOW_UPS if len(pairs) < 2 else ("Sure",)
            weights = {topic: weight for topic, (_, _, weight) in left.items() if topic not in too_early}
            topic = rng.choices(list(weights), weights.values())[0]
            values = draw(about, rng)
        pairs.append(turn(topic, left.pop(topic), values, rng, first=not pairs))
        last = topic
    if parting:
        replies, partings = rng.choice(list(words.PARTINGS.items()))
        pairs.append((rng.choice(partings), rng.choice(replies.split(" | "))))
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def turn(topic, frames, values, rng, first):
    """(question, answer)"""
    if topic == "Foreign":
        said, asked = rng.choice(list(words.FOREIGN.items()))
        return rng.choice(asked), said.format(**values)
    question, answer = rng.choice(frames[0]), rng.choice(frames[1]).format(**values)
    if topic in words.TAILED and rng.random() < 0.2:
        answer += " " + rng.choice(words.TAILS)
    return typed(question, values, rng, words.OPENERS if first else words.GOING_ON), answer


def typed(frame, values, rng, openers):
    """The question as people type it: after an opener, in lower case, with a slip of the finger, or as it stands."""
    opener = rng.choice(openers)
    if rng.random() < 0.35 and not frame.startswith(words.NO_OPENER) and (frame[-1] == "?" or opener[-2] in ".!"):
        if opener[-2] not in ".!" and not frame.startswith(("I ", "{")):
            frame = frame[0].lower() + frame[1:]
        frame = opener + frame
    if rng.random() < 0.08:
        frame = slipped(frame, rng)
    text = frame.format(**values)
    if rng.random() < 0.15:
        text = text.lower().rstrip("?.!")
    return text


def slipped(frame, rng):
    """Two neighbors of one word change places, or one is missing; never in a slot."""
    found = list(re.finditer(r"(?<![{\w])[a-z]{4,}(?![\w}'])", frame))
    if not found:
        return frame
    word = rng.choice(found)
    at = rng.randrange(word.start() + 1, word.end() - 1)
    swapped = frame[at + 1] + frame[at] if rng.random() < 0.6 else frame[at + 1]
    return frame[:at] + swapped + frame[at + 2 :]


# -- from an endpoint

PROMPT = """Below is what is known about an assistant. Write {num} different conversations between a person and this
assistant that are about the assistant itself.

{description}

Rules. The assistant says only what stands above; what does not stand there, it says that it does not know. It speaks
in plain, short sentences, in the first person, true to the description; where the person is mistaken about it, it
says so. The person writes {manner}. Each conversation has one to four turns: user, assistant, user, assistant, ...
Different people ask; the first questions go about this: {topics}

Reply with JSON only: an array of conversations, each an array of {{"role": "user" or "assistant", "content": "..."}}.
"""
MANNERS = ("casually", "formally and politely", "in lower case, with typos", "curiously", "doubtfully", "in few words")
AT_ONCE = 5
WAITS = (2, 8)  # seconds before a busy or silent server is asked again
MAX_BARREN = 5  # replies in a row without one usable conversation


class EndpointError(Exception):
    """The server does not answer, or nothing useful."""


def from_endpoint(args, about, output):
    """As from_templates, but written there. What is made is on disk at once, and the same line goes on from it."""
    known = hashlib.sha256(json.dumps([about, args.model]).encode()).hexdigest()[:8]
    partial = output.with_name(f"{output.name}.{known}.partial")
    made = {}
    if partial.exists():
        *lines, _ = partial.read_text(encoding="utf-8").split("\n")  # the rest: a line that a kill cut off
        made = {as_line(messages): messages for messages in map(json.loads, lines)}
    write_lines(partial, made.values())
    try:
        with open(partial, "a", encoding="utf-8") as file:
            for messages in asked_for(args, about, made):
                file.write(as_line(messages))
                file.flush()
    except EndpointError as error:
        raise SystemExit(f"{error}; {len(made)} conversations are kept, the same line goes on from them") from None
    conversations = list(made.values())[: args.count]
    write_lines(output, conversations)
    partial.unlink()
    return conversations


def asked_for(args, about, made):
    """Yields new conversations, and puts them into `made`, until there are enough."""
    rng, topics = random.Random(f"{args.seed} {len(made)}"), topics_of(about)
    rejected, barren, problem = 0, 0, "known ones only"
    with tqdm(total=args.count, initial=len(made), unit=" conversations") as bar:
        while len(made) < args.count:
            good, problems = judged(ask(args, prompt(about, topics, rng)), about)
            rejected, problem = rejected + len(problems), (problems or [problem])[-1]
            new = {as_line(messages): messages for messages in good if as_line(messages) not in made}
            for line in list(new)[: args.count - len(made)]:
                made[line] = new[line]
                yield new[line]
            barren = 0 if new else barren + 1
            if barren == MAX_BARREN:
                raise EndpointError(f"{barren} replies in a row brought nothing new ({rejected} rejected: {problem})")
            bar.update(len(made) - bar.n)
    if rejected:
        print(f"{rejected:,} were rejected, the last one for this: {problem}")


def prompt(about, topics, rng):
    description = "\n".join(f"{key}: {('; ' if key in words.LISTS else ' | ').join(about[key])}" for key in about)
    some = rng.sample([topic for topic in topics if topic not in ("Foreign", *words.FOLLOW_UPS)], 3)
    asked = " ".join(rng.choice(topics[topic][0]).format(**draw(about, rng)) for topic in some)
    return PROMPT.format(num=AT_ONCE, description=description, manner=rng.choice(MANNERS), topics=asked)


def ask(args, text):
    """The body of the server's reply to one prompt."""
    url = args.endpoint.rstrip("/")
    if not url.endswith("/chat/completions"):
        url += ("" if url.endswith("/v1") else "/v1") + "/chat/completions"
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    body = {"model": args.model, "messages": [{"role": "user", "content": text}], "temperature": 1.0}
    for wait in (*WAITS, None):
        try:
            response = requests.post(url, json=body, headers=headers, timeout=300)
            if response.ok:
                return response.content
            problem = f"status {response.status_code}, {response.text[:200]!r}"
            if response.status_code < 500 and response.status_code != 429:
                break
        except requests.RequestException as error:
            problem = f"{type(error).__name__}, {str(error).splitlines()[0][:200]}"
        if wait is not None:
            time.sleep(wait)
    raise EndpointError(f"{url}: {problem}")


def judged(reply, about):
    """(usable conversations, what is wrong with the others), of the body of a reply."""
    try:
        text = json.loads(reply)["choices"][0]["message"]["content"].rpartition("</think>")[2]
        found = json.loads(text[text.index("[") : text.rindex("]") + 1])
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return [], [f"expected a JSON array of conversations, got {str(reply[:200])[2:-1]}"]
    if found and isinstance(found[0], dict) and "role" in found[0]:  # one conversation, bare
        found = [found]
    good, problems = [], []
    for messages in found:
        problem = problem_of(messages, about)
        if problem:
            problems.append(problem)
        else:
            good.append([{"role": one["role"], "content": one["content"].strip()} for one in messages])
    return good, problems


def problem_of(messages, about):
    problem = check_messages(messages)
    if problem:
        return problem
    if messages[-1]["role"] != "assistant" or messages[0]["role"] != "user":
        return "expected a user at the beginning and an assistant at the end"
    texts = [message["content"] for message in messages]
    if not all(isinstance(text, str) and text.strip() and not re.search(r"[\ud800-\udfff]", text) for text in texts):
        return "expected text in every message"
    names, makers = ("|".join(map(re.escape, strangers(some, about))) for some in (words.OTHERS, words.COMPANIES))
    wrong = rf"\b(I am|I'm|my name is) ({names})\b|\bI was (made|built|created|trained|developed) by ({makers})\b"
    said = [re.search(wrong, text, re.IGNORECASE) for text in texts[1::2]]
    return next((f"the assistant says {found[0]!r}" for found in said if found), None)


def as_line(messages):
    return json.dumps(messages, ensure_ascii=False) + "\n"


def write_lines(path, conversations):
    """Atomic: a reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text("".join(map(as_line, conversations)), encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
