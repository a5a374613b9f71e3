#!/usr/bin/env bash
# The command is given in a folder with files that are named like our modules or Python's own: nobody imports them.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
mkdir here
for name in model job random queue secrets; do
    echo 'open("../imported", "a").write(__name__ + "\n"); raise SystemExit("imported from the working folder")' >"here/$name.py"
done
# and an empty entry of PYTHONPATH, as `export PYTHONPATH=$PYTHONPATH:/x` leaves it, does not put the folder before Python's modules
(cd here && PYTHONPATH=":$ROOT" PYTHONSAFEPATH=1 "$PYTHON" -c '
import sys
sys.path[:] = [entry for entry in sys.path if entry]
from job.cli import main
main()' pretrain --data ../text.jsonl --out ../with-an-empty-entry "${TINY[@]}") >log 2>&1
empty=$?
(cd here && speedrun run --data ../text.jsonl --out ../out --run-id r "${TINY[@]}") >>log 2>&1
code=$?
tail -n 1 log
[ $code = 0 ] && [ $empty = 0 ] && [ ! -e imported ]
verdict $? "exits $code $empty; imported from the working folder: $(cat imported 2>/dev/null || echo nothing)"
