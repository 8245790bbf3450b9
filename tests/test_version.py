import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import moeq

CHANGELOG = Path(__file__).parent.parent / "CHANGELOG.md"


def test_the_newest_entry_of_the_changelog_is_this_version() -> None:
    found = re.findall(r"^## (\S+)", CHANGELOG.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found[0] == moeq.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", moeq.__version__)
    numbers = [tuple(map(int, text.split("."))) for text in found]
    assert numbers == sorted(numbers, reverse=True)


def test_the_installed_package_is_this_version() -> None:
    try:
        installed = version("moeq")
    except PackageNotFoundError:
        pytest.skip("moeq is not installed")
    assert installed == moeq.__version__
