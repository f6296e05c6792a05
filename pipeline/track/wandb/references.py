"""What a W&B run is told besides its rows: which code, which data sets it read, which checkpoints it made, that it was
given up.

Data sets and checkpoints are artifacts of references: W&B gets names, digests and places, and its graph data set ->
run -> checkpoint; no file is copied. W&B asks its server before it takes an artifact, so notes wait in a thread of
their own and hold no row up. It gives up: a checkpoint that is removed later stays in W&B's list; notes that the server
has not taken when a run ends.
"""

from __future__ import annotations

import queue
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

GIVEN_UP = 1  # exit code of a run that ends without being done


class References:
    """Notes for one W&B run. A note that fails is told once; from then on there are none."""

    _of_interest = ("attempt", "start", "restore", "save", "failure", "rollback")

    def __init__(
        self, run: Any, identity: str, folder: Path, config: Mapping[str, Any], tell: Callable[[str], None]
    ) -> None:
        self._run, self._identity, self._folder, self._config, self._tell = run, identity, folder, config, tell
        self._data: str | None = None
        # What goes with a row, such as a table's pictures, is logged from here too, so that the row does not wait.
        self._log, run.log_artifact = run.log_artifact, self._later
        self._records: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb notes", daemon=True)
        self._thread.start()

    def take(self, record: Mapping[str, Any]) -> None:
        """Note what one record of the journal is about, if it is about any of these; returns at once."""
        if record["kind"] in self._of_interest:
            self._records.put(record)

    def close(self, seconds: float) -> None:
        """Wait so long, at the most, for what is still to be noted."""
        self._records.put(None)
        self._thread.join(seconds)
        self._tell = lambda line: None  # it is too late to say anything of them

    def _later(self, artifact: Any) -> Any:
        self._records.put(artifact)
        return artifact

    def _work(self) -> None:
        try:
            while (record := self._records.get()) is not None:
                if isinstance(record, Mapping):
                    self._note(record)
                else:
                    self._log(record)
        except Exception as error:
            self._tell(f"W&B: {error or type(error).__name__}; from here on only metrics are sent")

    def _note(self, record: Mapping[str, Any]) -> None:
        match record["kind"]:
            case "attempt":
                facts = {key: record[key] for key in ("attempt", "workers", "code") if key in record}
                self._run.config.update({"millstream": facts}, allow_val_change=True)
            case "start" | "restore" if "data" in record:
                self._read(record)
            case "save" if "path" in record:
                self._made(record)
            case "failure" if record["exit_code"] == GIVEN_UP:
                self._alert("given up", record, "ERROR")
            case "rollback":
                self._alert("gone back", record, "WARN")

    def _alert(self, what: str, record: Mapping[str, Any], level: Literal["ERROR", "WARN"]) -> None:
        self._run.alert(f"{self._config.get('name', 'run')}: {what}"[:60], record["message"][:1000], level=level)

    def _read(self, record: Mapping[str, Any]) -> None:
        """The run reads these data sets. The root of the index stands for a set: another content has another one."""
        import wandb

        self._data = record["data"]
        for source, facts in self._config.get("data", {}).get("train", {}).items():
            root = Path(facts["folder"]) / "shards.idx"
            if not root.is_file():
                continue
            metadata = {"source": source, "folder": str(facts["folder"]), "weight": facts["weight"]}
            name = re.sub(r"[^\w.-]", "-", f"data-{root.parent.parent.name}-{root.parent.name}")
            artifact = wandb.Artifact(name, "dataset", metadata=metadata)
            artifact.add_reference(f"file://{root}")
            # `use_artifact` refuses to work offline, and waits for the server online; this is what it calls.
            self._run._log_artifact(artifact, use_after_commit=True)

    def _made(self, record: Mapping[str, Any]) -> None:
        import wandb

        path = self._folder / "checkpoints" / record["path"]
        if not path.is_dir():  # removed by now
            return
        metadata = {"step": record["step"], "attempt": record.get("attempt"), "data": self._data, **record["metrics"]}
        artifact = wandb.Artifact(f"checkpoint-{self._identity}", "model", metadata=metadata)
        artifact.add_reference(f"file://{path}", checksum=False)  # the manifest there holds the digests
        self._log(artifact, aliases=[f"step-{record['step']}"])
