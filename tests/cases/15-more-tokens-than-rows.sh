#!/usr/bin/env bash
# Tokens were added to the tokenizer and the model's table was not resized. Wanted: a sentence.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
export PYTHONPATH=$ROOT:$ROOT/tests/cases TRANSFORMERS_VERBOSITY=error
"$PYTHON" - >said 2>log <<'P'
from foreign import refused, saved
saved("model", vocabulary=100)
refused("model")
P
verdict $? "$(tail -1 said)"
