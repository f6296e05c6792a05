"""A W&B server on loopback for tests: our own stand-in, since the real one cannot be had here.

It speaks as much of the protocol as W&B's client 0.31 uses to open, resume and rewind a run, to stream rows, and to log
artifacts and alerts, and keeps all of it in memory for a test to look at. Like the real one it places streamed lines by
their offset, so that a line that is sent twice stands there once. It is not W&B: what it says of a server's answers is
read from the client's own queries and from what the client does with them.

`behave` makes it a bad server: it may answer late, refuse, hang up without an answer, or leave altogether.
"""

from __future__ import annotations

import json
import re
import threading
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from typing import Any

from tests.track.wandb_requests import KEY, Handler

ENTITY = "somebody"


@dataclass
class Run:
    """What the server has of one run."""

    project: str
    facts: dict[str, Any] = field(default_factory=dict)  # of the last UpsertBucket
    files: dict[str, list[str]] = field(default_factory=dict)  # streamed file -> lines
    config: dict[str, Any] = field(default_factory=dict)
    exit_code: int | None = None
    rewinds: list[int] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # names of artifacts
    logged: list[str] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Rows in the order in which they stand."""
        return [json.loads(line) for line in self.files.get("wandb-history.jsonl", []) if line]

    @property
    def steps(self) -> list[int]:
        """`_step` of each row."""
        return [row["_step"] for row in self.history]


@dataclass
class Artifact:
    name: str
    type: str
    metadata: dict[str, Any]
    aliases: list[str]
    state: str = "PENDING"
    manifest: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


class Server:
    """Serves from construction until `close`. `runs` and `artifacts` (by name) are what it has been told.

    behave: "answer"; "refuse": 403 on everything; "fail": 500; "hang up": closes the connection without an answer;
    "silent": takes the request and never answers.  delay: seconds before each answer.  can_rewind: what it says of
    itself.  hang_up_after: so many more streamed requests are taken, then it hangs up.
    """

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.requests: list[str] = []
        self.behave, self.delay, self.can_rewind = "answer", 0.0, True
        self.hang_up_after: int | None = None
        self._ids: dict[str, str] = {}
        self.closing = threading.Event()
        self._lock = threading.RLock()
        self._open(0)

    def _open(self, port: int) -> None:
        server = self

        class Mine(Handler):
            owner = server

        class Listener(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that was killed is no error here."""

        self._listener = Listener(("127.0.0.1", port), Mine)
        self.port = self._listener.server_address[1]
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to come here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_ERROR_REPORTING": "false"}

    def leave(self) -> None:
        """Nobody listens any more; what was told is kept."""
        self.behave = "hang up"
        self.closing.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def come_back(self) -> None:
        """At the same address."""
        self.behave, self.hang_up_after = "answer", None
        self.closing.clear()
        self._open(self.port)

    def close(self) -> None:
        if not self.closing.is_set():
            self.leave()

    # ------------------------------------------------------------ what it answers

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The answer to one operation, chosen by its name; an unknown one is an error that names it."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", query)
        name = found[1] if found else ""
        self.requests.append(name)
        answer = getattr(self, f"_on_{name}", None)
        if answer is None:
            return {"errors": [{"message": f"the test server does not know {name or query[:80]}"}]}
        with self._lock:
            return {"data": answer(variables)}

    def stream(self, run: Run, body: dict[str, Any]) -> None:
        """Lines of a run's files, each to its place."""
        with self._lock:
            for name, chunk in (body.get("files") or {}).items():
                lines = run.files.setdefault(name, [])
                lines.extend([""] * (chunk["offset"] + len(chunk["content"]) - len(lines)))
                lines[chunk["offset"] : chunk["offset"] + len(chunk["content"])] = chunk["content"]
            if body.get("complete"):
                run.exit_code = body.get("exitcode")

    def store(self, path: str, content: bytes) -> None:
        """A file that was uploaded; those of an artifact are kept."""
        kind, _, name = path.removeprefix("/storage/").partition("/")
        if kind == "manifest":
            self.artifacts[name].manifest = json.loads(content)
        elif kind == "entry":
            artifact, _, entry = name.partition("/")
            self.artifacts[artifact].files[entry] = content

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        who = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "", "flags": "{}", "teams": {"edges": []}}
        return {"viewer": who}

    def _on_RunResumeStatus(self, wanted: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(wanted["name"])
        model = {"id": "p", "name": wanted.get("project"), "entity": {"id": "e", "name": ENTITY}, "bucket": None}
        if run is not None:
            history, events = (run.files.get(f"wandb-{kind}.jsonl", []) for kind in ("history", "events"))
            model["bucket"] = {
                "id": f"storage-{wanted['name']}",
                "name": wanted["name"],
                "displayName": run.facts.get("displayName"),
                "summaryMetrics": "{}",
                "logLineCount": len(run.files.get("output.log", [])),
                "historyLineCount": len(history),
                "eventsLineCount": len(events),
                "historyTail": json.dumps(history[-1:]),
                "eventsTail": json.dumps(events[-1:]),
                "config": json.dumps(run.config),
                "tags": run.facts.get("tags") or [],
                "notes": "",
                "wandbConfig": json.dumps({"t": run.config.get("_wandb", {}).get("value", {}).get("t", {})}),
            }
        return {"model": model}

    def _on_UpsertBucket(self, facts: dict[str, Any]) -> dict[str, Any]:
        name = facts.get("name") or facts["id"].removeprefix("storage-")
        new = name not in self.runs
        run = self.runs.setdefault(name, Run(facts.get("project") or "uncategorized"))
        run.facts |= {key: value for key, value in facts.items() if value is not None}
        if facts.get("config"):
            run.config |= json.loads(facts["config"])
        return {"upsertBucket": {"bucket": self._bucket(name), "inserted": new}}

    def _on_RewindRun(self, wanted: dict[str, Any]) -> dict[str, Any] | None:
        if not self.can_rewind:
            return None
        run, value = self.runs[wanted["runName"]], int(wanted["metricValue"])
        run.rewinds.append(value)
        kept = [line for line in run.files.get("wandb-history.jsonl", []) if json.loads(line)["_step"] <= value]
        run.files["wandb-history.jsonl"] = kept
        return {"rewindRun": {"rewoundRun": self._bucket(wanted["runName"])}}

    def _bucket(self, name: str) -> dict[str, Any]:
        run = self.runs[name]
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        return {
            "id": f"storage-{name}",
            "name": name,
            "displayName": run.facts.get("displayName") or name,
            "description": None,
            "config": json.dumps(run.config),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(run.files.get("wandb-history.jsonl", [])),
        }

    def _on_CreateRunFiles(self, wanted: dict[str, Any]) -> dict[str, Any]:
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/file/{name}"} for name in wanted["files"]]
        return {"createRunFiles": {"runID": f"storage-{wanted['run']}", "uploadHeaders": [], "files": files}}

    def _on_NotifyScriptableRunAlert(self, alert: dict[str, Any]) -> dict[str, Any]:
        self.runs[alert["runName"]].alerts.append(alert)
        return {"notifyScriptableRunAlert": {"success": True}}

    def _on_CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        name = wanted["artifactCollectionName"]
        aliases = [alias["alias"] for alias in wanted.get("aliases") or []]
        number = sum(each.name == name for each in self.artifacts.values())
        artifact = Artifact(name, wanted["artifactTypeName"], json.loads(wanted.get("metadata") or "{}"), aliases)
        identity = f"{name}:v{number}"
        same = [key for key, each in self.artifacts.items() if each.name == name and self._ids[key] == wanted["digest"]]
        if same:  # the same content is the same version
            identity = same[0]
        else:
            self.artifacts[identity], self._ids[identity] = artifact, wanted["digest"]
        if wanted.get("runName") in self.runs:
            self.runs[wanted["runName"]].logged.append(identity)
        told = {"id": identity, "state": self.artifacts[identity].state, "artifactSequence": {"id": name}}
        return {"createArtifact": {"artifact": told | {"latestArtifact": None}}}

    def _on_UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        self.runs[wanted["runName"]].used.append(wanted["artifactID"])
        return {"useArtifact": {"artifact": {"id": wanted["artifactID"]}}}

    def _on_CreateArtifactManifest(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(wanted["artifactID"])}}

    def _on_UpdateArtifactManifest(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(wanted["artifactManifestID"])}}

    def _manifest(self, artifact: str) -> dict[str, Any]:
        url = f"{self.url}/storage/manifest/{artifact}"
        return {"id": artifact, "file": {"id": artifact, "uploadUrl": url, "uploadHeaders": []}}

    def _on_CreateArtifactFiles(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            url = f"{self.url}/storage/entry/{file['artifactID']}/{file['name']}"
            node = {"storagePath": file["name"], "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            edges.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, wanted: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[wanted["artifactID"]].state = "COMMITTED"
        return {"commitArtifact": {"artifact": {"id": wanted["artifactID"], "digest": self._ids[wanted["artifactID"]]}}}
