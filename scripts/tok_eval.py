"""Compare how far a tokenizer compresses texts of several kinds with GPT-2's and GPT-4's.

python -m scripts.tok_eval --corpus climbmix --vocab-size 32768
"""

import argparse
import subprocess
import sys

from nanochat import paths, runtime
from nanochat.dataset import iter_documents
from nanochat.results import Results
from nanochat.tokenizer import Tokenizer

CORPUS_CHARS = 1_000_000  # of each split
PUBLIC = {"gpt2": "gpt2", "gpt4": "cl100k_base"}  # our name -> tiktoken's
FETCH_SECONDS = 30  # tiktoken downloads an encoding on first use and would wait for ever

NEWS = """\
The town council voted on Tuesday night to reopen the old railway bridge to cyclists and pedestrians, ending a \
dispute that has divided residents for almost a decade. Engineers who inspected the iron structure in March found \
that only two of its nine spans need new supports, at an estimated cost of $1.4 million, about half of what had been \
feared. "We were told that it could never be done," said Mayor Ellen Whitcombe after the 7-2 vote. "It turns out \
nobody had gone and looked." Opponents argued that the money would be better spent on buses. Work is due to begin in \
September and, if the winter is mild, the first riders could cross the river by the end of May. Shopkeepers on the \
north bank, where trade has fallen by a third since the road bridge was narrowed to a single lane, welcomed the \
decision.
"""

CODE = '''import heapq


class Graph:
    """A directed graph with non-negative weights on its edges."""

    def __init__(self):
        self.edges = {}  # node -> list of (neighbour, weight)

    def add_edge(self, source, target, weight=1.0):
        if weight < 0:
            raise ValueError(f"weight {weight} of {source} -> {target} is negative")
        self.edges.setdefault(source, []).append((target, weight))
        self.edges.setdefault(target, [])

    def distances(self, start):
        best, queue = {start: 0.0}, [(0.0, start)]
        while queue:
            distance, node = heapq.heappop(queue)
            if distance > best[node]:
                continue  # an older, longer way
            for neighbour, weight in self.edges[node]:
                if distance + weight < best.get(neighbour, float("inf")):
                    best[neighbour] = distance + weight
                    heapq.heappush(queue, (best[neighbour], neighbour))
        return best
'''

MATHEMATICS = r"""\begin{theorem}
Let $f\colon [a,b] \to \mathbb{R}$ be continuous, and let $F(x) = \int_a^x f(t)\,dt$. Then $F$ is differentiable on
$(a,b)$, and $F'(x) = f(x)$ for every $x \in (a,b)$.
\end{theorem}
\begin{proof}
Fix $x$ and let $\varepsilon > 0$. By continuity there is a $\delta > 0$ with $|f(t) - f(x)| < \varepsilon$ whenever
$|t - x| < \delta$. For $0 < |h| < \delta$ we have
\[
  \left| \frac{F(x+h) - F(x)}{h} - f(x) \right|
  = \left| \frac{1}{h} \int_x^{x+h} \bigl( f(t) - f(x) \bigr)\,dt \right|
  \le \frac{1}{|h|} \cdot |h| \cdot \varepsilon = \varepsilon .
\]
Since $\varepsilon$ was arbitrary, the difference quotient tends to $f(x)$. For example, with $f(t) = 3t^2 + 1$ on
$[0, 2]$ one finds $F(2) = 2^3 + 2 = 10$.
\end{proof}
"""

SCIENCE = """\
Lichens are not single organisms but partnerships: a fungus supplies shelter and minerals, while green algae or \
cyanobacteria living among its threads make sugars by photosynthesis. Because the pair can dry out almost completely \
and resume metabolism within minutes of being wetted, lichens colonise bare rock, desert crusts and Antarctic \
outcrops where mean temperatures stay below -20 °C. Growth is slow, commonly 0.5 to 2 mm per year, and remarkably \
steady in crustose species such as Rhizocarpon geographicum, so that the diameter of the largest thallus on a \
moraine gives an estimate of when the glacier withdrew. Many species lack a cuticle and absorb sulphur dioxide (SO2) \
and nitrogen compounds directly from rain; their disappearance from cities in the nineteenth century was one of the \
earliest recorded biological signals of air pollution.
"""

KOREAN = """\
지난 주말 우리 가족은 기차를 타고 바닷가 마을에 다녀왔다. 아침 일찍 출발했는데도 역에는 벌써 사람이 많았고, 창가 \
자리에 앉은 동생은 도착할 때까지 산과 강과 논을 바라보느라 한마디도 하지 않았다. 마을에는 작은 시장이 있어서 갓 잡은 \
생선과 말린 미역, 직접 담근 된장을 팔고 있었다. 할머니는 오래전에 이곳에서 살았다며 골목마다 얽힌 이야기를 \
들려주셨다. 점심에는 따뜻한 칼국수를 먹고, 오후에는 모래밭을 걸으며 조개껍데기를 주웠다. 저녁이 되자 하늘이 붉게 \
물들었고, 멀리 고기잡이배의 불빛이 하나둘 켜졌다. 집으로 돌아오는 기차에서 모두 잠이 들었지만, 나는 그날 들은 \
이야기를 잊지 않으려고 공책에 적어 두었다. 다음에는 여름에 와서 며칠 더 머물기로 약속했다. 우리가 탄 기차는 밤 열 \
시가 조금 넘어서야 서울에 닿았고, 거리에는 가을비가 조용히 내리고 있었다. 우산이 없어 조금 젖었지만 아무도 불평하지 \
않았다. 이렇게 평범한 하루가 오래 기억에 남을 것 같다.
"""

TEXTS = {"news": NEWS, "code": CODE, "mathematics": MATHEMATICS, "science": SCIENCE, "korean": KOREAN}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="climbmix", help="name of the tokenizer's corpus")
    parser.add_argument("--vocab-size", type=int, default=32768, help="size of its vocabulary")
    parser.add_argument("--device-type", default="cpu", help="taken for uniformity; only the CPU works here")
    return parser.parse_args(argv)


def public_encoders() -> dict:
    """name -> function from text to ids, for the encodings that can be had here; says so when they cannot."""
    import tiktoken

    # In a process of its own, which can be ended: it leaves the files in tiktoken's cache, where they load at once.
    fetch = f"import tiktoken\nfor name in {list(PUBLIC.values())!r}: tiktoken.get_encoding(name)"
    try:
        done = subprocess.run([sys.executable, "-c", fetch], capture_output=True, text=True, timeout=FETCH_SECONDS)
        last_line = done.stderr.strip().rpartition("\n")[2]
        reason = last_line.partition(":")[0] if done.returncode else ""
    except subprocess.TimeoutExpired:
        reason = f"no answer in {FETCH_SECONDS} s"
    if reason:
        print(f"no comparison with GPT-2 and GPT-4: their encodings cannot be downloaded ({reason})")
        return {}
    return {name: tiktoken.get_encoding(theirs).encode_ordinary for name, theirs in PUBLIC.items()}


def measure(texts: dict[str, str], encoders: dict) -> dict:
    """text name -> {"bytes", "tokens": {encoder: count}}"""
    return {
        name: {
            "bytes": len(text.encode("utf-8")),
            "tokens": {encoder: len(encode(text)) for encoder, encode in encoders.items()},
        }
        for name, text in texts.items()
        if text
    }


def print_table(table: dict, encoders: list[str]) -> None:
    print(f"{'text':12s} {'bytes':>9s} " + " ".join(f"{name:>20s}" for name in encoders))
    for name, row in table.items():
        cells = [f"{count:8,} ({row['bytes'] / count:5.2f} B/tok)" for count in row["tokens"].values()]
        print(f"{name:12s} {row['bytes']:9,} " + " ".join(f"{cell:>20s}" for cell in cells))


def main(args):
    machine = runtime.start("cpu")
    name = f"{args.corpus}-{args.vocab_size}"
    try:
        tokenizer = Tokenizer.load(paths.tokenizer_dir(name))
        texts = TEXTS | {
            split: "\n".join(iter_documents(args.corpus, split, CORPUS_CHARS)) for split in ("train", "validation")
        }
    except ValueError as error:
        raise SystemExit(str(error)) from None
    results = Results("tok_eval", name, machine, config=vars(args))
    for kind, text in texts.items():
        if tokenizer.decode(tokenizer.encode(text)) != text:
            raise SystemExit(f"tokenizer {name} does not give the {kind} text back: train it again")
    encoders = {"ours": tokenizer.encode} | public_encoders()
    table = measure(texts, encoders)
    print_table(table, list(encoders))
    results.finish({"tokenizer": name, "vocab_size": tokenizer.vocab_size, "encoders": list(encoders), "texts": table})
    print(f"table: {paths.results_dir(name) / 'tok_eval.json'}")


if __name__ == "__main__":
    main(parse_args())
