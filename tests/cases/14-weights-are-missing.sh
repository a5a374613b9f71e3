#!/usr/bin/env bash
# Half of a checkpoint: a tensor is not in the file. transformers makes numbers up for it, others each time. Wanted: a sentence.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
export PYTHONPATH=$ROOT:$ROOT/tests/cases TRANSFORMERS_VERBOSITY=error
"$PYTHON" - >said 2>log <<'P'
from foreign import refused, saved
from safetensors.torch import load_file, save_file
saved("model")
file = "model/model.safetensors"
weights = {name: weight for name, weight in load_file(file).items() if not name.endswith("h.1.mlp.c_proj.weight")}
save_file(weights, file, metadata={"format": "pt"})
refused("model")
P
verdict $? "$(tail -1 said)"
