# Sourced by the cases: what a user might do, in a folder of its own, with one line at the end that says PASS or FAIL. Run one from anywhere:
# tests/cases/07-modules-in-the-working-folder.sh. SPEEDRUN is the command under test (default: that of .venv).
set -u
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
SPEEDRUN=${SPEEDRUN:-$ROOT/.venv/bin/speedrun}
PYTHON=$(dirname "$SPEEDRUN")/python
export WANDB_MODE=disabled
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK" || exit 1

# a run of seconds
TINY=()
for value in model.depth=2 model.seq_len=64 data.vocab_size=400 train.steps=4 train.total_batch_size=256 train.device_batch_size=4 \
    train.val_every=0 train.checkpoint_every=2 train.val_tokens=1024 eval.samples=1 eval.sample_tokens=4 eval.cap=12; do
    TINY+=(-o "$value")
done

speedrun() { timeout 300 "$SPEEDRUN" "$@"; }

# some prose as jsonl, in the file that is named
prose() {
    "$PYTHON" -P -c 'import json, pydoc_data.topics as t
for name, text in sorted(t.topics.items()):
    print(json.dumps({"text": text}))' >"$1"
}

verdict() { # verdict STATUS WORDS
    if [ "$1" = 0 ]; then echo "PASS: $2"; else echo "FAIL: $2"; exit 1; fi
    exit 0
}
