#!/usr/bin/env bash
# recipe.json is of an older version, which lacked a key, or empty after a power cut. Wanted: the older one is used; of the empty one each command says a sentence.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
prose text.jsonl
train=(pretrain --data text.jsonl --out out --run-id r "${TINY[@]}")
speedrun "${train[@]}" >said 2>&1 || verdict 1 "the run failed: $(tail -1 said)"
recipe=out/runs/r/recipe.json
"$PYTHON" - $recipe <<'P'
import json, pathlib, sys
file = pathlib.Path(sys.argv[1])
document = json.loads(file.read_text())
del document["recipe"]["train"]["attention"], document["sources"]["train.attention"]
document.pop("sha256", None)
file.write_text(json.dumps(document))
P
all() {
    for words in "evaluate --run-id r --out out" "report --run-id r --out out" "${train[*]}"; do
        speedrun $words >said 2>&1
        code=$?
        [ "$code" = "$1" ] || verdict 1 "${words%% *}: exit $code: $(tail -1 said)"
        ! grep -q ^Traceback said || verdict 1 "${words%% *}: a traceback"
    done
}
all 0
: >$recipe
all 11
verdict 0 "both"
