"""The tokenizer of a model as files: found, copied, and asked for its size and special tokens."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from megatron_xact.checkpoints.json_files import read_object

GENERATION = "generation_config.json"
FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", GENERATION,
)  # fmt: skip
KINDS = ("bos_token", "eos_token", "pad_token")
IDS = "token_ids.json"
"""Beside an imported model's tokenizer: the special ids of its config.json, which need not be the tokenizer's."""


@dataclass(frozen=True)
class TokenizerFiles:
    folder: Path
    size: int
    """Number of ids, without any padding."""
    special: dict[str, int | list[int] | None]
    """bos_token_id, eos_token_id and pad_token_id; None where there is none."""

    def copy(self, out: Path) -> None:
        for name in FILES:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, out / name)


def of_folder(folder: Path) -> TokenizerFiles:
    """ValueError: `folder` is not a fast Hugging Face tokenizer's."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"no tokenizer: {folder} has no tokenizer.json; name the tokenizer's folder with --tokenizer")
    content = read_object(path)
    try:
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # Unigram: [piece, score] by id
            vocabulary = {piece: i for i, (piece, _) in enumerate(vocabulary)}
        ids = vocabulary | {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    except (KeyError, TypeError, ValueError):
        ids = {}
    if not ids:
        raise ValueError(f"{path} has no vocabulary that is known here")
    config = folder / "tokenizer_config.json"
    names = read_object(config) if config.is_file() else {}
    special = {}
    for kind in KINDS:
        token = names.get(kind)
        token = token["content"] if isinstance(token, dict) else token
        special[f"{kind}_id"] = ids.get(token)
    if (folder / IDS).is_file():
        special |= read_object(folder / IDS)
    return TokenizerFiles(folder, max(ids.values()) + 1, special)


def keep_ids(model: Path, out: Path) -> None:
    """The special ids that `model`'s config.json gives, kept beside the tokenizer in `out`; none of a Megatron run."""
    if (model / "config.json").is_file():
        config = read_object(model / "config.json")
        ids = {f"{kind}_id": config[f"{kind}_id"] for kind in KINDS if f"{kind}_id" in config}
        (out / IDS).write_text(json.dumps(ids) + "\n", encoding="utf-8")


def of_checkpoint(args: Namespace, checkpoint: Path) -> TokenizerFiles:
    """The one a run was trained with. Its path may be relative to where the run was started: it is looked for from the
    current folder and from those above the checkpoint. ValueError: it is not there."""
    named = getattr(args, "tokenizer_model", None)
    if not named or getattr(args, "tokenizer_type", None) != "HuggingFaceTokenizer":
        used = " ".join(filter(None, (getattr(args, "tokenizer_type", None), named))) or "none"
        raise ValueError(f"no tokenizer: the run used {used}; name a Hugging Face one's folder with --tokenizer")
    for base in (Path(), *checkpoint.absolute().parents):
        if (base / named).is_dir():
            return of_folder(base / named)
    raise ValueError(f"no tokenizer: {named} (the run's) is not a folder here; name the tokenizer's with --tokenizer")
