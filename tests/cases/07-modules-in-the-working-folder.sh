#!/usr/bin/env bash
# The command is given in a folder with files that are named like our modules or Python's own: nobody imports them.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
mkdir here
for name in model job random queue secrets; do
    echo 'open("../imported", "a").write(__name__ + "\n"); raise SystemExit("imported from the working folder")' >"here/$name.py"
done
(cd here && speedrun run --data ../text.jsonl --out ../out --run-id r "${TINY[@]}") >log 2>&1
code=$?
tail -n 1 log
[ $code = 0 ] && [ ! -e imported ]
verdict $? "exit $code; imported from the working folder: $(cat imported 2>/dev/null || echo nothing)"
