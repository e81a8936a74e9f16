#!/usr/bin/env bash
# Runs every test this machine can run, in the repository's own environment (made if missing), and says which
# were skipped and why. Arguments go to pytest: bash tests/run.sh tests/unit -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash launch/env.sh test,data,deepspeed

# Ranks of distributed tests set their own number; a single process gains little beyond two cores here.
cores=$(.venv/bin/python -c 'import os; print(len(os.sched_getaffinity(0)))')  # a job's or a container's may be few
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores < 2 ? cores : 2))}

# -rs: one line per skipped test with its reason
tests() { .venv/bin/python -m pytest -rs "$@" || code=$?; }

code=0
if [ $# -gt 0 ]; then
    tests "$@"
else
    # A thread each: more than there are cores would spin while they wait, and take a third more time in all.
    OMP_NUM_THREADS=1 tests -n "$((cores < 8 ? cores : 8))" --dist loadfile -m "not alone" tests
    tests -m alone tests/distributed tests/slurm
fi
case $code in
    0) echo "tests/run.sh: passed (skipped tests, if any, are listed above with their reasons)" ;;
    5) echo "tests/run.sh: no test was selected" >&2 ;;
    *) echo "tests/run.sh: FAILED (pytest exit code $code)" >&2 ;;
esac
exit "$code"
