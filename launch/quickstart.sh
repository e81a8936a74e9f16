#!/usr/bin/env bash
# From a clean clone to a small xIELU language model, in minutes and without a GPU.
set -euo pipefail

usage() {
    cat <<'END'
usage: bash launch/quickstart.sh [--fresh] [--source WHAT] [--out FOLDER] [any flag of `xact pretrain`]

Makes the environment (.venv), builds a corpus and a BPE tokenizer, pretrains the model of configs/quickstart.toml
through Megatron with tensor parallelism 2 (NCCL where GPUs are, else gloo on the CPU), measures its validation
perplexity, plots loss and alphas, exports the model to Hugging Face, verified, and prints a sample that transformers
generates from it. Run again, it resumes or reuses what is there.

  --source WHAT   the corpus: stdlib (default: the text of this Python's standard library), a folder of text, a .txt,
                  .jsonl (.gz, .zst) or .parquet file, a pattern of such files, or a Hugging Face dataset
                  org/name[:config][@split]
  --out FOLDER    where everything goes (default: runs/quickstart, with another source runs/quickstart-SOURCE)
  --fresh         delete FOLDER and start over
  other flags     override the config, e.g. --train-iters 1000, --set activation.name=xiprelu, --print-args

  bash launch/quickstart.sh --out runs/relu2 --set activation.name=relu2     # the same with another activation
END
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source_=stdlib out="" fresh="" only_print=""
overrides=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --fresh) fresh=--fresh; shift ;;
        --source | --out)
            [ $# -ge 2 ] || { echo "quickstart: error: $1 needs a value (--help)" >&2; exit 2; }
            if [ "$1" = --source ]; then source_=$2; else out=$2; fi
            shift 2 ;;
        --print-args) only_print=1; overrides+=("$1"); shift ;;
        *) overrides+=("$1"); shift ;;
    esac
done
if [ -z "$out" ]; then
    out=runs/quickstart
    # Another corpus is another run: resuming a model on it would mix the two.
    [ "$source_" = stdlib ] || out+=-$(basename "$source_" | tr -c 'A-Za-z0-9.\n' -)
fi
if [ -n "$fresh" ] && [ -e "$out" ]; then
    if [ ! -f "$out/data/data.json" ] && [ ! -f "$out/config.toml" ]; then
        echo "quickstart: error: $out holds no run of this script; --fresh would delete it. Name another --out" >&2
        exit 2
    fi
fi

start=$SECONDS
bash launch/env.sh
installed=$SECONDS
export PATH="$PWD/.venv/bin:$PATH"
if [ -n "$fresh" ] && [ -e "$out" ]; then
    python - "$out" <<'END'  # not under the feet of a run that is at work there
import subprocess, sys
from pathlib import Path
from megatron_xact.pretraining.exits import TAKEN
from megatron_xact.pretraining.taking import Taken, taking

try:
    with taking(Path(sys.argv[1])):
        subprocess.run(["rm", "-rf", "--", sys.argv[1]], check=True)
except Taken as error:
    print(f"quickstart: error: {error}", file=sys.stderr)
    sys.exit(TAKEN)
END
fi
xact data prepare --source "$source_" --out "$out/data" $fresh
xact pretrain configs/quickstart.toml --quiet \
    --train-data-path "$out/data/train_text_document" --valid-data-path "$out/data/validation_text_document" \
    --tokenizer-model "$out/data/tokenizer" --save "$out" --load "$out" ${overrides[@]+"${overrides[@]}"}
[ -z "$only_print" ] || exit 0
echo
rm -rf "$out/hugging-face"  # made anew from the checkpoint
xact export "$out" "$out/hugging-face"
echo "sample by transformers, from the exported model:"
xact generate "$out/hugging-face" --prompt $'def read_lines(path):\n' --tokens 120
echo
echo "quickstart   $((SECONDS - installed)) s, and $((installed - start)) s for the environment"
