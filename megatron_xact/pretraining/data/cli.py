"""`xact data`: the arguments and their help. Light on purpose; the work is imported when it is asked for."""

import argparse
import re
import shlex
import time

PREPARE = """\
Turn text into training data for Megatron: split the documents into train and validation, train a byte-level
BPE tokenizer on the train split or take one, and write both splits as .bin/.idx files with a data.json about them."""

PREPARE_EPILOG = """\
examples:
  the sources of this Python's standard library, into ./data:
    xact data prepare
  every text file below a folder, one document each, with a larger vocabulary:
    xact data prepare --source ~/books --out data/books --vocab-size 16384
  one document per line, the text under "content", in many files:
    xact data prepare --source 'corpus/*.jsonl.zst' --text-key content --out data/corpus
  streamed from the Hugging Face hub, as org/name:config@split, with a tokenizer from there:
    xact data prepare --source HuggingFaceFW/fineweb-edu:sample-10BT --max-tokens 2G --out data/edu \\
        --tokenizer mistralai/Mistral-Nemo-Base-2407

written to --out:
  train_text_document.bin/.idx   validation_text_document.bin/.idx   tokenizer/   data.json

The same command again reuses the folder, or goes on where a stopped run was; other settings or a changed source
build it again. Nothing lies under these names before all of it is whole. The tokens do not depend on --workers.
Train on it with the flags that are printed at the end."""

INSPECT = """\
Show what training data holds: documents, tokens, lengths, a decoded sample; of a config, how often each part of its
blends is read. Only the indexes are read, and a few documents."""

INSPECT_EPILOG = """\
examples:
  xact data inspect data/books                                    a folder of `xact data prepare`
  xact data inspect corpus_text_document --tokenizer ~/tokenizer  any Megatron .bin/.idx
  xact data inspect configs/quickstart.toml --document 3          the blends of a config, with epochs"""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9, "T": 10**12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the arguments and the help of `xact data`."""
    parser.usage = "xact data prepare|inspect ... (each has a --help)"
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    for name, add, description, epilog in (
        ("prepare", _prepare_arguments, PREPARE, PREPARE_EPILOG),
        ("inspect", _inspect_arguments, INSPECT, INSPECT_EPILOG),
    ):
        add(
            actions.add_parser(
                name,
                help=description.split(":")[0],
                description=description,
                epilog=epilog,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                prog=f"xact data {name}",
                allow_abbrev=False,
            )
        )


def _prepare_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--source",
        default="stdlib",
        metavar="WHAT",
        help="stdlib, a folder, a .txt, .jsonl (.gz, .zst) or .parquet file, a pattern of such files, or a Hugging "
        "Face dataset org/name[:config][@split] (default: stdlib)",
    )
    add("--out", default="data", metavar="FOLDER", help="where the data goes (default: data)")
    add("--vocab-size", type=int, metavar="N", help="tokens of the tokenizer to train, from 258 up (default: 4096)")
    add(
        "--tokenizer",
        metavar="WHAT",
        help="use this tokenizer (a folder with tokenizer.json, the file, or a Hugging Face name) and train none",
    )
    add("--max-bytes", type=_amount, metavar="N", help="take at most this much UTF-8 text, e.g. 500M (default: all)")
    add("--max-tokens", type=_amount, metavar="N", help="take at most this many tokens, e.g. 10G (default: all)")
    add(
        "--text-key",
        default="text",
        metavar="KEY",
        help="where records (.jsonl, .parquet, datasets) keep their text (default: text)",
    )
    add(
        "--validation-fraction",
        type=float,
        default=0.05,
        metavar="F",
        help="share of the documents held out, chosen by their content (default: 0.05)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the file order and the split (default: 0)")
    add(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end every document with the tokenizer's end-of-text token (default: yes)",
    )
    add("--workers", type=int, metavar="N", help="processes that encode (default: one per core, fewer for little text)")
    add("--fresh", action="store_true", help="build again even if nothing changed, and drop what a stopped run left")


def _inspect_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("target", metavar="WHAT", help="a prefix of .bin/.idx files, a folder of them, or a config (.toml)")
    add("--tokenizer", metavar="WHAT", help="decode with this one (default: the one beside the data, or the config's)")
    add("--document", type=int, default=0, metavar="N", help="which document to show (default: 0)")
    add("--tokens", type=int, default=100, metavar="N", help="how many of its tokens (default: 100; 0: none)")


def _amount(text: str) -> int:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGBT]?)", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 300000, 500M or 1.5G")
    return int(float(found[1]) * UNITS[found[2]])


def main(args: argparse.Namespace) -> int:
    """Do what `add_arguments` describes; ValueError, in one line, for what the user can put right."""
    return {"prepare": _prepare, "inspect": _inspect}[args.action](args)


def _prepare(args: argparse.Namespace) -> int:
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
        max_bytes=args.max_bytes,
        max_tokens=args.max_tokens,
        seed=args.seed,
        append_eod=args.append_eod,
        num_workers=args.workers,
        fresh=args.fresh,
    )
    print(made.summary())
    print("  Megatron   " + shlex.join(made.megatron_arguments()))
    if not made.reused:
        print(f"  took       {time.monotonic() - start:.0f} s")
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from megatron_xact.pretraining.data.inspection import inspect

    print(inspect(args.target, args.tokenizer, args.document, args.tokens))
    return 0
