"""BLiMP as local tasks for `xact eval --tasks blimp_full --include-path OUT`, without a network.

    git clone https://github.com/alexwarstadt/blimp        (67 files of 1000 sentence pairs each, CC-BY 4.0)
    python tools/blimp_tasks.py blimp/data OUT

Writes one lm-evaluation-harness task per file, and a group with the mean of their accuracies. A pair counts as right
when the acceptable sentence gets the larger summed log-probability, as in the harness' own `blimp` (which puts a space
before each sentence). The data stay in place. Any folder of .jsonl files with `sentence_good` and `sentence_bad` will
do; numbers of a subset (BabyLM's filtered BLiMP) do not compare with those of the full one: give it its own --group.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

FIELDS = ("sentence_good", "sentence_bad")


def task(name: str, file: Path) -> dict:
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(file.resolve())}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "",
        "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
        "doc_to_target": 0,
        "num_fewshot": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }


def group(name: str, tasks: list[str]) -> dict:
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": False}
    return {"group": name, "task": tasks, "aggregate_metric_list": [mean], "metadata": {"version": 1.0}}


def write(source: Path, out: Path, name: str = "blimp_full") -> list[str]:
    """Names of the tasks written to `out`. ValueError: no pairs in `source`, or a file without the two fields."""
    files = sorted(source.glob("*.jsonl"))
    if not files:
        raise ValueError(f"{source} holds no .jsonl files; the pairs of a BLiMP checkout lie in its data folder")
    tasks = {f"{name}_{file.stem}": file for file in files}
    for file in files:
        with open(file, encoding="utf-8") as lines:
            first = json.loads(next(lines, "{}"))
        if missing := [field for field in FIELDS if field not in first]:
            raise ValueError(f"{file} has no {' and no '.join(missing)}; it is not a file of BLiMP pairs")
    out.mkdir(parents=True, exist_ok=True)
    for one, file in tasks.items():
        (out / f"{one}.yaml").write_text(json.dumps(task(one, file), indent=2) + "\n")  # JSON is YAML
    (out / f"{name}.yaml").write_text(json.dumps(group(name, list(tasks)), indent=2) + "\n")
    return list(tasks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder with the .jsonl files")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the task files")
    parser.add_argument("--group", default="blimp_full", metavar="NAME", help="of the group (default: blimp_full)")
    args = parser.parse_args()
    try:
        tasks = write(args.source, args.out, args.group)
    except (ValueError, OSError) as error:
        print(f"blimp_tasks: error: {error}", file=sys.stderr)
        return 2
    print(f"{len(tasks)} tasks in {args.out}: xact eval FOLDER --tasks {args.group} --include-path {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
