"""Serves a model through OpenAI's interface: loads it, listens until it is told to stop."""

import contextlib
import importlib
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

from moeq.arch.gguf_source import open_source
from moeq.errors import OptionError
from moeq.runtime.ahead import Told
from moeq.runtime.load import load_any, load_tokenizer
from moeq.serve.engine import Engine

LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeReport:
    """What a server did; field names are those of the JSON document (docs/json.md)."""

    model: str
    name: str
    address: str
    answers: int
    tokens: int
    seconds: float


def run(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    key: str | None = None,
    max_new_tokens: int = 4096,
    running: int = 8,
    waiting: int = 64,
    device: str = "auto",
    trust_remote_code: bool = False,
    compiled: Told | None = None,
    listening: Callable[[str, str], None] | None = None,
    requests: bool = False,
) -> ServeReport:
    """Serve a model until SIGINT or SIGTERM. It needs the extra `serve`.

    Args:
        model: packed checkpoint, or any causal model that transformers loads.
        host: address to listen on; beyond this machine only with a key.
        port: 0 takes a free one.
        name: what the model is called; the directory's name by default.
        key: what requests must bring as a bearer token.
        max_new_tokens: of one answer at most.
        running: answers that are made in turns.
        waiting: answers that are made or wait at most.
        device: where to compute.
        trust_remote_code: code in the directory may run.
        compiled: told of kernels that are compiled for a GPU.
        listening: told the address and the model's name when requests are taken.
        requests: log each of them.

    Raises:
        OptionError: an address that cannot be listened on, a number that makes no sense, or packages that are missing.
        CheckpointError, PackedError: the model cannot be loaded.
    """
    for option, value in (("max-new-tokens", max_new_tokens), ("running", running), ("waiting", waiting)):
        if value < 1:
            raise OptionError(f"{value} is too small", option=option, fix="give at least 1")
    if key == "" or (key is None and host not in LOOPBACK):
        raise OptionError(f"everybody who reaches {host} could use it", option="api-key", fix="give --api-key")
    app, server = _web()
    directory = open_source(model)
    called = name or directory.resolve().name
    with contextlib.closing(_place(host, port)) as place:
        tokenizer = load_tokenizer(directory, trust_remote_code=trust_remote_code)
        loaded = load_any(
            directory, device, exact_activations=None, trust_remote_code=trust_remote_code, compiled=compiled
        )
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{place.getsockname()[1]}"
        limits = app.Limits(
            key=key,
            hosts=LOCAL_NAMES if host in LOOPBACK else None,
            max_new_tokens=max_new_tokens,
            waiting=waiting,
        )
        started = time.monotonic()

        def ready() -> None:
            if listening is not None:
                listening(address, called)

        with Engine(loaded, tokenizer, running=running) as engine:
            server.Server(app.build_app(engine, called, limits), ready, engine.stop, requests=requests).run([place])
        return ServeReport(
            model=str(directory),
            name=called,
            address=address,
            answers=engine.answers,
            tokens=engine.tokens,
            seconds=time.monotonic() - started,
        )


def _web() -> tuple[ModuleType, ModuleType]:
    """What speaks HTTP, which needs packages that not everybody has."""
    try:
        return importlib.import_module("moeq.serve.app"), importlib.import_module("moeq.serve.server")
    except ImportError as error:
        fix = "pip install 'moeq[serve]'"
        raise OptionError(f"serving needs a package that is missing: {error.name}", fix=fix) from error


def _place(host: str, port: int) -> socket.socket:
    """A socket before the model is loaded: nobody waits for a model to hear that a port is taken."""
    if not 0 <= port < 1 << 16:
        raise OptionError(f"{port} is no port", option="port", fix="give 1 to 65535, or 0 for a free one")
    place = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        place.bind((host, port))
    except OSError as error:
        place.close()
        reason = error.strerror or error
        raise OptionError(f"cannot listen on {host}:{port}: {reason}", option="port", fix="give another") from error
    return place
