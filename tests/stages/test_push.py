"""Uploads: what would be put on the hub, and the hub's own client against a server that answers as the hub does."""

import base64
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from moeq import cli
from moeq.errors import OptionError, PackedError
from moeq.stages import push


def test_what_would_be_put_there(packed_demo: Path) -> None:
    report = push.run(packed_demo, "me/demo-3bit")
    assert (report.uploaded, report.url, report.private) == (False, "", True)
    assert {"README.md", "config.json", "moeq.json", "moeq_hook.py", "tokenizer.json"} <= set(report.files)
    assert report.total_bytes == sum((packed_demo / name).stat().st_size for name in report.files)
    assert any("base_model" in warning for warning in report.warnings)


def test_what_is_refused(packed_demo: Path, demo_dir: Path, tmp_path: Path) -> None:
    for name in ("demo", "me/", "me/a/b", "me/a b"):
        with pytest.raises(OptionError, match="owner/name"):
            push.run(packed_demo, name)
    with pytest.raises(PackedError):
        push.run(demo_dir, "me/demo")
    damaged = tmp_path / "damaged"
    shutil.copytree(packed_demo, damaged)
    weights = next(damaged.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(PackedError):
        push.run(damaged, "me/demo")
    broken = tmp_path / "broken"
    shutil.copytree(packed_demo, broken)
    (broken / "README.md").write_text("---\ntags: [1\n---\n")
    with pytest.raises(PackedError, match="README"):
        push.run(broken, "me/demo")


def test_the_command_says_what_it_would_do(packed_demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["push", str(packed_demo), "me/demo"]) == 0
    out = capsys.readouterr().out
    assert "would put" in out
    assert "--yes does it" in out


class Hub(BaseHTTPRequestHandler):
    """Takes what the client sends: small files inside commits, as its answer to "preupload" asks for."""

    commits: list[dict[str, Any]]

    def _answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr."""

    def do_GET(self) -> None:
        """Facts of the repository."""
        self._answer({"id": "me/demo", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        """The steps of an upload."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        host = f"http://{self.headers['Host']}"
        if self.path.endswith("/validate-yaml"):
            bad = "pipeline_tag" not in json.loads(body)["content"]
            self._answer({"errors": [], "warnings": []}, 400 if bad else 200)
        elif self.path.endswith("/repos/create"):
            self.commits.append({"created": json.loads(body)})
            self._answer({"url": f"{host}/me/demo", "id": "me/demo", "name": "demo"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            wanted = [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in files]
            self._answer({"files": wanted})
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.decode().splitlines() if line]
            self.commits.append({line["value"]["path"]: line["value"] for line in lines if line["key"] == "file"})
            self._answer({"commitUrl": f"{host}/me/demo/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self._answer({"error": self.path}, 404)


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a hub."""
    Hub.commits = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _push(packed: Path, hub: str, tmp_path: Path, token: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from moeq_cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {
        "HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    words = [sys.executable, "-c", script, "push", str(packed), "me/demo", "--yes", "--json"]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=120)


def test_an_upload(packed_demo: Path, hub: str, tmp_path: Path) -> None:
    done = _push(packed_demo, hub, tmp_path, "hf_x")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["uploaded"] is True
    assert report["url"].endswith("/commit/1")
    created = Hub.commits[0]["created"]
    assert created.get("private") is True or created.get("visibility") == "private", created
    sent = {path: value for commit in Hub.commits[1:] for path, value in commit.items()}
    assert set(sent) == set(report["files"])
    for name, value in sent.items():
        assert base64.b64decode(value["content"]) == (packed_demo / name).read_bytes(), name


@pytest.mark.nightly
def test_a_hub_that_refuses(packed_demo: Path, tmp_path: Path) -> None:
    done = _push(packed_demo, "http://127.0.0.1:9", tmp_path, "hf_x")
    assert done.returncode == 1
    document = json.loads(done.stdout)
    assert document["error"] == "OutputError"
    assert "the hub refuses" in document["message"]
    assert "hf auth login" in document["message"]
