"""The self-contained model, exported where transformers has no class: its file, and what fills in its activation.

`modeling_xact.py` imports only torch and transformers, since it is copied into the exported folder and runs there
(`trust_remote_code=True`). It is a template: the part between two marker lines is the code of one activation, taken
from the sources of its record and not written again by hand.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

from megatron_xact.activations import Activation
from megatron_xact.checkpoints.architecture import record

MODELING_FILE = "modeling_xact.py"
BEGIN = "# >>> the activation, from its record in megatron-xact\n"
END = "# <<< the activation\n"
_HOME = "megatron_xact.activations"


def modeling_source(activation: Activation) -> str:
    """The text of modeling_xact.py for a model with this activation."""
    template = (Path(__file__).parent / MODELING_FILE).read_text(encoding="utf-8")
    before, rest = template.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + activation_code(activation) + END + after


def activation_code(activation: Activation) -> str:
    """Python code that defines NAME, GATED, PARAMETERS and value(x, p), using only torch, math and dataclass."""
    definitions: dict[str, str] = {}
    if activation.eps:
        _define(activation.clamped, definitions)
        value = f"{activation.clamped.__name__}(x, p, {activation.eps!r})"
    else:
        value = f"{_expression(activation.maths, definitions)}.value(x, p)"
    symbols = {q.name: q.symbol for q in activation.parameters}
    head = [
        f"NAME, GATED = {activation.name!r}, {activation.gated}",
        f"IN_FP32 = {not activation.eps}  # or in the dtype of x, rounding after each operation",
        f"# {activation.formula}",
        "# symbol: (name, bound b of effective = b + softplus(raw), None: raw; value if fixed, None: trained)",
        "PARAMETERS = {",
        *(
            f"    {q.symbol!r}: ({q.name!r}, {symbols.get(q.lower, q.lower)!r}, {None if q.trainable else q.init!r}),"
            for q in activation.parameters
        ),
        "}\n",
    ]
    parts = ["\n".join(head), *definitions.values(), f"def value(x, p):\n    return {value}\n"]
    return "\n" + "\n\n".join(parts) + "\n\n"


def is_ours(folder: Path) -> bool:
    """Is an exported folder's modeling file, to the byte, the one that we would write? Then its code is trusted."""
    file, config = folder / MODELING_FILE, folder / "config.json"
    if not file.is_file() or not config.is_file():
        return False
    try:
        identity = json.loads(config.read_text(encoding="utf-8"))["activation"]
        return file.read_text(encoding="utf-8") == modeling_source(record(identity))
    except (KeyError, TypeError, ValueError):
        return False


def _expression(thing: object, definitions: dict[str, str]) -> str:
    """Code for a record's maths: dataclass instances, functions and numbers."""
    if is_dataclass(thing):
        _define(type(thing), definitions)
        inside = (f"{f.name}={_expression(getattr(thing, f.name), definitions)}" for f in fields(thing))
        return f"{type(thing).__name__}({', '.join(inside)})"
    if callable(thing):
        _define(thing, definitions)
        return thing.__name__
    return repr(thing)


def _define(thing: Callable, definitions: dict[str, str]) -> None:
    """Add the source of a function or class of the activations, after what it needs."""
    if thing.__name__ in definitions:
        return
    source = textwrap.dedent(inspect.getsource(thing))
    known = vars(sys.modules[thing.__module__])
    for name in sorted({node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}):
        needed = known.get(name)
        if isinstance(needed, int | float):
            definitions[name] = f"{name} = {needed!r}\n"
        elif getattr(needed, "__module__", "").startswith(_HOME) and _is_code(needed) and needed is not thing:
            _define(needed, definitions)
    definitions[thing.__name__] = source


def _is_code(thing: object) -> bool:
    return inspect.isfunction(thing) or (inspect.isclass(thing) and not getattr(thing, "_is_protocol", False))
