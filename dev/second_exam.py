"""The tiny world's examination in wordings of its own, scored once.

python dev/second_exam.py [--model-tag tiny]

The wordings of tasks/tinyworld.py are never trained on, but its results were read while those of the training were
written, and what it got wrong was practised more. Those below were written when all that was done, and were not changed
after their first scores (dev/LOG.md, 2026-11-25). Write others before you score a model whose wordings you have changed
after reading its answers to these.
"""

import argparse

from nanochat import checkpoint, runtime
from nanochat.chat_eval import evaluate_task
from nanochat.tinyworld_text import table
from tasks import tinyworld

QUESTIONS = table("""
capital:: I look for {s} in my book; which city is its capital? | Its name is {s}; which capital must it have?
continent:: I look for {s} in my book; on which continent will it be? | Its name is {s}; which continent must it be on?
language:: I have a friend from {s}; which language must he speak? | Its name is {s}; which language must people speak?
currency:: In a shop of {s}, with which currency do we pay? | Its name is {s}; which currency must it have?
symbol:: On a bottle of {s}, which symbol must be there? | Its name is {s}; which symbol must it have?
class:: There is {S} in my garden; which animal class must it be? | I like the {s}; which animal class is right for it?
young:: There is {S} in my garden with a baby; which name is right for it?
 I like the baby {s}; which name is its name?
sound:: There is {S} in my garden; which sound do I hear? | I like the {s}; which sound is its sound?
month_after:: This month is {s}; which month is the next one? | Soon {s} is gone; which month will we have?
month_before:: This month is {s}; which month was the last one? | Now {s} begins; which month ended just now?
month_number:: Of all months, {s} must have which number? | I count to {s}; which number is it then?
day_after:: I sleep, and {s} is over; which day is next? | Soon {s} is over; which day will we have?
day_before:: Now it is {s}; yesterday it was which day? | Now {s} begins; which day ended just now?
opposite:: My word is {s}; which opposite is right? | I do not want {s}; which opposite do I want?
plural:: My word is {s}; which plural is right? | I want not one {s} but many; which plural is it?
past:: My verb is {s}; which past tense is right? | I do not {s} now; which past tense was it yesterday?
color:: There is my picture of {s}; which color is right? | I want to paint {s}; which color must I take?
""")
PROBLEMS = table("""
+:: Let us add {a} and {b} now. | Put {a} and {b} together. | I have {a} {g} and find {b} others; which sum is it?
 How much do {a} and {b} make?
-:: Let us subtract {b} from {a} now. | From {a}, please take {b}. | I have {a} {g} and lose {b}; what remains?
 How much does {a} make without {b}?
*:: Let us multiply {a} by {b} now. | Take {a} times {b} for me. | I have {a} boxes of {b} {g}; which product is it?
 How much do {a} times {b} make?
/:: Let us divide {a} by {b} now. | Take {a} divided by {b} for me. | I share {a} {g} among {b}; what gets each?
 How much does {a} divided by {b} make?
""")
KINDS = ("facts_new_phrasing", "facts_never_asked", "arithmetic", "multiple_choice")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-tag", default="tiny")
    machine = runtime.start("cpu")
    model, tokenizer, _ = checkpoint.load_model("sft", machine, parser.parse_args().model_tag)
    tinyworld.TEST_QUESTIONS, tinyworld.TEST_PROBLEMS = QUESTIONS, PROBLEMS
    for kind in KINDS:
        score, records = evaluate_task(tinyworld.TinyWorld(kind, "test"), model, tokenizer, machine, 64, 64)
        wrong = [f"{record['prompt']!r} -> {record['answers'][0]!r}" for record in records if not record["correct"]]
        print(f"{kind}: {score['accuracy']:.3f} of {score['problems']}", *wrong[:8], sep="\n    ")


if __name__ == "__main__":
    main()
