"""What leaves with a run and what does not: code, and no data, no link, no secret."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load
from pipeline.submit import code, secrecy
from tests.small_project import project
from tests.submit.test_submit import plan, said

__all__ = ["project"]  # a fixture for every test here

CANARY = "canary-9f3b27d1c0"


# ---------------------------------------------------------------- code
def test_code_goes_along_and_nothing_else(tmp_path: Path) -> None:
    for name in ("house/.env", "house/data.tar", "house/weights.safetensors", "house/notes.txt", "house/.git/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(CANARY)
    (tmp_path / "house/more").mkdir()
    (tmp_path / "house/more/parts.py").write_text("PARTS = 1\n")
    files = plan().run.files
    assert {"house/blobs.py", "house/more/parts.py", "pipeline/train.py", "pipeline/submit/slurm.sh"} <= files.keys()
    assert all(Path(name).suffix in (".py", ".sh") and name.startswith(("house/", "pipeline/")) for name in files)
    assert not any("/." in name or "__pycache__" in name for name in files)
    only = plan(own_code=False).run.files
    assert sorted(only) == ["house/blobs.py", "house/more/parts.py"]
    code.stage(only, tmp_path / "staged")
    assert sorted(path.name for path in (tmp_path / "staged").rglob("*.py")) == ["blobs.py", "parts.py"]
    report = code.report(only).splitlines()
    size = sum(path.stat().st_size for path in only.values())
    assert report[-1].split() == [f"{size:,}", "bytes", "in", "2", "files"]


def test_a_link_that_leads_elsewhere_does_not_leave(tmp_path: Path) -> None:
    outside = tmp_path.parent / f"{tmp_path.name}-outside.py"
    outside.write_text("SECRET = 1\n")
    (tmp_path / "house/inside.py").symlink_to(outside)
    assert "house/inside.py: is a link to another place" in said(plan())
    outside.unlink()


def test_an_installed_task_is_named_and_not_sent(tmp_path: Path) -> None:
    config = load("good.yaml", ["data.decoders={bin: json.tool:main}"])
    assert code.modules(config) == ["house.blobs", "json.tool"]
    assert code.collect(config, own=False).needed == ["json"]


# ---------------------------------------------------------------- secrets
@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A secret in the environment, another in a token file; the folder is searched for both."""
    (tmp_path.parent / f"{tmp_path.name}-token").write_text(f"{CANARY}-token")
    monkeypatch.setenv("WANDB_API_KEY", f"{CANARY}-wandb")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", f"{CANARY}-aws")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path.parent / f"{tmp_path.name}-token"))
    return tmp_path


@pytest.mark.parametrize("target", ["ray", "slurm"])
def test_no_secret_is_in_what_leaves(target: str, canary: Path) -> None:
    found = plan(target=target, options={"python": "/opt/bin/python"} if target == "slurm" else {})
    everything = "".join(found.rendered.values()) + "".join(path.read_text() for path in found.run.files.values())
    assert found.problems == [] and CANARY not in everything
    assert len(secrecy.known()) >= 3


@pytest.mark.parametrize("target", ["ray", "slurm"])
@pytest.mark.parametrize("name", ["wandb", "aws", "token"])
def test_a_secret_in_a_configuration_is_found_and_not_shown(target: str, name: str, canary: Path) -> None:
    found = plan(target=target, overrides=(f"track.entity={CANARY}-{name}",))
    kinds = {
        "wandb": "the value of WANDB_API_KEY",
        "aws": "the value of AWS_SECRET_ACCESS_KEY",
        "token": "the token in",
    }
    assert f"holds {kinds[name]}" in said(found) and CANARY not in said(found)


def test_a_secret_in_code_is_found(canary: Path) -> None:
    task = canary / "house/blobs.py"
    task.write_text(task.read_text() + f"KEY = '{CANARY}-wandb'\n")
    assert "house/blobs.py" in said(plan()) and "the value of WANDB_API_KEY" in said(plan())


@pytest.mark.parametrize(
    "text",
    [
        "tokenizer: /data/tokenizer.json",
        "max_tokens: 1234567890",
        "url: s3://bucket/folder",
        "password: null",
        "api_key: $WANDB_API_KEY",
        "auth_token=/run/secrets/token",
        "revision: 0123456789abcdef0123456789abcdef01234567",
    ],
)
def test_what_only_looks_like_a_secret_raises_no_alarm(text: str) -> None:
    assert secrecy.find(text, {}) == []
