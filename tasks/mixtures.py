"""What fine-tuning teaches and what reinforcement learning practises: the mixtures of scripts.chat_sft and chat_rl."""

from tasks.common import Mixture, Slice, Task
from tasks.customjson import CustomJSON, identity
from tasks.gsm8k import GSM8K
from tasks.mmlu import MMLU
from tasks.smoltalk import SmolTalk
from tasks.spellingbee import SimpleSpelling, SpellingBee
from tasks.tinyworld import TinyWorld

NAMES = ("default", "tiny")
PRACTICE = ("gsm8k", "tiny")

# Conversations of each kind that the tiny profile is taught.
TINY = {
    "facts": 7000,
    "arithmetic": 9000,
    "arithmetic_hard": 150,
    "counting": 3500,
    "spelling": 1500,
    "multiple_choice": 8000,
    "stories": 2500,
    "smalltalk": 500,
    "identity": 300,
    "unknown": 1500,
}

# Questions of each kind that it practises.
TINY_PRACTICE = {"arithmetic_hard": 6000, "arithmetic": 1500, "counting": 500}


def training(name: str, identity_file: str | None = None, mmlu_epochs: int = 3, gsm8k_epochs: int = 4) -> Mixture:
    """What is taught, and how often: one list of conversations, shuffled. identity_file: conversations about the model,
    in place of the mixture's own."""
    own = {"identity": CustomJSON(identity_file)} if identity_file else {}  # replaces a kind that would contradict it
    if name == "tiny":
        return Mixture(({kind: TinyWorld(kind, "train", size) for kind, size in TINY.items()} | own).values())
    about_itself = own.get("identity") or identity()
    return Mixture(
        [
            SmolTalk("train"),  # 460K
            *[about_itself] * 2,
            *[MMLU("all", "auxiliary_train")] * mmlu_epochs,  # 100K each
            *[GSM8K("train")] * gsm8k_epochs,  # 8K each
            SimpleSpelling(size=200_000, split="train"),
            SpellingBee(size=80_000, split="train"),
        ]
    )


def validation(name: str) -> Mixture:
    """Conversations that are not taught."""
    if name == "tiny":
        return Mixture([TinyWorld(kind, "test", 100) for kind in ("facts_new_phrasing", "arithmetic", "stories")])
    return Mixture([SmolTalk("test"), Slice(MMLU("all", "test"), stop=5200), Slice(GSM8K("test"), stop=420)])


def practice(name: str) -> Task:
    """What is practised: questions whose answers earn a reward."""
    if name == "gsm8k":
        return GSM8K("train")
    return Mixture([TinyWorld(kind, "practice", size) for kind, size in TINY_PRACTICE.items()])


def held_out(name: str) -> Task:
    """Questions that are not practised, as many of each kind."""
    if name == "gsm8k":
        return GSM8K("test")
    return Mixture([TinyWorld(kind, "test", 1000) for kind in TINY_PRACTICE])
