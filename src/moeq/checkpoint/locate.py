"""Where the files of a checkpoint are: its directory, its config, its index, and every tensor that they list."""

import json
import re
from pathlib import Path
from typing import Any, Final

from moeq.checkpoint.header import parse_json_object, read_header, unreadable
from moeq.checkpoint.rounded.gguf import LISTING, listed
from moeq.errors import CheckpointError, HeaderError, MissingTensorError
from moeq.spec import TensorInfo

CONFIG_NAME: Final = "config.json"
SINGLE_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OTHER_WEIGHTS: Final = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "original/*")


def resolve(model: str | Path, *, local_files_only: bool = False) -> Path:
    """The directory of a model.

    Args:
        model: a directory, or a hub id "org/name"; only a `str` that is no existing path can be a hub id.
        local_files_only: take a hub id from the local cache, never from the network.

    Raises:
        CheckpointError: there is no such directory, or the hub did not give the model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError("a checkpoint is a directory, this is a file", file=path, fix=f"give {path.parent}")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(model):
        raise CheckpointError("the model directory does not exist", file=path, fix="check the path")
    import huggingface_hub  # half a second that local models need not pay

    try:
        return Path(
            huggingface_hub.snapshot_download(
                model, local_files_only=local_files_only, ignore_patterns=list(_OTHER_WEIGHTS)
            )
        )
    except Exception as error:  # whatever went wrong out there, the user's question is the same
        raise CheckpointError(
            f"{model!r} is neither a directory nor a model the hub gives us: {str(error).splitlines()[0]}",
            fix="check the spelling, your connection and access rights, or give a local directory",
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, as leniently as transformers reads it: numbers may be infinite, of equal keys the last counts.

    Raises:
        CheckpointError: it is absent, or no JSON object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            "the model directory has no config.json", file=path, fix="give the directory of a transformers checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json cannot be read: {error}", file=path, fix="download it again") from error
    if not isinstance(data, dict):
        raise CheckpointError("config.json holds no JSON object", file=path, fix="download it again")
    return data


def resolve_packed(directory: str | Path) -> Path:
    """The directory of what may be a packed checkpoint: a path, or what the hub gives for an id."""
    path = Path(directory)
    hub = isinstance(directory, str) and not path.exists() and _HUB_ID.fullmatch(directory) is not None
    return resolve(directory) if hub else path


def stored_headers(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor as it is stored; see `moeq.checkpoint.read.read_headers`."""
    if (directory / SINGLE_NAME).exists():
        return read_header(directory / SINGLE_NAME)
    index = directory / INDEX_NAME
    if not index.exists() and (directory / LISTING).exists():
        return listed(directory)
    if not index.exists():
        raise _no_checkpoint(directory)
    weight_map = read_index(index)
    headers: dict[str, TensorInfo] = {}
    for name in sorted(set(weight_map.values())):
        if not (directory / name).exists():
            raise MissingTensorError(
                "the index names a file that does not exist", file=directory / name, fix="download the missing file"
            )
        for tensor, info in read_header(directory / name).items():
            if weight_map.get(tensor, name) != name:
                continue
            if tensor in headers:
                raise HeaderError("two shards hold this tensor", file=index, tensor=tensor, fix="list it in the index")
            headers[tensor] = info
    return headers  # an entry of the index that no file has is stale, or else the model will lack a weight


def read_index(path: Path) -> dict[str, str]:
    """tensor -> file name of an index file.

    Raises:
        HeaderError: it is malformed, or a file name leads out of the directory.
        CheckpointError: it cannot be read.
    """
    try:
        index = parse_json_object(path.read_bytes(), path)
    except OSError as error:
        raise unreadable(path, error) from error
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError("the index has no weight_map", file=path, fix="download the index again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not is_plain_name(name):
            raise HeaderError(
                f"{str(name)[:80]!r} is not a file name",
                file=path,
                tensor=tensor,
                fix="list names inside the directory",
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Whether `name` is the name of a file right inside a directory, on any system."""
    if name in ("", ".", "..") or len(name.encode("utf-8", "surrogatepass")) > 255:
        return False
    return not any(char in "/\\:" or ord(char) < 32 or "\ud800" <= char <= "\udfff" for char in name)


def _no_checkpoint(directory: Path) -> CheckpointError:
    if not directory.is_dir():
        return CheckpointError("the model directory does not exist", file=directory, fix="check the path")
    if any(any(directory.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        return CheckpointError(
            "the weights are in PyTorch's pickle format", file=directory, fix="convert to safetensors (save_pretrained)"
        )
    return CheckpointError(
        f"there is neither {SINGLE_NAME} nor {INDEX_NAME}",
        file=directory,
        fix="give a checkpoint in safetensors format",
    )
