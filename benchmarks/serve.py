"""A server under load for a while: mixed requests, clients that hang up, bad bodies. Looks for leaks, hangs and faults.

    python benchmarks/serve.py MODEL --minutes 30 --output benchmarks/serve.md

MODEL is a packed checkpoint; a chat template is added to a copy of it if it has none.
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from moeq.report.tables import markdown_table
from serving import Running, chatty, started

CLIENTS = 12
WORDS = ("the", "old", "man", "looked", "at", "the", "sea", "and", "said", "nothing", "had", "ever", "been", "young")
BAD = (
    "{",
    "[]",
    '{"prompt": 3}',
    '{"prompt": "a", "temperature": -1}',
    '{"prompt": "a", "nonsense": true}',
    '{"messages": []}',
    '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
    "\x00\xff" * 100,
    json.dumps({"prompt": "x " * 5000}),
)


class Load:
    """Clients of one server, and what they met."""

    def __init__(self, server: Running, seconds: float) -> None:
        self.server, self.end = server, time.monotonic() + seconds
        self.outcomes: Counter[str] = Counter()
        self.first: dict[str, list[float]] = defaultdict(list)
        self.tokens = 0
        self.client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0, timeout=120)

    def run(self, seed: int) -> None:
        choose = random.Random(seed)
        while time.monotonic() < self.end:
            kind = choose.choice((self.stream, self.stream, self.whole, self.chat, self.leave, self.bad, self.many))
            try:
                kind(choose)
            except openai.RateLimitError:
                self.outcomes["429, too many waiting"] += 1
                time.sleep(choose.random())
            except openai.APIStatusError as error:
                self.outcomes[f"status {error.status_code}: {str(error)[:80]}"] += 1
            except openai.APIError as error:
                self.outcomes[f"{type(error).__name__}: {str(error)[:80]}"] += 1

    def text(self, choose: random.Random) -> str:
        return " ".join(choose.choices(WORDS, k=choose.choice((1, 8, 60, 300))))

    def stream(self, choose: random.Random) -> None:
        begun = time.monotonic()
        parts = self.client.completions.create(
            model="",
            prompt=self.text(choose),
            max_tokens=choose.randint(1, 60),
            stream=True,
            logprobs=choose.choice((None, 3)),
        )
        next(iter(parts))
        self.first["streamed completion"].append(time.monotonic() - begun)
        for _ in parts:
            pass
        self.outcomes["200, streamed completion"] += 1

    def whole(self, choose: random.Random) -> None:
        made = self.client.completions.create(
            model="",
            prompt=self.text(choose),
            max_tokens=choose.randint(1, 40),
            stop=["and"],
            echo=choose.random() < 0.3,
        )
        assert made.usage is not None
        self.tokens += made.usage.completion_tokens
        self.outcomes["200, completion"] += 1

    def chat(self, choose: random.Random) -> None:
        said: list[dict[str, str]] = []
        for _ in range(choose.randint(1, 3)):
            said.append({"role": "user", "content": self.text(choose)})
            made = self.client.chat.completions.create(
                model="", messages=said, max_tokens=20, seed=choose.randint(0, 9)
            )  # type: ignore[arg-type]
            said.append({"role": "assistant", "content": made.choices[0].message.content or ""})
        self.outcomes["200, conversation"] += 1

    def many(self, choose: random.Random) -> None:
        made = self.client.completions.create(model="", prompt=[self.text(choose)] * 2, n=2, max_tokens=10, logprobs=1)
        assert len(made.choices) == 4
        self.outcomes["200, four answers at once"] += 1

    def leave(self, choose: random.Random) -> None:
        stream = self.client.completions.create(model="", prompt=self.text(choose), max_tokens=500, stream=True)
        for _, _ in zip(range(choose.randint(0, 5)), stream, strict=False):
            pass
        stream.close()
        self.outcomes["hung up in the middle"] += 1

    def bad(self, choose: random.Random) -> None:
        path = choose.choice(("/v1/completions", "/v1/chat/completions"))
        body = choose.choice(BAD)
        status, _ = self.server.raw(
            "POST", path, body.encode("latin-1"), Content_Type="application/json", Authorization="Bearer secret"
        )
        self.outcomes[f"{status}, bad body"] += 1


def facts(process: int) -> tuple[int, int, int]:
    """Resident bytes, threads and open files of the server."""
    status = Path(f"/proc/{process}/status").read_text()
    words = {line.split(":")[0]: line.split()[1] for line in status.splitlines() if len(line.split()) > 1}
    return int(words["VmRSS"]) * 1024, int(words["Threads"]), len(list(Path(f"/proc/{process}/fd").iterdir()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        directory = chatty(args.model, Path(scratch) / args.model.name)
        with started(directory, "--api-key", "secret", "--waiting", "24") as server:
            text = soak(server, args)
    print(text)
    if args.output:
        args.output.write_text(text)


def soak(server: Running, args: argparse.Namespace) -> str:
    load = Load(server, args.minutes * 60)
    threads = [threading.Thread(target=load.run, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    rows, begun, every = [], time.monotonic(), max(args.minutes * 60 / 10, 5)
    while any(thread.is_alive() for thread in threads):
        rss, count, files = facts(server.process.pid)
        asked = sum(load.outcomes.values())
        rows.append(
            (f"{(time.monotonic() - begun) / 60:.1f}", f"{rss / 2**20:.0f}", str(count), str(files), f"{asked:,}")
        )
        print(*rows[-1], file=sys.stderr, flush=True)
        time.sleep(every)
    for _ in range(200):
        left = server.raw("GET", "/health")[1]["answers"]
        if not left:
            break
        time.sleep(0.05)
    rss, count, files = facts(server.process.pid)
    rows.append(("after", f"{rss / 2**20:.0f}", str(count), str(files), f"{sum(load.outcomes.values()):,}"))
    status, _, err = server.stop()
    outcomes = markdown_table(("outcome", "requests"), [(name, f"{n:,}") for name, n in sorted(load.outcomes.items())])
    table = markdown_table(("minutes", "resident MiB", "threads", "open files", "requests so far"), rows)
    first = load.first["streamed completion"]
    return (
        f"# A server under load\n\n`python benchmarks/serve.py {args.model.name} --minutes {args.minutes:g}`: "
        f"{CLIENTS} clients that ask all the time, 8 answers in turns, 24 waiting at most, one CPU thread.\n\n"
        f"{outcomes}\n\nAnswers left in the engine afterwards: {left}. Exit status after SIGINT: {status}; on stderr: "
        f"{len(err.strip().splitlines())} lines. First piece of a streamed answer: median "
        f"{statistics.median(first):.2f} s, longest {max(first):.2f} s.\n\n{table}\n"
    )


if __name__ == "__main__":
    main()
