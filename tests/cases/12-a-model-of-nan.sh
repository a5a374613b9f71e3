#!/usr/bin/env bash
# A fine-tune that went wrong: one weight is NaN, and every logit with it. Wanted: a sentence, and not the score of whoever always takes the first answer.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
export PYTHONPATH=$ROOT:$ROOT/tests/cases TRANSFORMERS_VERBOSITY=error
"$PYTHON" - >said 2>log <<'P'
from foreign import refused, saved
model = saved("model")
model.transformer.h[0].mlp.c_fc.weight.data[0, 0] = float("nan")
model.save_pretrained("model")
refused("model")
P
verdict $? "$(tail -1 said)"
