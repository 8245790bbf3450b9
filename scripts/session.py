"""Types a session into a real terminal (tmux) at 80 and at 40 columns and keeps what is seen in docs/session.md.

    python scripts/session.py --bin .venv/bin

Needs tmux, Chromium and playwright. Look at the result before it is committed: that is what it is for.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "session"
MODEL = ROOT / "assets" / "demo-qwen3moe-4m"
CHANGED = "## What was changed because of it"
"""What people write below this line stays."""
PATIENCE = 300
"""Seconds for a command."""


class Terminal:
    """A shell in tmux, in a directory of its own."""

    def __init__(self, columns: int, directory: Path, programs: Path) -> None:
        self.columns, self.name = columns, f"session-{columns}"
        self.frames: list[tuple[str, str]] = []
        words = ["new-session", "-d", "-s", self.name, "-x", str(columns), "-y", "36", "-c", str(directory)]
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        subprocess.run(["tmux", *words, "bash --norc --noprofile"], check=True, env=environment)

    def tmux(self, *words: str) -> str:
        """What a command of tmux about this terminal prints."""
        return subprocess.run(
            ["tmux", words[0], "-t", self.name, *words[1:]], check=True, capture_output=True, text=True
        ).stdout

    def type(self, line: str) -> None:
        """Type a line."""
        self.tmux("send-keys", "-l", line)
        self.tmux("send-keys", "Enter")

    def screen(self) -> str:
        """What is seen, without colours."""
        return self.tmux("capture-pane", "-p").rstrip()

    def until(self, good: Callable[[str], bool], title: str) -> None:
        """Wait for something to be seen, then keep the picture.

        Raises:
            TimeoutError: it did not come.
        """
        begun = time.monotonic()
        while not good(self.screen()):
            if time.monotonic() - begun > PATIENCE:
                raise TimeoutError(f"{title}:\n{self.screen()}")
            time.sleep(0.2)
        self.keep(title)

    def keep(self, title: str) -> None:
        """Keep what is seen now."""
        self.frames.append((title, self.tmux("capture-pane", "-p", "-e").rstrip()))

    def close(self) -> None:
        """End the shell."""
        self.tmux("kill-session")


def idle(screen: str) -> bool:
    """The shell waits for a command."""
    return screen.splitlines()[-1:] == ["$"]


def played(columns: int, directory: Path, programs: Path) -> list[tuple[str, str]]:
    """(what it shows, what was seen with colours) of a session."""
    terminal = Terminal(columns, directory, programs)
    out = f"small-{columns}"
    try:
        terminal.type("PS1='$ '; clear")
        terminal.until(idle, "an empty terminal")
        terminal.frames.clear()
        terminal.type(f"moeq quantize model {out} --bits 2.5 --effort fast")
        for phase in ("measuring blocks", "packing blocks"):
            terminal.until(lambda screen, phase=phase: phase in screen, phase)
        terminal.until(idle, "packed")
        terminal.type("clear; moeq quantise")
        terminal.until(idle, "a misspelt verb")
        terminal.type(f"clear; moeq run {out} --seed 1 --max-new-tokens 40")
        terminal.until(lambda screen: screen.endswith(">"), "before the first word")
        terminal.type("The old man looked at the sea and")
        terminal.until(lambda screen: "tokens/s" in screen and screen.endswith(">"), "an answer")
        terminal.tmux("send-keys", "C-d")
        terminal.until(idle, "the end of the talk")
        terminal.type(f"clear; moeq report {out} -o {out}.html")
        terminal.until(idle, "the report is written")
    finally:
        terminal.close()
    return terminal.frames


def drawn(browser: Browser, seen: str, columns: int, out: Path) -> None:
    """A picture of a terminal."""
    console = Console(record=True, width=columns, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(Text.from_ansi(seen), soft_wrap=True)
    page = browser.new_page(viewport={"width": columns * 9 + 40, "height": 100})
    page.set_content(console.export_html(inline_styles=True).replace("<body", '<body style="background:#fff"'))
    page.screenshot(path=str(out), full_page=True)
    page.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=Path, default=Path(sys.executable).parent, help="where moeq lies")
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    args = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    lines = [
        "# A session",
        "",
        f"Typed by `python scripts/session.py` into tmux, {time.strftime('%d %B %Y')}; `model` is the bundled one.",
        "",
    ]
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        directory = Path(scratch)
        (directory / "model").symlink_to(MODEL)
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for columns in (80, 40):
            lines += [f"## {columns} columns", ""]
            for title, seen in played(columns, directory, args.bin.absolute()):
                lines += [
                    f"{title[0].upper()}{title[1:]}:",
                    "",
                    "```text",
                    Text.from_ansi(seen).plain.rstrip().replace(scratch, "~"),
                    "```",
                    "",
                ]
                if title in ("packing blocks", "an answer"):
                    picture = PICTURES / f"{title.replace(' ', '-')}-{columns}.png"
                    drawn(browser, seen, columns, picture)
                    lines += [f"![{title} at {columns} columns]({picture.relative_to(ROOT / 'docs')})", ""]
        lines += ["## The report", ""]
        for width, scheme in ((1100, "light"), (400, "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
            page.goto((directory / "small-80.html").as_uri())
            page.wait_for_selector("body[data-ready=yes]")
            page.screenshot(path=str(PICTURES / f"report-{width}.png"))
            page.close()
            lines += [f"![the report, {width} pixels wide, {scheme}](session/report-{width}.png)", ""]
        browser.close()
    page = ROOT / "docs" / "session.md"
    _, mark, kept = page.read_text(encoding="utf-8").partition(CHANGED) if page.exists() else ("", "", "")
    lines += [f"{mark}{kept}".rstrip(), ""]
    page.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
