"""Real kubectl and a real API server for KubeRay's kinds: what is sent is taken, asked about, stopped, sent again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import RunError
from pipeline.submit.kubernetes import target as kubernetes
from pipeline.submit.submission import State
from tests.submit import api_server, overlays, schemas
from tests.submit.api_server import kubectl, play_operator

MISSING = ", ".join(api_server.missing()) or ("" if schemas.folder() else f"a folder of CRDs, named by {schemas.CRDS}")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.root,
    pytest.mark.skipif(bool(MISSING), reason=f"there is no {MISSING} here"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with api_server.serve(tmp_path_factory.mktemp("api")) as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def ray_only(overlay: str) -> dict[str, str]:
    """The part of a rendered run that this server knows."""
    return {name: text for name, text in overlays.render(overlay).items() if name in ("rayjob.yaml", "raycluster.yaml")}


def job(name: str = "digits") -> dict:
    return json.loads(kubectl("get", "rayjob", name, "-n", "training", "-o", "json").stdout)


@pytest.mark.timeout(1800)  # the server is built the first time
def test_a_job_from_sent_to_done(server: None, tmp_path: Path) -> None:
    _, run = overlays.submission(overlays.command("cpu"))
    with pytest.raises(RunError, match="KubeRay is not installed there"):
        kubernetes.submit(ray_only("cpu"), run)
    definitions = schemas.folder()
    assert definitions is not None
    api_server.install(definitions)

    for overlay in overlays.OVERLAYS:
        for name, text in ray_only(overlay).items():
            kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", given=text)
            slip = text.replace("rayStartParams:", "rayStartParam:", 1)
            refused = kubectl("create", "--dry-run=server", "--validate=strict", "-f", "-", given=slip, check=False)
            assert refused.returncode and "rayStartParam" in refused.stderr, (overlay, name)

    id = kubernetes.submit(ray_only("cpu"), run)
    assert id == "-/training/rayjob/digits"
    assert kubernetes.status(id).word == "waiting"
    with pytest.raises(RunError, match="stop it first"):
        kubernetes.submit(ray_only("cpu"), run)
    play_operator("rayjob", "digits", jobDeploymentStatus="Running", jobStatus="RUNNING")
    assert kubernetes.status(id) == State("running", "Running, RUNNING")

    kubernetes.stop(id)
    assert job()["spec"]["suspend"] is True
    play_operator("rayjob", "digits", jobDeploymentStatus="Suspending")
    assert kubernetes.status(id).word == "running"
    play_operator("rayjob", "digits", jobDeploymentStatus="Suspended")
    assert kubernetes.status(id).word == "stopped"

    first = job()["metadata"]["uid"]
    assert kubernetes.submit(ray_only("cpu"), run) == id
    assert job()["metadata"]["uid"] != first and "suspend" not in job()["spec"]
    play_operator("rayjob", "digits", jobDeploymentStatus="Complete", jobStatus="SUCCEEDED")
    assert kubernetes.status(id).word == "done"
    kubernetes.stop(id)
    assert "suspend" not in job()["spec"]
    play_operator(
        "rayjob", "digits", jobDeploymentStatus="Failed", jobStatus="FAILED", reason="AppFailed", message="no"
    )
    assert kubernetes.status(id) == State("failed", "Failed, FAILED, AppFailed, no")
    kubectl("delete", "rayjob", "digits", "-n", "training")
    assert kubernetes.status(id).word == "unknown"

    _queued()
    _by_hand()
    with pytest.raises(RunError, match="should look like"):
        kubernetes.status("digits")
    with pytest.raises(RunError, match='context "elsewhere" does not exist'):
        kubernetes.status("elsewhere/training/rayjob/digits")


def _queued() -> None:
    """Kueue would resume what is suspended, so a job in its queue is deleted."""
    _, run = overlays.submission(overlays.command("kueue"))
    id = kubernetes.submit(ray_only("kueue"), run)
    assert job()["spec"]["suspend"] is True
    assert kubernetes.status(id) == State("waiting", "suspended, waits in its queue")
    kubernetes.stop(id)
    assert kubernetes.status(id).word == "unknown"


def _by_hand() -> None:
    _, run = overlays.submission(overlays.command("interactive"))
    id = kubernetes.submit(ray_only("interactive"), run)
    assert id == "-/training/raycluster/digits" and kubernetes.status(id).word == "waiting"
    play_operator("raycluster", "digits", state="ready")
    assert kubernetes.status(id) == State("running", "ready")
    kubernetes.stop(id)
    assert kubernetes.status(id).word == "unknown"


def test_without_kubectl_or_server_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    with pytest.raises(RunError, match="get-contexts"):
        kubernetes.status("-/training/rayjob/digits")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="no kubectl here"):
        kubernetes.status("-/training/rayjob/digits")
