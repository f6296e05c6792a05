"""Export of a network of diffusers: one part of a pipeline, opened by diffusers to the bit."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import torch

from pipeline.checkpoint import format, fragments
from pipeline.checkpoint.export import export
from pipeline.checkpoint.fragments import Fragment
from pipeline.checkpoint.manifest import Manifest
from pipeline.errors import CheckpointError
from pipeline.models import exported

UNET = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (4, 8),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="module")
def network() -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET).eval()


def saved(network: diffusers.UNet2DModel, root: Path, **changes: str) -> Path:
    """A checkpoint of one rank that holds the network as it is; `changes` to its description."""
    staging = format.stage(root, 3, 1)
    state = network.state_dict()
    held = [Fragment(name, "master", 0, tensor.reshape(-1)) for name, tensor in state.items()]
    digest = format.write(staging / "rank-00000.safetensors", fragments.file_chunks(held))
    manifest = Manifest(
        step=3,
        attempt=1,
        world_size=1,
        zero_stage=1,
        dtype="fp32",
        parameters={name: tuple(tensor.shape) for name, tensor in state.items()},
        fragments=tuple(each.place("rank-00000.safetensors") for each in held),
        files={"rank-00000.safetensors": digest},
        network=exported.describe(network) | changes,
    )
    return format.commit(root, staging, manifest, newest_attempt=lambda: 1)


@pytest.mark.parametrize("shard_bytes", [10**9, 5000])
def test_diffusers_opens_it_to_the_bit(network: diffusers.UNet2DModel, tmp_path: Path, shard_bytes: int) -> None:
    done = export(saved(network, tmp_path / "checkpoints"), tmp_path / "out", shard_bytes=shard_bytes)
    assert (done.package, done.opener, done.notes) == ("diffusers", "UNet2DModel", [])
    assert sum(name.endswith(".safetensors") for name in done.files) == 1 or shard_bytes == 5000
    model = diffusers.UNet2DModel.from_pretrained(done.folder, subfolder="unet", local_files_only=True).eval()
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    pixels, steps = torch.randn(2, 1, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.equal(model(pixels, steps).sample, network(pixels, steps).sample)


def test_files_are_those_that_save_pretrained_would_write(network: diffusers.UNet2DModel, tmp_path: Path) -> None:
    done = export(saved(network, tmp_path / "checkpoints"), tmp_path / "out")
    network.save_pretrained(tmp_path / "theirs")
    assert {f"unet/{path.name}" for path in (tmp_path / "theirs").iterdir()} | {"README.md"} == set(done.files)
    config = json.loads((done.folder / "unet/config.json").read_text())
    assert config == json.loads((tmp_path / "theirs/config.json").read_text())
    page = (done.folder / "README.md").read_text()
    assert "library_name: diffusers" in page and "from diffusers import UNet2DModel" in page


def test_a_network_that_diffusers_does_not_have_is_refused(network: diffusers.UNet2DModel, tmp_path: Path) -> None:
    path = saved(network, tmp_path / "checkpoints", _class_name="UNet9DModel")
    with pytest.raises(CheckpointError, match="has no UNet9DModel"):
        export(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
