"""Starts a run through torchrun or srun, looks at how it ended, and starts it again, stops or leaves it to be requeued.

    python -m megatron_xact.pretraining.supervisor PLAN [options]

PLAN is what `xact pretrain ... --launch-plan` prints; `xact pretrain` typed by hand comes here by itself. This imports
no torch: it is ready for signals at once, costs little memory, and runs outside a container with any Python from 3.9.

How an attempt ended is read from what the run wrote, not from the exit code of srun or torchrun (but without a folder):
RUN/requeue (saved after a signal), RUN/logs/ranks (each rank's last word), the number of the newest checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from megatron_xact.pretraining import exits, failures, signals, status
from megatron_xact.pretraining.failures import Failure
from megatron_xact.pretraining.files import why_not
from megatron_xact.pretraining.launchers import KINDS, Launcher, Plan
from megatron_xact.pretraining.nodes import Nodes
from megatron_xact.pretraining.status import FLAG
from megatron_xact.pretraining.taking import Taken, taking

GRACE = 10.0  # seconds that ranks have to end by themselves when there is nothing to save


class Restarts:
    """How often the run was started again since its newest checkpoint; kept over requeues in RUN/logs/restarts.json."""

    def __init__(self, run: Path, limit: int, goes_on: bool):
        """goes_on: this is the next life of a requeued job, not a new start by a person."""
        self.run, self.limit = run, limit
        self._file = run / "logs" / "restarts.json"
        kept = status.read_json(self._file) if goes_on else {}
        self.step = kept.get("step", status.latest_step(run))
        self.count = kept.get("count", 0)

    def again(self, after_failure: bool) -> bool:
        """May it be started again? Counted, unless it was preempted after making progress."""
        step = status.latest_step(self.run)
        progressed = step > self.step
        if progressed:
            self.step, self.count = step, 0
        if after_failure or not progressed:
            if self.count >= self.limit:
                return False
            self.count += 1
        with contextlib.suppress(OSError):  # no room, maybe: what has happened is to be told all the same
            self._file.parent.mkdir(parents=True, exist_ok=True)
            status.write_json(self._file, {"step": self.step, "count": self.count})
        return True


class Supervisor:
    def __init__(self, plan: Plan, launcher: Launcher, nodes: Nodes):
        self.plan, self.launcher, self.nodes = plan, launcher, nodes
        self._child: subprocess.Popen | None = None
        self._passed_on = False  # a signal to this child
        self._over_elsewhere: str | None = None  # why this child was ended
        self._restarts: Restarts | None = None
        if plan.folder is not None and nodes.leads:
            requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
            self._restarts = Restarts(plan.folder, plan.max_restarts, requeued)
            (plan.folder / FLAG).unlink(missing_ok=True)

    def run(self) -> int:
        """Until the run has finished, is given up or is to be requeued; returns the exit code (exits.py)."""
        signals.when_received(self._pass_on)
        attempt = ""
        while True:
            if self.nodes.leads:
                attempt, code = secrets.token_hex(4), None
                self.nodes.say(attempt=attempt, state="running", code=None)
            else:
                attempt, code = self.nodes.next_attempt(attempt)
            if code is not None:
                self.nodes.say(state="stop")
                return code
            try:
                returned = self._attempt(attempt)
            except KeyboardInterrupt:
                self._end(attempt, signal.SIGINT)
                self.nodes.say(state="stop", code=exits.INTERRUPTED)
                print(status.interrupted(self.plan.folder), file=sys.stderr)
                return exits.INTERRUPTED
            if not self.nodes.leads:
                self.nodes.say(attempt=attempt, code=returned)
                continue
            self.nodes.say(state="over")
            self.nodes.wait_for_followers(attempt)
            code = self._decide(attempt, returned)
            if code is not None:
                self.nodes.say(state="stop", code=code)
                return code

    def _attempt(self, attempt: str) -> int:
        """Start all ranks (of this node) and wait for their end; the launcher's exit code."""
        began = time.monotonic()
        command, added = self.launcher.command(self.plan, attempt)
        self._passed_on, self._over_elsewhere = False, None
        self._child = subprocess.Popen(
            command,
            env={**os.environ, "XACT_ATTEMPT": attempt, "XACT_SIGNAL": self.plan.signal, **added},
            start_new_session=True,  # Ctrl-C and signals to the group come here only, and are passed on once
            preexec_fn=signals.end_with_parent,
        )
        if signals.received():  # while there was no child
            self._pass_on()
        while True:
            try:
                return self._child.wait(0.5)
            except subprocess.TimeoutExpired:
                self.nodes.beat()
                if why := self.nodes.over_elsewhere(attempt, began):
                    self._over_elsewhere = why
                    self._end(attempt, signal.SIGTERM)

    def _pass_on(self) -> None:
        """Once: torchrun and srun end ranks that are still saving at a second one."""
        if not self._passed_on and self._child is not None and self._child.poll() is None:
            self._passed_on = True
            self._child.send_signal(signal.Signals[signals.received()])

    def _end(self, attempt: str, by: signal.Signals) -> None:
        """End the attempt on this node: in order, then by force, and with everything it has started."""
        if self._child is None:
            return
        if self._child.poll() is None:
            self._child.send_signal(by)
        try:
            self._child.wait(GRACE)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            self._child.kill()
        _kill(attempt)
        self._child.wait()

    def _decide(self, attempt: str, returned: int) -> int | None:
        """The exit code, or None to start again."""
        _kill(attempt)  # what a killed torchrun left behind would go on training beside the next attempt
        run = self.plan.folder
        if run is None:  # nowhere to read what happened, and nothing to start again from
            return _of_code(returned)
        said = status.read(status.folder_of(run), attempt, self.plan.ranks)
        failures.add_crashes(status.folder_of(run), said)
        # Listed, not asked for by name: NFS may go on for a minute to deny what rank 0 has made on another node.
        if run.is_dir() and FLAG in os.listdir(run):
            return self._preempted(status.read_json(run / FLAG).get("signal"), said)
        if returned == 0 or (len(said) == len(self.plan.ranks) and all(s.kind == "done" for s in said.values())):
            return exits.FINISHED
        if any(s.kind == "interrupted" for s in said.values()):  # by a Ctrl-C that came to the ranks themselves
            print(status.interrupted(run), file=sys.stderr)
            return exits.INTERRUPTED
        failure = self._failure(said, returned)
        if failure.kind == "user":
            if 0 not in said or said[0].kind != "user":  # else that rank has told it
                print(f"xact: error: {failure.line()}", file=sys.stderr, flush=True)
            return exits.USER_ERROR
        # torchrun and srun send ranks SIGTERM when one has failed; the scheduler's signal comes from outside only.
        stopping = signals.received() or next((s.signal for s in said.values() if s.signal == self.plan.signal), None)
        if stopping and failure.kind in (*failures.ON_FAILURE, "launcher", "error"):  # it is to go on all the same
            step = status.latest_step(run)
            if failure.kind != "launcher":
                failures.record(run, failure, attempt, f"{stopping} had come: to go on from step {step}")
            status.write_json(run / FLAG, {"signal": stopping, "step": step})
            return self._preempted(stopping, said, failure)
        decision, code = self._policy(failure)
        with contextlib.suppress(OSError):
            failures.record(run, failure, attempt, decision)
        print(f"xact: error: {failure.line()}; {decision}{self._where_more(failure)}", file=sys.stderr, flush=True)
        return code

    def _where_more(self, failure: Failure) -> str:
        more = {"hang": "stacks-rank{}.txt", "error": "rank{}.log"}.get(failure.kind, "").format(failure.rank)
        file = self.plan.folder / "logs" / more
        return f" (see {file})" if more and file.is_file() else ""

    def _failure(self, said: dict, returned: int) -> Failure:
        lost = [node for node, words in self.nodes.followers().items() if not words and self.nodes.has_begun(node)]
        if lost:
            return Failure("node", None, f"node {lost[0]}", max((s.step for s in said.values()), default=-1),
                           "its launcher is not heard of any more")  # fmt: skip
        if not said and self._over_elsewhere:
            return Failure("launcher", None, "", -1, self._over_elsewhere)
        if not said and returned == 128 + signal.SIGKILL:  # as torchrun's agent here and srun tell it
            reason = "a rank was ended by SIGKILL (or out of memory) while it was starting"
            return Failure("killed", None, "", -1, reason)
        return failures.root_cause(said, self.plan.ranks)

    def _policy(self, failure: Failure) -> tuple[str, int | None]:
        """(what is told, exit code or None to start again)."""
        if failure.kind in failures.ON_FAILURE:
            key, choice = "on-failure", self.plan.on_failure
        elif failure.kind == "nan":
            key, choice = "on-nan", self.plan.on_nan
        else:
            return "stopped: it would come again", exits.of_kind(failure.kind)
        if choice == "stop":
            return f'stopped ({key} = "stop")', exits.of_kind(failure.kind)
        step = status.latest_step(self.plan.folder)
        if not self._restarts.again(after_failure=True):
            return (
                f"given up at step {step} after {self._restarts.count} restarts without a new checkpoint "
                f"(max-restarts = {self.plan.max_restarts})",
                exits.of_kind(failure.kind),
            )
        whence = f"from step {step}" if step else "from the beginning"
        return f"restart {self._restarts.count} of {self.plan.max_restarts} {whence}", None

    def _preempted(self, name: str | None, said: dict, failure: Failure | None = None) -> int:
        """After the signal `name`; failure: what kept the run from ending in order."""
        step = status.latest_step(self.plan.folder)
        if not self._restarts.again(after_failure=failure is not None):
            (self.plan.folder / FLAG).unlink()
            print(
                f"xact: error: given up at step {step}: {name} came before a new checkpoint {self._restarts.count + 1} "
                f"times running (max-restarts = {self.plan.max_restarts})",
                file=sys.stderr,
            )
            return exits.FAILED
        if failure is not None and failure.kind != "launcher":
            whence = f"from step {step}" if step else "from the beginning"
            told = f"error: {name} came, and {failure.line()}; the same command goes on {whence}"
        elif step <= max((s.step for s in said.values()), default=-1):  # which were complete when the last one began
            told = f"nothing saved since step {step} after {name}; the same command goes on from there"
        else:
            told = f"saved at step {step}" if step else "ended before a first checkpoint"
            told += f" after {name}; the same command goes on from there"
        print(f"xact: {told}", file=sys.stderr, flush=True)
        return exits.PREEMPTED


def _of_code(returned: int) -> int:
    """The exit code where the run has no folder. A rank that ended with a code of `exits` has told why; else a line."""
    if returned in (exits.FINISHED, *exits.OF_KIND.values()):
        return returned
    if signals.received():
        reason = f"ended by {signals.received()}"
    elif returned - 128 in set(signal.Signals):
        reason = f"a rank was ended by {signal.Signals(returned - 128).name}"
    else:
        reason = "a rank failed, see what it said"
    print(f"xact: error: {reason}; with save in [checkpoint] more is recorded, and the run can go on", file=sys.stderr)
    return exits.FAILED


def _kill(attempt: str) -> None:
    """End by force every process of an attempt on this host."""
    for pid in status.processes_of(attempt):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def replace_this_process(plan: Plan, node_rank: int, rendezvous: str | None) -> None:
    """Become the supervisor of `plan`, which is light; signals that arrive meanwhile are kept for it."""
    signals.hold(plan.signal)
    words = [plan.dump(), "--node-rank", str(node_rank), *(["--rendezvous", rendezvous] if rendezvous else [])]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", "megatron_xact.pretraining.supervisor", *words])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m megatron_xact.pretraining.supervisor", allow_abbrev=False)
    parser.add_argument("plan", metavar="PLAN", help="the line that `xact pretrain ... --launch-plan` prints")
    parser.add_argument("--launcher", choices=KINDS, default="torchrun", help="what starts the ranks")
    parser.add_argument("--node-rank", type=int, default=0, help="torchrun: this node's number among the plan's")
    parser.add_argument("--rendezvous", metavar="HOST:PORT", help="torchrun: where the nodes meet, on node 0")
    parser.add_argument("--wrap", default="", help="words before Python, e.g. 'apptainer exec --nv IMAGE'")
    parser.add_argument("--srun", default="", help="further flags of srun")
    parser.add_argument("--python", default=sys.executable, help="the ranks' Python")
    args = parser.parse_args()
    plan = Plan(**json.loads(args.plan))
    signals.heed(plan.signal)
    launcher = Launcher(
        args.launcher, args.rendezvous, tuple(shlex.split(args.wrap)), tuple(shlex.split(args.srun)), args.python
    )
    try:
        with taking(plan.folder, args.node_rank):
            # SLURM sees all nodes of a job; by hand, each node has a supervisor of its own.
            nodes = Nodes(plan.folder, args.node_rank, plan.nodes if args.launcher == "torchrun" else 1)
            return Supervisor(plan, launcher, nodes).run()
    except Taken as error:
        print(f"xact: error: {error}", file=sys.stderr)
        return exits.TAKEN
    except KeyboardInterrupt:
        print("xact: interrupted", file=sys.stderr)
        return exits.INTERRUPTED
    except OSError as error:
        print(f"xact: error: {why_not(error)}", file=sys.stderr)
        return exits.FAILED


if __name__ == "__main__":
    sys.exit(main())
