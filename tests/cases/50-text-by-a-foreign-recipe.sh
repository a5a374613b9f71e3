#!/usr/bin/env bash
# Somebody else's recipe.json in a shared bucket names a folder of this machine. Wanted: `evaluate` neither reads nor uploads what is in it.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
mkdir -p mine bucket/runs/theirs
"$PYTHON" -P - "$PWD/mine" <<'P'
import json, pathlib, sys
from pydoc_data.topics import topics
from job.recipe.config import resolve
from job.run.launch import recipe_document
from job.store.documents import hashed
for number, text in enumerate(topics.values()):
    pathlib.Path(sys.argv[1], f"{number}.txt").write_text("FOR-NOBODY-ELSE " + text)
values = ["model.depth=1", "model.seq_len=64", "data.vocab_size=300", "data.val_fraction=0.5", "train.steps=4"]
document = recipe_document(resolve("smoke", {}, [*values, "train.total_batch_size=256", "train.device_batch_size=4"]), "theirs")
document["recipe"]["data"] |= {"source": "local", "paths": [sys.argv[1]]}
document.pop("sha256", None)
pathlib.Path("bucket/runs/theirs/recipe.json").write_text(json.dumps(hashed(document)))
P
[ -s bucket/runs/theirs/recipe.json ] || verdict 1 "no recipe was made"
speedrun evaluate --run-id theirs --bucket ./bucket --out out >said 2>&1
code=$?
tail -2 said | cut -c1-250
grep -rq FOR-NOBODY-ELSE bucket && verdict 1 "it is in the bucket"
[ $code = 11 ]
verdict $? "exit $code"
