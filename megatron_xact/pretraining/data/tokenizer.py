"""The tokenizer: a byte-level BPE trained on the corpus, or one the user brings.

Either way the result is a folder `tokenizer/` as Hugging Face writes it, which transformers and Megatron's
`--tokenizer-type HuggingFaceTokenizer` load without a network. Ours has two special tokens: <|endoftext|>
ends documents; <|pad|> is never in the data, but Megatron fills short samples with it and masks their loss by
its id, so it must exist and not be EOD's.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_xact.pretraining.data import hub

EOD, PAD = "<|endoftext|>", "<|pad|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens
KNOWN_EODS = (EOD, "<|end_of_text|>", "</s>", "<eos>")  # looked for when a bare tokenizer.json does not say
COMPANIONS = ("special_tokens_map.json", "chat_template.jinja")


@dataclass(frozen=True)
class Encoder:
    """A tokenizer folder opened for encoding."""

    backend: Tokenizer
    eod: int
    vocab_size: int  # what Megatron sees before its padding
    sha256: str  # of tokenizer.json

    def encode(self, text: str, append_eod: bool = True) -> list[int]:
        """The ids of a text, ended by exactly one EOD if it is wanted."""
        ids = self.backend.encode_batch_fast([text], add_special_tokens=True)[0].ids  # the fast one keeps no offsets
        return [*ids, self.eod] if append_eod and ids[-1:] != [self.eod] else ids


def check_vocab_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"vocabulary size {vocab_size} is too small: a byte-level tokenizer needs at least "
            f"{SMALLEST_VOCABULARY} (256 bytes and {EOD}, {PAD})"
        )


def train(texts: Iterable[str], vocab_size: int, folder: Path) -> None:
    """Train a byte-level BPE of at most `vocab_size` tokens (fewer if the text has no more) into `folder`."""
    check_vocab_size(vocab_size)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_config(folder, EOD, PAD)


def adopt(given: Path, folder: Path) -> None:
    """Copy an existing tokenizer (a folder with tokenizer.json, or the file) into `folder`, its EOD named."""
    home = given if given.is_dir() else given.parent
    source = json_of(given)
    folder.mkdir(parents=True)
    shutil.copyfile(source, folder / "tokenizer.json")
    for name in COMPANIONS if given.is_dir() else ():
        if (home / name).is_file():
            shutil.copyfile(home / name, folder / name)
    if given.is_dir() and (home / "tokenizer_config.json").is_file():
        shutil.copyfile(home / "tokenizer_config.json", folder / "tokenizer_config.json")
        return
    vocabulary = _load(source).get_vocab(with_added_tokens=True)
    eod = next((token for token in KNOWN_EODS if token in vocabulary), None)
    if eod is None:
        raise ValueError(
            f"{source} has no end-of-document token: none of {' '.join(KNOWN_EODS)} is in it; "
            "give a folder whose tokenizer_config.json names its eos_token"
        )
    _write_config(folder, eod, PAD if PAD in vocabulary else None)


def locate(given: str | Path) -> Path:
    """Where a tokenizer is: a path that exists, or what the Hugging Face hub has under that name."""
    path = Path(given).expanduser()
    return hub.tokenizer(str(given)) if not path.exists() and hub.is_name(str(given)) else path


def json_of(given: Path) -> Path:
    """The tokenizer.json that a path to it or to its folder means."""
    path = given / "tokenizer.json" if given.is_dir() else given
    if not path.is_file() or path.suffix != ".json":
        raise ValueError(
            f"no tokenizer at {given}: expected a folder with tokenizer.json, such a file, or a name on the "
            "Hugging Face hub"
        )
    return path


def sha256_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(folder: Path) -> Encoder:
    """Open a tokenizer folder for encoding; ValueError where Megatron could not train with it."""
    path = json_of(folder)
    backend = _load(path)
    backend.no_truncation()
    backend.no_padding()
    # A document that spells a special token gets its characters, not the token: text cannot forge an EOD.
    backend.encode_special_tokens = True
    vocabulary = backend.get_vocab(with_added_tokens=True)
    eod = vocabulary.get(_eos_token(folder) or "")
    if eod is None:
        raise ValueError(f"{folder}/tokenizer_config.json: eos_token must name a token of the vocabulary")
    if max(vocabulary.values()) >= len(vocabulary):
        raise ValueError(
            f"{path}: ids go up to {max(vocabulary.values())} but there are {len(vocabulary)} tokens; "
            "Megatron sizes the embedding by the number of tokens, so ids must have no gaps"
        )
    return Encoder(backend, eod, len(vocabulary), sha256_of(path))


def refuse_another(made_with: Path, given: Path) -> None:
    """ValueError: ids that the first tokenizer's folder makes are other tokens in the second's.

    More tokens, and special ones with other names, make no other tokenizer: instructed models have them.
    """
    one, two = json_of(made_with), json_of(given)
    if sha256_of(one) == sha256_of(two):
        return
    made, there = _load(one), _load(two).get_vocab(with_added_tokens=True)
    special = {token.content for token in made.get_added_tokens_decoder().values()}
    vocabulary = made.get_vocab(with_added_tokens=False)
    others = [(i, token) for token, i in vocabulary.items() if token not in special and there.get(token) != i]
    if others:
        i, token = min(others)
        raise ValueError(
            f"tokenizer-model = {str(given)!r} is not the data's, {made_with}: {len(others):,} of their tokens, the "
            f"first {token!r} with id {i}, are not the same there; prepare the data with it, or train with theirs"
        )


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises plain Exception
        raise ValueError(f"{path} is not a tokenizer ({str(error).splitlines()[0]})") from None


def _eos_token(folder: Path) -> str | None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = folder / name
        if file.is_file():
            token = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
            if token:
                return token["content"] if isinstance(token, dict) else token
    return None


def _write_config(folder: Path, eod: str, pad: str | None) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eod,
        "clean_up_tokenization_spaces": False,  # true would change the text when decoding
    }
    if pad is not None:
        config["pad_token"] = pad
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
