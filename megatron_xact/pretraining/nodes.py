"""The launchers of several nodes agree on attempts through small files in RUN/logs/nodes, where there is no SLURM.

Node 0 leads: it names each attempt and says when it is over and what follows. The others take part in the attempts it
names and report how their part ended. Everyone counts up a beat, so that a lost node is noticed by the others, and so
that files left behind by an earlier, dead launcher are not believed: their beat does not change.
"""

from __future__ import annotations

import time
from pathlib import Path

from megatron_xact.pretraining.status import host_name, read_json, write_json

INTERVAL = 1.0  # seconds between beats
LOST = 60.0  # seconds without a beat after which a node counts as lost


class Nodes:
    def __init__(self, run: Path | None, rank: int, count: int, lost: float = LOST):
        """run: the folder all nodes share; with one node, it may be None: nothing is written or read."""
        self.folder = run / "logs" / "nodes" if run is not None else None
        self.rank, self.count, self.lost = rank, count, lost
        self.leads = rank == 0
        self._mine = {"host": host_name(), "beat": 0, "attempt": "", "state": "", "code": None}
        self._written = 0.0
        self._seen: dict[int, tuple[int, float]] = {}  # node -> (its beat, when it was first seen to have that)
        if count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)

    def say(self, **news: object) -> None:
        """Tell the others: attempt, state ("running", "over", "stop"), code (how this node's part of it ended)."""
        self._mine.update(news)
        self._written = 0.0
        self.beat()

    def beat(self) -> None:
        if self.count > 1 and time.monotonic() - self._written >= INTERVAL:
            self._mine["beat"] += 1
            write_json(self.folder / f"{self.rank}.json", self._mine)
            self._written = time.monotonic()

    def hear(self, node: int) -> dict:
        """What another node last said; {} before its beat was seen to change, and once it is lost."""
        said = read_json(self.folder / f"{node}.json")
        beat, now = said.get("beat", -1), time.monotonic()
        if node not in self._seen:
            self._seen[node] = (beat, -1.0)  # it may be old
        elif beat != self._seen[node][0]:
            self._seen[node] = (beat, now)
        since = self._seen[node][1]
        return said if since >= 0 and now - since < self.lost else {}

    def followers(self) -> dict[int, dict]:
        return {node: self.hear(node) for node in range(1, self.count)}

    def over_elsewhere(self, attempt: str, started: float) -> str | None:
        """Why this node's part of `attempt` must end; None: it need not. started: time.monotonic() of the attempt."""
        if self.count == 1:
            return None
        if not self.leads:
            said = self.hear(0)
            if not said:
                return "node 0 is not heard of any more"
            return None if said["attempt"] == attempt and said["state"] == "running" else "node 0 ended the attempt"
        for node, said in self.followers().items():
            if said.get("attempt") == attempt and said.get("code"):
                return f"node {node} ({said['host']}) failed"
            if not said and time.monotonic() - started > self.lost:
                return f"node {node} is not heard of any more"
        return None

    def wait_for_followers(self, attempt: str) -> None:
        """Until every other node has said how its part of `attempt` ended, or is lost."""
        end = time.monotonic() + self.lost
        while time.monotonic() < end and any(
            said and (said["attempt"] != attempt or said["code"] is None) for said in self.followers().values()
        ):
            self.beat()
            time.sleep(0.2)

    def next_attempt(self, last: str) -> tuple[str, int | None]:
        """What node 0 says after attempt `last` ("": before the first): (attempt to take part in, code to end with)."""
        began = time.monotonic()
        while True:
            self.beat()
            said = self.hear(0)
            if said and said["state"] == "running" and said["attempt"] != last:
                return said["attempt"], None
            if said and said["state"] == "stop" and said["attempt"] == last:
                return "", said["code"]
            if not said and time.monotonic() - began > self.lost and last:
                raise OSError("node 0 is not heard of any more: this node's launcher ends")
            if not last and time.monotonic() - began > 10 * self.lost:
                raise OSError(f"node 0 does not begin (no sign of it in {self.folder}): is its launcher running?")
            time.sleep(0.2)
