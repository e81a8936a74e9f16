"""`xact data`: the arguments and their help. Light on purpose; the work is imported when it is asked for."""

import argparse
import time

DESCRIPTION = """\
Turn text into training data for Megatron: split the documents into train and validation, train a byte-level
BPE tokenizer on the train split, and write both splits as .bin/.idx files with a data.json about them."""

EPILOG = """\
examples:
  the sources of this Python's standard library, into ./data:
    xact data
  every text file below a folder, one document each, with a larger vocabulary:
    xact data --source ~/books --out data/books --vocab-size 16384
  one document per line, the text under "content":
    xact data --source corpus.jsonl.gz --text-key content --out data/corpus
  streamed from the Hugging Face hub, as org/name:config@split:
    xact data --source HuggingFaceFW/fineweb-edu:sample-10BT@train --max-mb 500 --out data/edu
  with a tokenizer you have, instead of training one:
    xact data --source ~/books --tokenizer ~/llama-tokenizer --out data/books-llama

written to --out:
  train_text_document.bin/.idx   validation_text_document.bin/.idx   tokenizer/   data.json

The same command again reuses the folder; other settings or a changed source build it again. An interrupted
run leaves nothing under these names. Train on it with the flags that are printed at the end."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments and the help of `xact data`."""
    parser.description = DESCRIPTION
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--source",
        default="stdlib",
        metavar="WHAT",
        help="stdlib, a folder, a .txt, .jsonl, .jsonl.gz or .parquet file, or a Hugging Face dataset "
        "org/name[:config][@split] (default: stdlib)",
    )
    parser.add_argument("--out", default="data", metavar="FOLDER", help="where the data goes (default: data)")
    parser.add_argument(
        "--vocab-size",
        type=int,
        metavar="N",
        help="tokens of the tokenizer to train, from 258 up (default: 4096)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="use this tokenizer (a folder with tokenizer.json, or the file) and train none",
    )
    parser.add_argument(
        "--max-mb",
        type=float,
        metavar="MB",
        help="read at most this much text, in 10^6 bytes of UTF-8 (default: everything)",
    )
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="where records (.jsonl, .parquet, datasets) keep their text (default: text)",
    )
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents held out, chosen by their content (default: 0.05)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the file order and the split (default: 0)"
    )
    parser.add_argument("--fresh", action="store_true", help="build again even if nothing changed")


def main(args: argparse.Namespace) -> int:
    """Do what `add_arguments` describes; ValueError, in one line, for what the user can put right."""
    if args.tokenizer is not None and args.vocab_size is not None:
        raise ValueError("--vocab-size is for a tokenizer to be trained; with --tokenizer it has no meaning")

    from megatron_xact.pretraining.data.preprocess import VOCAB_SIZE, prepare

    start = time.monotonic()
    made = prepare(
        args.out,
        source=args.source,
        vocab_size=VOCAB_SIZE if args.vocab_size is None else args.vocab_size,
        tokenizer=args.tokenizer,
        validation_fraction=args.validation_fraction,
        text_key=args.text_key,
        max_bytes=None if args.max_mb is None else int(args.max_mb * 1e6),
        seed=args.seed,
        fresh=args.fresh,
    )
    print(made.summary())
    print("  Megatron   " + " ".join(made.megatron_arguments()))
    if not made.reused:
        print(f"  took       {time.monotonic() - start:.0f} s")
    return 0
