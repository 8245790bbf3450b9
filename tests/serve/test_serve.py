"""`moeq serve`, a process of its own, through the official client of OpenAI."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from moeq.errors import OptionError
from moeq.runtime.load import load_any, load_tokenizer
from moeq.stages import serve as serve_stage
from often import nightly
from serving import Running, chatty, started

PROMPT = "The old man looked at the sea and"
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who are you?"}]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def directory(packed_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return chatty(packed_demo, tmp_path_factory.mktemp("serve") / "demo")


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[Running]:
    with started(directory, "--api-key", "secret", "--waiting", "6", "--max-new-tokens", "600") as running:
        yield running
        assert running.process.poll() is None  # whatever was asked, it lives


@pytest.fixture(scope="module")
def client(server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.address}/v1", api_key="secret", max_retries=0)


@pytest.fixture(scope="module")
def wanted(directory: Path) -> dict[str, str]:
    """What transformers' generate answers greedily to the prompt and to the messages."""
    tokenizer, model = load_tokenizer(directory), load_any(directory, "cpu", exact_activations=None)
    chat = "system: Be brief.\nuser: Who are you?\nassistant:"
    found = {}
    for text in (PROMPT, chat):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        found[text] = tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    return {"text": found[PROMPT], "chat": found[chat]}


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, client.models.retrieve("demo").id) == ("demo", "demo")
    with pytest.raises(openai.NotFoundError, match="it is 'demo'"):
        client.models.retrieve("gpt-4")


def test_chat(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    made = client.chat.completions.create(model="demo", messages=MESSAGES, temperature=0, max_completion_tokens=12)
    (choice,) = made.choices
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (
        wanted["chat"],
        "assistant",
        "length",
    )
    assert made.usage is not None
    assert made.usage.completion_tokens == 12
    assert made.usage.total_tokens == made.usage.prompt_tokens + 12


def test_chat_streams(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    stream = client.chat.completions.create(
        model="demo",
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=3,
    )
    *parts, last = list(stream)
    texts = [part.choices[0].delta.content for part in parts if part.choices[0].delta.content]
    assert "".join(texts) == wanted["chat"]
    assert len(texts) > 4
    assert parts[0].choices[0].delta.role == "assistant"
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    facts = [fact for part in parts if part.choices[0].logprobs for fact in part.choices[0].logprobs.content or ()]
    assert len(facts) == 12
    assert all(len(fact.top_logprobs) == 3 and fact.logprob == fact.top_logprobs[0].logprob <= 0 for fact in facts)
    assert (last.choices, last.usage and last.usage.completion_tokens) == ([], 12)


def test_completions(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    made = client.completions.create(
        model="demo", prompt=[PROMPT, "In the beginning"], temperature=0, max_tokens=12, logprobs=2, n=2, seed=3
    )
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert made.choices[0].text == made.choices[1].text == wanted["text"]
    assert made.choices[2].text == made.choices[3].text != wanted["text"]
    logprobs = made.choices[0].logprobs
    assert logprobs is not None
    assert "".join(logprobs.tokens or ()) == wanted["text"]
    assert (
        len(logprobs.top_logprobs or ()) == len(logprobs.token_logprobs or ()) == len(logprobs.text_offset or ()) == 12
    )


def test_completions_stream(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    stream = client.completions.create(
        model="demo", prompt=PROMPT, temperature=0, max_tokens=12, stream=True, echo=True
    )
    parts = list(stream)
    assert "".join(part.choices[0].text for part in parts) == PROMPT + wanted["text"]
    assert parts[-1].choices[0].finish_reason == "length"


def test_the_prompt_is_measured(client: openai.OpenAI, directory: Path) -> None:
    """As evaluation harnesses ask."""
    ids = load_tokenizer(directory)(PROMPT)["input_ids"]
    made = client.completions.create(model="demo", prompt=[ids], max_tokens=0, logprobs=1, echo=True)
    (choice,) = made.choices
    assert choice.logprobs is not None
    assert choice.text == "".join(choice.logprobs.tokens or ()) == PROMPT
    values: list[Any] = list(choice.logprobs.token_logprobs or ())
    model = load_any(directory, "cpu", exact_activations=None)
    with torch.inference_mode():
        logs_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    right = [float(row_V[token]) for row_V, token in zip(logs_TV, ids[1:], strict=False)]
    assert values == [None, *(pytest.approx(value, abs=0.02) for value in right)]


def test_seeds_and_stops(client: openai.OpenAI, wanted: dict[str, str]) -> None:
    def text(**more: Any) -> str:
        return client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, **more).choices[0].text

    assert text(seed=7) == text(seed=7)
    assert len({text(seed=seed) for seed in (1, 2, 3)}) > 1
    assert len({text() for _ in range(3)}) > 1
    stop = wanted["text"][9:14]
    made = client.completions.create(model="demo", prompt=PROMPT, max_tokens=24, temperature=0, stop=["@@", stop])
    assert (made.choices[0].text, made.choices[0].finish_reason) == (wanted["text"].partition(stop)[0], "stop")


BAD = {
    "no JSON": (COMPLETIONS, "{", "JSON"),
    "a list": (COMPLETIONS, "[]", "dictionary"),
    "no prompt": (COMPLETIONS, {}, "prompt: Field required"),
    "empty prompt": (COMPLETIONS, {"prompt": ""}, "no tokens"),
    "no prompts": (COMPLETIONS, {"prompt": []}, "no prompt"),
    "unknown token": (COMPLETIONS, {"prompt": [1, 99999]}, "not below 4096"),
    "long prompt": (COMPLETIONS, {"prompt": [5] * 3000}, "3000 tokens are more"),
    "misspelt": (COMPLETIONS, {"prompt": "a", "temprature": 1}, "temprature: there is no such parameter"),
    "hot": (COMPLETIONS, {"prompt": "a", "temperature": 9}, "temperature"),
    "biased": (COMPLETIONS, {"prompt": "a", "logit_bias": {"99999": 1}}, "not below 4096"),
    "nan": (COMPLETIONS, '{"prompt": "a", "temperature": NaN}', "temperature"),
    "many": (COMPLETIONS, {"prompt": ["a"] * 7}, "7 answers at once"),
    "no messages": (CHAT, {"messages": []}, "messages"),
    "a picture": (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
    "tools": (CHAT, {"messages": MESSAGES, "tools": [{"type": "function"}]}, "tools"),
    "schema": (CHAT, {"messages": MESSAGES, "response_format": {"type": "json_object"}}, "response_format"),
    "refused": (CHAT, {"messages": [{"role": "user", "content": "REFUSE"}]}, "template refuses"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bodies(server: Running, name: str) -> None:
    path, body, words = BAD[name]
    if isinstance(body, str):
        status, found = server.raw("POST", path, body, Content_Type="application/json", Authorization="Bearer secret")
    else:
        status, found = server.post(path, body)
    assert status == 400
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert words in found["error"]["message"]


def test_who_may_ask(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 1}
    assert server.post(COMPLETIONS, body)[0] == 200
    assert server.post(COMPLETIONS, body, Authorization="Bearer wrong")[0] == 401
    assert server.raw("GET", "/v1/models")[0] == 401
    assert server.raw("GET", "/health") == (200, {"status": "ok", "answers": 0})
    assert server.post(COMPLETIONS, body, Content_Type="text/plain")[0] == 415
    assert server.post(COMPLETIONS, body, Host="evil.example")[0] == 400
    assert server.post(COMPLETIONS, {"prompt": "a" * (5 << 20)})[0] == 413
    assert server.post("/v1/nothing", body)[0] == 404
    assert server.raw("DELETE", COMPLETIONS, Authorization="Bearer secret")[0] == 405


def test_too_many_wait(server: Running, client: openai.OpenAI) -> None:
    def ask(number: int) -> str:
        try:
            client.completions.create(model="demo", prompt=PROMPT, max_tokens=100, seed=number, logit_bias={"0": -100})
        except openai.RateLimitError as error:
            return f"refused, {error.response.headers['Retry-After']} s"
        return "answered"

    with ThreadPoolExecutor(20) as pool:
        results = list(pool.map(ask, range(20)))
    assert set(results) == {"answered", "refused, 1 s"}
    assert _idle(server)


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_is_not_answered(server: Running, stream: bool) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 600, "stream": stream, "logit_bias": {"0": -100}})
    place = socket.create_connection(("127.0.0.1", int(server.address.rpartition(":")[2])))
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer secret\r\n"
    place.sendall(f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    begun = time.monotonic()
    while server.raw("GET", "/health")[1]["answers"] == 0:
        assert time.monotonic() - begun < 30
    place.close()
    whole = time.monotonic()
    assert _idle(server)
    assert time.monotonic() - whole < 2  # 600 tokens would take longer


def test_prompts_of_any_length_leave_nothing(directory: Path) -> None:
    """torch kept code for a thousand shapes, two MiB for every length: 244 MiB here."""
    with started(directory, "--api-key", "secret") as running:

        def ask(length: int) -> int:
            body = {"prompt": [(7 * length + at * at) % 500 for at in range(length)], "max_tokens": 1}
            assert running.post(COMPLETIONS, body)[0] == 200
            status = Path(f"/proc/{running.process.pid}/status").read_text()
            return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024

        sizes = [ask(length) for length in range(1, 250, 2)]
        assert sizes[-1] - sizes[25] < 80  # a heap with holes


def _idle(server: Running) -> bool:
    for _ in range(100):
        if server.raw("GET", "/health")[1]["answers"] == 0:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGINT, nightly(signal.SIGTERM)])
def test_it_stops_when_told(packed_demo: Path, number: int) -> None:
    """In the middle of an answer; without a template, a key, or bearer tokens."""
    with started(packed_demo, "--json") as running:
        host = running.address.replace("127.0.0.1", "localhost")
        client = openai.OpenAI(base_url=f"{host}/v1", api_key="whatever", max_retries=0)
        with pytest.raises(openai.BadRequestError, match="no chat template"):
            client.chat.completions.create(model="", messages=MESSAGES)
        stream = client.completions.create(
            model=packed_demo.name, prompt=PROMPT, max_tokens=2000, stream=True, logit_bias={"0": -100}
        )
        next(iter(stream))
        left: list[str] = []

        def read() -> None:
            try:
                left.extend(part.choices[0].text for part in stream)
            except openai.APIError as error:
                left.append(str(error))

        reading = threading.Thread(target=read)
        reading.start()
        begun = time.monotonic()
        status, out, err = running.stop(number)
        assert status == 0, err
        assert time.monotonic() - begun < 20
        assert "Traceback" not in err
        report = json.loads(out)
        assert (report["verb"], report["name"], report["answers"]) == ("serve", packed_demo.name, 1)
        reading.join()
        assert left[-1] == "the server is shutting down"


def test_wrong_options(packed_demo: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="everybody who reaches"):
        serve_stage.run(packed_demo, host="0.0.0.0")
    with pytest.raises(OptionError, match="is no port"):
        serve_stage.run(packed_demo, port=70000)
    with pytest.raises(OptionError, match="too small"):
        serve_stage.run(packed_demo, running=0)
    with pytest.raises(OptionError, match="cannot listen on"):
        serve_stage.run(packed_demo, host="192.0.2.1", key="k")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OptionError, match="in use"):
        serve_stage.run(packed_demo, port=taken.getsockname()[1])
