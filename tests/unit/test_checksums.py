"""Checksums of an expert-sharded checkpoint, compared by all ranks together."""

import pytest

from ds_moe_ep.checkpoint.convert import to_expert_sharded
from ds_moe_ep.engine.checksums import check_share, share
from ds_moe_ep.errors import CheckpointError
from tests.helpers.families import save_tiny


@pytest.mark.parametrize("world_size", [1, 2, 3, 8, 64])
def test_every_file_is_somebodys(world_size: int):
    experts = [f"experts-{number:05d}-of-00008.safetensors" for number in range(1, 9)]
    names = ["config.json", "dense.safetensors", *experts]
    shares = [share(names, rank, world_size) for rank in range(world_size)]
    assert sorted(name for of_rank in shares for name in of_rank) == sorted(names)
    if world_size == 8:
        assert [of_rank[0] for of_rank in shares] == experts  # what each loads


def test_one_wrong_bit_is_found_by_one_rank(tmp_path):
    save_tiny("olmoe", tmp_path / "model")
    check_share(tmp_path / "model", 0, 1)  # nothing to compare with
    folder = tmp_path / "sharded"
    to_expert_sharded(tmp_path / "model", folder, ep_size=4)
    for rank in range(4):
        check_share(folder, rank, 4)
    path = folder / "experts-00003-of-00004.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for rank in (0, 1, 3):
        check_share(folder, rank, 4)
    with pytest.raises(CheckpointError, match=f"{path} is corrupt: its sha256"):
        check_share(folder, 2, 4)
