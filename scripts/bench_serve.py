"""Many clients at once at the chat server of this machine: does everyone get the answer that is given alone, how long
do they wait, what does the server's memory do. Some hang up, some read slowly. The last line is JSON.

python -m scripts.bench_serve                              # 100 clients for 30 s, the newest fine-tuned model
python -m scripts.bench_serve --max-requests 32            # more clients than places: some are told to come again
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import requests

QUESTIONS = 200  # different ones
HANGS_UP, READS_SLOWLY, STREAMS = 0.05, 0.05, 0.7  # shares of the requests
STUCK_SECONDS = 120  # without a byte
SETTLED = 0.3  # of the time: memory is compared from here on


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clients", type=int, default=100, help="at once")
    add("--seconds", type=float, default=30, help="in which they ask")
    add("--max-tokens", type=int, default=48, help="of an answer")
    add("--max-requests", type=int, default=128, help="places of the server")
    add("-i", "--source", choices=["base", "sft", "rl"], default="sft", help="which stage's model")
    add("-g", "--model-tag", help="which model (default: the largest d<N>)")
    add("--num-gpus", type=int, default=1, help="replicas of the server")
    add("--device-type", default="", help="cuda, cpu or mps (default: the best there is)")
    args = parser.parse_args(argv)
    for name in ("clients", "seconds", "max_tokens", "max_requests"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} is {getattr(args, name)}; expected more than 0")
    return args


@contextlib.contextmanager
def served(args) -> Iterator[tuple[str, int]]:
    """scripts.chat_web as a process of its own, on loopback: (its address, its process id)."""
    command = [sys.executable, "-m", "scripts.chat_web", "--port", "0", "-i", args.source, "-n", str(args.num_gpus)]
    command += ["--max-requests", str(args.max_requests), "--device-type", args.device_type]
    command += ["-g", args.model_tag] if args.model_tag else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as server:
        try:
            address = None
            for line in server.stdout:
                if address := re.search(r"http://\S+?:\d+", line):
                    break
            if address is None:
                raise SystemExit("the server did not start, see above")
            while get(f"{address[0]}/health").status_code != 200:
                time.sleep(0.1)
            yield address[0], server.pid
        finally:
            server.send_signal(signal.SIGINT)
    if server.returncode:
        raise SystemExit(f"the server ended with {server.returncode}")


def get(url: str) -> requests.Response:
    with requests.Session() as session:
        session.trust_env = False  # no proxy between here and here
        return session.get(url, timeout=60)


def resident_megabytes(pid: int) -> float | None:
    """Of the server, where the system tells (Linux)."""
    status = Path(f"/proc/{pid}/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6 if status.exists() else None


class Client:
    """Asks one question after another; what became of each is counted."""

    def __init__(self, number: int, address: str, max_tokens: int):
        self.random = random.Random(number)
        self.session = requests.Session()
        self.session.trust_env = False
        self.url, self.max_tokens = f"{address}/v1/chat/completions", max_tokens
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.wrong: list[tuple[str, str]] = []

    def ask(self, question: str, stream: bool = False, hang_up: bool = False, slowly: bool = False) -> str | None:
        """The answer; None where there is none to compare."""
        body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": self.max_tokens}
        began = time.perf_counter()
        with self.session.post(
            self.url, json={**body, "stream": stream}, stream=True, timeout=STUCK_SECONDS
        ) as response:
            if response.status_code == 429:
                self.counts["refused"] += 1
                time.sleep(float(response.headers["Retry-After"]) * self.random.uniform(0.5, 1))
                return None
            response.raise_for_status()
            if not stream:
                text = response.json()["choices"][0]["message"]["content"]
            else:
                text = self.read(response, began, hang_up, slowly)
        if text is not None:
            self.counts["answers"] += 1
            self.seconds.append(time.perf_counter() - began)
        return text

    def read(self, response, began: float, hang_up: bool, slowly: bool) -> str | None:
        text, ended = "", False
        for line in response.iter_lines(decode_unicode=True):
            if not line:
                continue
            if line == "data: [DONE]":
                ended = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            if not text:
                self.first.append(time.perf_counter() - began)
            text += chunk["choices"][0]["delta"].get("content") or ""
            if hang_up:
                self.counts["hung up"] += 1
                return None
            if slowly:
                time.sleep(0.05)
        if not ended:
            raise ValueError("the stream ended before its answer did")
        return text

    def run(self, expected: dict[str, str], until: float) -> None:
        while time.monotonic() < until:
            question = self.random.choice(list(expected))
            stream = self.random.random() < STREAMS
            hang_up, slowly = (stream and self.random.random() < share for share in (HANGS_UP, READS_SLOWLY))
            try:
                text = self.ask(question, stream, hang_up, slowly)
            except requests.Timeout:
                self.counts["stuck"] += 1
            except (requests.RequestException, ValueError) as error:
                self.counts["failed"] += 1
                self.wrong.append((question, f"{type(error).__name__}: {error}"))
            else:
                if text is not None and text != expected[question]:
                    self.counts["wrong"] += 1
                    self.wrong.append((question, text))


def load(address: str, pid: int, clients: int, seconds: float, max_tokens: int) -> dict:
    """What became of the clients' requests."""
    names = random.Random(0)
    questions = [f"What is {names.randrange(10, 999)} + {names.randrange(10, 999)}?" for _ in range(QUESTIONS)]
    alone = Client(-1, address, max_tokens)
    expected = {question: alone.ask(question) for question in questions}
    everyone = [Client(number, address, max_tokens) for number in range(clients)]
    began = time.monotonic()
    threads = [threading.Thread(target=one.run, args=(expected, began + seconds)) for one in everyone]
    for thread in threads:
        thread.start()
    memory = []
    while time.monotonic() < began + seconds:
        time.sleep(min(1.0, seconds / 10))
        memory.append(resident_megabytes(pid))
    for thread in threads:
        thread.join()
    took = time.monotonic() - began
    counts = sum((one.counts for one in everyone), Counter())
    waits = [wait for one in everyone for wait in one.seconds]
    firsts = [first for one in everyone for first in one.first]
    settled = memory[int(SETTLED * len(memory)) :]
    for question, said in [pair for one in everyone for pair in one.wrong][:5]:
        print(f"  {question!r}: {said!r}, alone {expected[question]!r}")
    return {
        "answers": counts["answers"],
        "wrong": counts["wrong"],
        "failed": counts["failed"],
        "stuck": counts["stuck"],
        "refused": counts["refused"],
        "hung_up": counts["hung up"],
        "answers_per_second": round(counts["answers"] / took, 1),
        "seconds_median": round(statistics.median(waits), 3) if waits else None,
        "seconds_longest": round(max(waits), 3) if waits else None,
        "first_token_median": round(statistics.median(firsts), 3) if firsts else None,
        "megabytes": [round(settled[0]), round(settled[-1])] if settled and settled[0] else None,
        "alone_seconds_median": round(statistics.median(alone.seconds), 3),
        "different_answers": len(set(expected.values())),
    }


def main(args) -> None:
    with served(args) as (address, pid):
        print(f"{args.clients} clients ask {address} for {args.seconds:g} s", flush=True)
        found = load(address, pid, args.clients, args.seconds, args.max_tokens)
        workers = get(f"{address}/stats").json()["workers"]
    left = sum(worker["open"] for worker in workers)
    settings = {"clients": args.clients, "seconds": args.seconds, "places": args.max_requests * args.num_gpus}
    print(json.dumps({**found, "left_open": left, "tokens": sum(worker["tokens"] for worker in workers), **settings}))


if __name__ == "__main__":
    main(parse_args())
