"""One section, or a part of it, in this process: writes what it finds to a file, the last time how it ended."""

from __future__ import annotations

import argparse
import traceback
from pathlib import Path

import torch

from tools.gpu import timing
from tools.gpu.context import Context, Entries, Failure, Skip
from tools.gpu.processes import Ended
from tools.gpu.sections import SECTIONS, Section


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--part", type=int, default=0)
    parser.add_argument("--parts", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", required=True)
    parser.add_argument("file", type=Path)
    args = parser.parse_args()
    run(SECTIONS[args.section], Context(torch.device(args.device), args.quick, args.part, args.parts), args.file)


def run(section: Section, context: Context, file: Path) -> Entries:
    """status: ok, or "missed" a target, or "skipped", or "FAILED"; said: one line."""
    data = Entries(file)
    data.save()
    try:
        if section.timed:
            data["clocks before"] = timing.clocks_under_load(context)
        said = section.run(context, data)
        if section.timed:
            data["clocks after"] = timing.clocks_under_load(context)
        status = "ok" if met(data) else "missed"
    except Skip as why:
        status, said = "skipped" if met(data) else "missed", str(why)
    except Ended as why:
        data["output"] = why.output
        status, said = "FAILED", str(why)
    except Failure as why:
        status, said = "FAILED", str(why)
    except Exception as error:
        traceback.print_exc()
        status, said = "FAILED", timing.reason(error)
    data.save(status=status, said=said)
    return data


def met(data: Entries) -> bool:
    return all(target["met"] for target in data.targets.values())


if __name__ == "__main__":
    main()
