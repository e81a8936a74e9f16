"""What `xact verify` found, as text, as one line and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from megatron_xact.checkpoints.trace import Difference


@dataclass
class Report:
    """What was compared and found. `same` only if every check that ran agrees; `skipped` says what did not run."""

    a: str
    b: str
    tolerance: float
    tensors: int = 0
    tensors_differing: list[str] = field(default_factory=list)
    text_tokens: int = 0
    logits_difference: float | None = None
    first_token: str | None = None
    first_module: Difference | None = None
    continuation: str | None = None
    notes: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def same(self) -> bool:
        return not self.problems

    def json(self) -> str:
        return json.dumps({"same": self.same, **asdict(self)}, indent=2)

    def summary(self) -> str:
        """One line."""
        if not self.same:
            where = f"; first differing module: {self.first_module}" if self.first_module else ""
            return "; ".join(self.problems[:3]) + where
        found = [f"{self.tensors} tensors equal"]
        if self.logits_difference is not None:
            found.append(f"fp32 logits within {self.logits_difference:.1e} on {self.text_tokens} tokens")
        if self.continuation:
            found.append(self.continuation.partition(":")[0])
        return "; ".join([*found, *self.skipped])

    def text(self) -> str:
        lines = [f"A  {self.a}", f"B  {self.b}"]
        equal = self.tensors - len(self.tensors_differing)
        lines.append(f"tensors       {equal} of {self.tensors} equal, bit for bit")
        if self.logits_difference is not None:
            lines.append(
                f"logits        largest difference {self.logits_difference:.3g} on {self.text_tokens} tokens "
                f"(tolerance {self.tolerance:g})"
            )
        if self.continuation:
            lines.append(f"continuation  {self.continuation}")
        lines += [f"note          {note}" for note in self.notes]
        lines += [f"not checked   {reason}" for reason in self.skipped]
        lines += [f"DIFFERENT     {problem}" for problem in self.problems]
        if self.first_module:
            lines.append(f"              first differing module: {self.first_module}")
        if self.first_token:
            lines.append(f"              first differing token: {self.first_token}")
        return "\n".join([*lines, f"{'SAME' if self.same else 'DIFFERENT'} ({self.seconds:.0f} s)"])
