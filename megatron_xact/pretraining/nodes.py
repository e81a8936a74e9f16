"""The launchers of several nodes agree on attempts through small files in RUN/logs/nodes, where there is no SLURM.

Node 0 leads: it names each attempt and says when it is over and what follows. The others take part in the attempts it
names and report how their part ended. Everyone counts up a beat, so that a lost node is noticed by the others, and so
that files left behind by an earlier, dead launcher are not believed: their beat does not change.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from megatron_xact.pretraining import exits, signals
from megatron_xact.pretraining.files import why_not
from megatron_xact.pretraining.status import host_name, read_json, write_json
from megatron_xact.pretraining.taking import Taken

INTERVAL = 1.0  # seconds between beats
LOST = 60.0  # seconds without a beat after which a node counts as lost
LATE = 9  # times as long a node may take to begin: people start them one after the other; torchruns wait for 600 s


class Nodes:
    def __init__(self, run: Path | None, rank: int, count: int, lost: float = LOST):
        """run: the folder all nodes share; with one node, it may be None: nothing is written or read.

        Taken: another launcher says that it is this node.
        """
        self.folder = run / "logs" / "nodes" if run is not None else None
        self.rank, self.count, self.lost = rank, count, lost
        self.leads = rank == 0
        self._mine = {"host": host_name(), "beat": 0, "attempt": "", "state": "", "code": None}
        self._written = 0.0
        self._seen: dict[int, tuple[int, float]] = {}  # node -> (its beat, when it was first seen to have that)
        if count > 1:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._take_place()

    def _take_place(self) -> None:
        """A launcher of this number that was killed has not said that it ended, but its beat does not change."""
        file = self.folder / f"{self.rank}.json"
        theirs, until = read_json(file), time.monotonic() + 3 * INTERVAL
        while theirs and theirs.get("state") != "stop" and time.monotonic() < until:
            time.sleep(INTERVAL / 2)
            now = read_json(file)
            if now and now.get("beat") != theirs.get("beat"):
                raise Taken(
                    f"node {self.rank} of the run in {self.folder.parents[1]} has a launcher already, on "
                    f"{now.get('host')}: wait for its end, or give each machine its own --node-rank"
                )

    def say(self, **news: object) -> None:
        """Tell the others: attempt, state ("running", "over", "stop"), code (how this node's part of it ended)."""
        self._mine.update(news)
        self._written = 0.0
        self.beat()

    def beat(self) -> None:
        if self.count > 1 and time.monotonic() - self._written >= INTERVAL:
            self._mine["beat"] += 1
            try:
                write_json(self.folder / f"{self.rank}.json", self._mine)
            except OSError as error:  # where it lasts, the others count this node as lost
                print(f"xact: cannot write {self.folder}: {why_not(error)}", file=sys.stderr)
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
            waited = time.monotonic() - started
            if not said and waited > self.lost and self.has_begun(node):
                return f"node {node} is not heard of any more"
            if waited > LATE * self.lost and not self.has_begun(node):
                return f"node {node} has not begun: the same command is to be started on each machine, with its number"
        return None

    def has_begun(self, node: int) -> bool:
        """Was it ever heard of, also if it is lost by now?"""
        return self._seen.get(node, (0, -1.0))[1] >= 0

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
            if not last and signals.received():
                print(f"xact: ended by {signals.received()} before anything was started", file=sys.stderr)
                return "", exits.PREEMPTED
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
