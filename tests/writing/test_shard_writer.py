"""What is not quantized is copied byte for byte: routers, norms, embeddings, tokenizer."""

from pathlib import Path

from safetensors import safe_open

from moeq.checkpoint.read import Reader, read_headers
from moeq.layouts.base import DATA_SUFFIX, TABLE_SUFFIX

SIDECARS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def test_untouched_tensors_keep_their_bytes(demo_dir: Path, packed_demo: Path) -> None:
    packed = read_headers(packed_demo)
    copied = [name for name in packed if not name.endswith((DATA_SUFFIX, TABLE_SUFFIX))]
    kinds = ("mlp.gate.weight", "norm.weight", "embed_tokens.weight", "lm_head.weight")
    for kind in kinds:
        assert any(name.endswith(kind) for name in copied), kind
    with Reader(demo_dir) as source, Reader(packed_demo) as target:
        for name in copied:
            assert source.info(name).dtype == target.info(name).dtype
            assert bytes(source.raw(name)) == bytes(target.raw(name)), name
        sources = set(source.headers)
    missing = sources - set(copied)
    assert all("experts" in name or "_proj" in name for name in missing)


def test_other_files_are_copied(demo_dir: Path, packed_demo: Path) -> None:
    for name in SIDECARS:
        assert (packed_demo / name).read_bytes() == (demo_dir / name).read_bytes()


def test_the_safetensors_library_reads_every_shard(packed_demo: Path) -> None:
    for shard in packed_demo.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert all(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
