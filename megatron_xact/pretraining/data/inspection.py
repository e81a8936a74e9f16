"""`xact data inspect`: what training data holds, told from its indexes and a few documents.

The tokens of a large corpus are never read as a whole: lengths come from the index, and whether documents end with
EOD and ids fit the tokenizer from documents spread evenly over the file.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_xact.pretraining.data import indexed, manifest
from megatron_xact.pretraining.data import tokenizer as bpe
from megatron_xact.pretraining.data.indexed import Index
from megatron_xact.pretraining.data.tokenizer import Encoder

LOOKED_AT = 1000  # documents
LENGTHS = 1 << 24  # more than these are sampled evenly for the quantiles
QUANTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True)
class Description:
    """Of one dataset. `quantiles` are tokens per document at QUANTILES, in percent."""

    prefix: Path
    documents: int
    tokens: int
    dtype: str
    bin_bytes: int
    quantiles: list[int]
    looked_at: int
    ended_by_eod: int | None  # of those looked at; None without a tokenizer
    highest_id: int  # in those looked at


def inspect(target: str, tokenizer: str | None = None, document: int = 0, num_tokens: int = 100) -> str:
    """The report on a prefix, a folder or a config, with `num_tokens` of one document. ValueError, OSError."""
    if target.endswith(".toml"):
        from megatron_xact.pretraining.data import blend  # Megatron's arguments: seconds

        plan = blend.plan(target)
        prefixes, text, given = plan.prefixes(), blend.table(plan), tokenizer or plan.tokenizer
    else:
        prefixes, text, given = _prefixes(Path(target).expanduser()), "", tokenizer
    parts = [text] if text else []
    for prefix in prefixes:
        index = indexed.read_index(prefix)
        encoder = _encoder(prefix, given)
        parts.append(_told(describe(index, encoder), encoder) + _sample(index, encoder, document, num_tokens))
    return "\n\n".join(parts)


def describe(index: Index, encoder: Encoder | None) -> Description:
    lengths = index.document_lengths()
    sampled = lengths[:: max(1, len(lengths) // LENGTHS)]
    quantiles = np.percentile(sampled, QUANTILES).astype(int).tolist() if len(sampled) else [0] * len(QUANTILES)
    if len(lengths):
        quantiles[0], quantiles[-1] = int(lengths.min()), int(lengths.max())
    chosen = np.unique(np.linspace(0, index.documents - 1, min(LOOKED_AT, index.documents)).astype(int))
    documents = [index.document(number) for number in chosen]
    filled = [ids for ids in documents if len(ids)]
    return Description(
        index.prefix,
        index.documents,
        len(index.tokens),
        index.tokens.dtype.name,
        index.tokens.nbytes,
        quantiles,
        len(documents),
        None if encoder is None else sum(int(ids[-1]) == encoder.eod for ids in filled),
        max((int(ids.max()) for ids in filled), default=0),
    )


def _prefixes(path: Path) -> list[Path]:
    """All in a folder, or the one that is named, with or without its suffix."""
    if path.is_dir():
        found = sorted(file.with_suffix("") for file in path.glob("*.idx"))
        if not found:
            raise ValueError(f"no .idx files in {path}; name another folder, or make them: xact data prepare")
        return found
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not Path(f"{prefix}.idx").is_file():
        raise FileNotFoundError(f"no such file {prefix}.idx; give a prefix of .bin/.idx files, a folder, or a .toml")
    return [prefix]


def _encoder(prefix: Path, given: str | None) -> Encoder | None:
    """The tokenizer that is given, or else the one that was made with the data."""
    beside = prefix.parent / manifest.TOKENIZER
    if given is None and not (prefix.parent / manifest.NAME).is_file():
        return None
    return bpe.load(beside if given is None else bpe.locate(given))


def _told(d: Description, encoder: Encoder | None) -> str:
    quantiles = "  ".join(
        f"{'shortest' if q == 0 else 'longest' if q == 100 else f'{q} %'} {n:,}"
        for q, n in zip(QUANTILES, d.quantiles, strict=True)
    )
    seen = f"{d.looked_at:,} documents: highest id {d.highest_id:,}"
    if encoder is None:
        known = "none here; --tokenizer decodes"
    else:
        known = f"{encoder.vocab_size:,} tokens, EOD {encoder.eod}"
        seen += f", EOD ends {'all' if d.ended_by_eod == d.looked_at else f'{d.ended_by_eod:,}'}"
        if d.highest_id >= encoder.vocab_size:
            seen += ": NOT made with this tokenizer"
    return (
        f"{d.prefix}\n"
        f"  documents  {d.documents:,}, {d.tokens:,} tokens, {d.bin_bytes / 1e6:,.2f} MB ({d.dtype})"
        f"{_text_bytes(d.prefix)}\n"
        f"  tokens of a document  {quantiles}\n"
        f"  tokenizer  {known}\n"
        f"  looked at  {seen}\n"
    )


def _text_bytes(prefix: Path) -> str:
    if not (prefix.parent / manifest.NAME).is_file():
        return ""
    made = manifest.load(prefix.parent)
    split = {manifest.TRAIN: made.train, manifest.VALIDATION: made.validation}.get(prefix.name)
    return f", of {split.bytes / 1e6:,.2f} MB of text from {made.source}" if split else ""


def _sample(index: Index, encoder: Encoder | None, number: int, num_tokens: int) -> str:
    if num_tokens <= 0 or not index.documents:
        return ""
    if not 0 <= number < index.documents:
        raise ValueError(f"--document {number}: {index.prefix} has the documents 0 to {index.documents - 1}")
    ids = index.document(number)
    shown = ids[:num_tokens].tolist()
    decoded = " ".join(map(str, shown))
    if encoder is not None and max(shown, default=0) < encoder.vocab_size:
        decoded = encoder.backend.decode(shown, skip_special_tokens=False)
    first = f", the first {num_tokens:,}" if len(ids) > num_tokens else ""
    body = "".join(f"    {line}\n" for line in decoded.splitlines())
    return f"  document {number:,} ({len(ids):,} tokens{first})\n{body}".rstrip("\n")
