"""What reinforcement learning learns from: answers that the model samples, their rewards, and the rows made of them.

The plain on-policy policy gradient: an answer's advantage is its reward less the mean reward of all answers to the same
question, and the loss of a step is the mean, over all tokens that the model chose in it, of advantage times
cross-entropy (REINFORCE with a baseline; all tokens of the step count alike, as in arXiv 2503.14476). No clipping: an
answer is learned from once, by the model that gave it. A question whose answers all score the same has no advantages,
and makes no rows.

n rows of a rank, T tokens of its longest.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from nanochat import chat
from nanochat.batches import IGNORE
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT
from nanochat.runtime import Runtime
from nanochat.tokenizer import Tokenizer

MULTIPLE = 8  # rows that are learned from together are cut to one, where they are longer
MEASURED = 16  # answers on a rank whose entropy and divergence are measured
PARTS = 10  # of a run, whose means history() gives
COURSE = "reward sequence_length skipped_questions entropy kl rollout/tok_per_sec train/tok_per_sec".split()


@dataclass
class Rollout:
    """One sampled answer. ids: the prompt and it, with the end mark if the model came to it; chosen: which of them the
    model chose, and was not given in the prompt or by a tool. said: the answer as a person reads it."""

    ids: list[int]
    chosen: list[bool]
    said: str = ""
    reward: float = 0.0
    advantage: float = 0.0

    @property
    def num_chosen(self) -> int:
        return sum(self.chosen)


Group = list[Rollout]  # all answers to one question


def sample(
    engine: Engine,
    task,
    questions: list[dict],
    seeds: list[int],
    num_samples: int,
    max_tokens: int,
    temperature: float,
    top_k: int,
    progress: bool = False,
    rehearse: bool = False,
) -> list[Group]:
    """num_samples rewarded answers to each question, all of them under way together; a prompt is read once.

    questions: conversations of the task, whose last message is not read. seeds: of the first answer to each question;
    those of the others follow. progress: a bar, where it takes more than a few seconds. rehearse: for a model that has
    learned nothing yet. Its answers are as long as the expected ones, but for the first to each question, which takes
    all of its tokens; to every fourth that one is taken to be right, so that there is something to learn from.
    """
    groups, of_request = [], {}
    if rehearse:
        engine.ends = set()
    for conversation, seed in zip(questions, seeds, strict=True):
        prompt = chat.prompt(engine.tokenizer, conversation)
        groups.append([Rollout(list(prompt), [False] * len(prompt)) for _ in range(num_samples)])
        expected = chat.answer_tokens(engine.tokenizer, conversation) if rehearse else max_tokens
        for i, rollout in enumerate(groups[-1]):
            limit = min(expected, max_tokens) if i > 0 else max_tokens
            of_request[engine.submit(Request(prompt, limit, temperature, top_k, seed=seed + i))] = rollout
    answers = {id: [] for id in of_request}
    with tqdm(total=len(of_request), desc="answers", delay=5, leave=False, disable=None if progress else True) as bar:
        while engine.busy:
            for event in engine.step():
                assert not event.dropped, "the model did not see the whole prompt"
                rollout = of_request[event.id]
                rollout.ids.append(event.end if event.token is None else event.token)
                rollout.chosen.append(not event.forced)
                if event.token is not None:
                    answers[event.id].append(event.token)
                bar.update(event.finish is not None)
    for id, rollout in of_request.items():
        rollout.said = chat.spoken_text(engine.tokenizer, answers[id])
    texts = iter(chat.visible_text(engine.tokenizer, tokens) for tokens in answers.values())
    for number, (conversation, group) in enumerate(zip(questions, groups, strict=True)):
        rewards = [task.reward(conversation, next(texts)) for _ in group]
        compare(group, rewards if not rehearse else [float(i == 0 and number % 4 == 0) for i in range(len(group))])
    return groups


def longest(task, tokenizer: Tokenizer, max_tokens: int) -> int:
    """Tokens that the longest prompt of a task and its answer may have."""
    return max(len(chat.prompt(tokenizer, conversation)) for conversation in task) + max_tokens


def compare(group: Group, rewards: list[float]) -> None:
    """Give the answers to one question their rewards and advantages."""
    average, alike = sum(rewards) / len(rewards), min(rewards) == max(rewards)
    for rollout, reward in zip(group, rewards, strict=True):
        rollout.reward, rollout.advantage = reward, 0.0 if alike else reward - average


def rows_of(groups: list[Group], bos: int, runtime: Runtime) -> tuple[torch.Tensor, ...]:
    """This rank's share of the rows of a step, from the groups of all ranks: (inputs, targets, weights, lengths); the
    first three are (n, T) and on the device.

    A row is one answer after its prompt, which is all that the model saw when it chose. They are dealt to the ranks by
    length, the longest first, so that those which are learned from together are alike. The mean of weights times
    cross-entropy over the targets of all ranks is that over all chosen tokens of the step, those too that make no rows.
    """
    rollouts = [rollout for group in groups for rollout in group]
    kept = sorted((rollout for rollout in rollouts if rollout.advantage), key=lambda rollout: -len(rollout.ids))
    share = kept[runtime.rank :: runtime.world_size]
    n = max(1, -(-len(kept) // runtime.world_size))  # the same on every rank: some may have an empty row
    T = max((len(rollout.ids) for rollout in share), default=2) - 1
    scale = sum(rollout.num_chosen for rollout in kept) / sum(rollout.num_chosen for rollout in rollouts)
    inputs, targets = torch.full((n, T), bos), torch.full((n, T), IGNORE)
    weights, lengths = torch.zeros(n, T), torch.ones(n, dtype=torch.long)
    for i, rollout in enumerate(share):
        ids, chosen = torch.tensor(rollout.ids), torch.tensor(rollout.chosen)
        length = lengths[i] = len(ids) - 1
        inputs[i, :length] = ids[:-1]
        targets[i, :length] = ids[1:].where(chosen[1:], IGNORE)
        weights[i, :length] = rollout.advantage * scale
    return *(tensor.to(runtime.device) for tensor in (inputs, targets, weights)), lengths


def policy_loss(model: GPT) -> Callable:
    """The loss of some of these rows, for optimizer_step: they are cut to the longest of them."""

    def loss(inputs, targets, weights, lengths, loss_reduction="sum"):
        longest = -(-int(lengths.max()) // MULTIPLE) * MULTIPLE
        inputs, targets, weights = (tensor[:, :longest] for tensor in (inputs, targets, weights))
        return (model(inputs, targets, loss_reduction="none") * weights).sum()

    return loss


@torch.no_grad()
def entropy_and_kl(model: GPT, reference: GPT, groups: list[Group], runtime: Runtime) -> tuple[float, float]:
    """The model's entropy and its KL divergence from the reference, in nats a token, where it chose one in the first
    answer to each of some questions of all ranks. They are summed over the whole vocabulary: the chosen tokens alone
    would tell them with more noise."""
    rollouts = [group[0] for group in groups[:MEASURED]]
    totals = torch.zeros(3)
    if rollouts:
        T = max(len(rollout.ids) for rollout in rollouts) - 1
        idx = torch.tensor([rollout.ids[:-1] + [0] * (T + 1 - len(rollout.ids)) for rollout in rollouts])
        states = [each.hidden(idx.to(runtime.device)) for each in (model, reference)]  # (n, T, C)
        for i, rollout in enumerate(rollouts):
            at = torch.tensor(rollout.chosen[1:]).nonzero().squeeze(1).to(runtime.device)
            logs, others = (
                torch.log_softmax(each.logits(state[i, at]), dim=-1)
                for each, state in zip((model, reference), states, strict=True)
            )
            probs = logs.exp()
            sums = torch.stack([-(probs * logs).sum(), (probs * (logs - others)).sum()]).tolist()
            totals += torch.tensor([*sums, len(at)])
    entropy, kl, count = runtime.sum(totals.to(runtime.device)).tolist()
    return entropy / count, kl / count


def figures(groups: list[Group], seconds: float) -> dict[str, float]:
    """What is logged of a step's answers, which took so many seconds. What a tool says counts in no length."""
    rollouts = [rollout for group in groups for rollout in group]
    chosen = sum(rollout.num_chosen for rollout in rollouts)
    skipped = sum(not any(rollout.advantage for rollout in group) for group in groups)
    return {
        "reward": sum(rollout.reward for rollout in rollouts) / len(rollouts),
        "sequence_length": chosen / len(rollouts),
        "skipped_questions": skipped / len(groups),
        "rollout/dt": seconds,
        "rollout/tok_per_sec": chosen / seconds,
    }


def num_learned(groups: list[Group]) -> int:
    """Tokens, prompts included, that a step learns from."""
    return sum(len(rollout.ids) - 1 for group in groups for rollout in group if rollout.advantage)


def history(log: list[dict]) -> dict:
    """What the lines of a run's log say of it as a whole: its examinations, the means over each tenth of its steps (up
    to the step named), and where it ended after how many."""
    steps = [line for line in log if "reward" in line]
    parts = [steps[len(steps) * i // PARTS : len(steps) * (i + 1) // PARTS] for i in range(PARTS)]
    course = [
        {"step": part[-1]["step"], **{name: sum(line[name] for line in part) / len(part) for name in COURSE}}
        for part in parts
        if part
    ]
    examined = [line for line in log if "pass@1" in line]
    examinations = [{key: value for key, value in line.items() if key != "val/dt"} for line in examined]
    asking, learning = (sum(line[name] for line in steps) for name in ("rollout/dt", "train/dt"))
    final = {**(course[-1] if course else {}), **(examinations[-1] if examinations else {})}
    final |= {"step": steps[-1]["step"] + 1} if steps else {}
    return {
        "final": {**final, "rollout_seconds": asking, "training_seconds": learning},
        "course": course,
        "examinations": examinations,
    }


def record(conversation: dict, group: Group) -> dict:
    """A question and its answers to read: how often each came, the most frequent first, and what it earned."""
    *asked, reference = conversation["messages"]
    counts = Counter((rollout.said, rollout.reward) for rollout in group)
    return {
        "question": "\n\n".join(chat.readable(message["content"]) for message in asked),
        "expected": chat.readable(reference["content"]),
        "answers": [{"said": said, "reward": reward, "count": n} for (said, reward), n in counts.most_common()],
    }
