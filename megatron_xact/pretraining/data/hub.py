"""What comes from the Hugging Face hub: the rows of a dataset, streamed, and the files of a tokenizer."""

import re
from collections.abc import Iterator
from pathlib import Path

from megatron_xact.installed import extra
from megatron_xact.pretraining.data.documents import Record, text_of_row

NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"  # org/name
EXTRA = extra("data")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def rows(
    name: str, config: str | None, split: str, text_key: str, position: dict | None = None
) -> Iterator[tuple[Record, dict]]:
    """(record, position after it) of a dataset on the hub, or of a folder that `datasets` understands, streamed.

    From a position on, without the files that lie before it. ValueError: no such dataset, or no text in a row;
    ConnectionError: it could be read before and no longer can.
    """
    number = position["row"] if position else 0
    for row, state in _stream(name, config, split, position and position["state"]):
        where = f"{name}@{split}, row {number}"
        number += 1
        yield Record(where, text_of_row(row, text_key, where)), {"row": number, "state": state}


def _stream(name: str, config: str | None, split: str, state: dict | None) -> Iterator[tuple[dict, dict]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"reading the dataset {name} needs the package `datasets`: {EXTRA}") from None
    begun = state is not None
    try:
        dataset = datasets.load_dataset(name, config, split=split, streaming=True)
        if begun:
            dataset.load_state_dict(state)
        for row in dataset:
            begun = True
            yield row, dataset.state_dict()
    except Exception as error:  # the hub, http and file layers each raise kinds of their own, with long texts
        if begun:
            raise ConnectionError(f"{name} can no longer be read: {_first_line(error)}; try again later") from error
        raise ValueError(
            f"{name} is no file or folder here, and cannot be read as a Hugging Face dataset: {_first_line(error)}"
        ) from error


def tokenizer(name: str) -> Path:
    """A folder with the tokenizer files of `org/name`, downloaded or from the cache. ValueError: from neither."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except Exception as error:  # as above
        raise ValueError(
            f"no tokenizer at {name}: no such folder here, and not to be had from the Hugging Face hub: "
            f"{_first_line(error)}"
        ) from error


def is_name(given: str) -> bool:
    """Whether `given` can mean something on the hub: org/name, which beside a folder org is a missing folder."""
    return re.fullmatch(NAME, given) is not None and not Path(given).parent.is_dir()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
