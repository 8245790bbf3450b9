"""A server in a process of its own, for tests and for the soak in benchmarks."""

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'REFUSE' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@dataclass
class Running:
    """A server that listens."""

    process: subprocess.Popen[str]
    address: str

    def raw(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> tuple[int, Any]:
        """Status and decoded body of a request that no client library would send."""
        place = urlsplit(self.address)
        assert place.hostname
        connection = http.client.HTTPConnection(place.hostname, place.port, timeout=60)
        try:
            connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text else None
        finally:
            connection.close()

    def post(self, path: str, body: object, **headers: str) -> tuple[int, Any]:
        """The same, of a JSON body with the key of the tests."""
        return self.raw(
            "POST",
            path,
            json.dumps(body),
            **{"Content_Type": "application/json", "Authorization": "Bearer secret"} | headers,
        )

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str, str]:
        """Exit status, stdout and what came on stderr since it listened."""
        self.process.send_signal(number)
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def stop_later(self, stack: ExitStack) -> None:
        """When the stack is left the server must end by Ctrl-C, without a word of trouble."""

        def end() -> None:
            status, _, err = self.stop()
            assert status == 0, err

        stack.callback(end)


def chatty(packed: Path, out: Path) -> Path:
    """A copy with a chat template."""
    shutil.copytree(packed, out)
    (out / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return out


@contextmanager
def started(directory: Path, *options: str) -> Iterator[Running]:
    """A server on a free port."""
    command = [sys.executable, "-m", "moeq.cli", "serve", str(directory), *options]
    if "--port" not in options:
        command += ["--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    try:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if " answers at " in line:
                yield Running(process, line.split(" answers at ")[1].split("/v1")[0])
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()
