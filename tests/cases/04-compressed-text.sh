#!/usr/bin/env bash
# A folder of compressed jsonl (as most corpora are published) beside a text file. Wanted: the compressed files are read, or their being left out is said.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
mkdir data; prose a.jsonl; for i in 1 2 3; do gzip -c a.jsonl >"data/part-$i.jsonl.gz"; done
"$PYTHON" -P -c "import json; [print(json.loads(line)['text']) for line in open('a.jsonl')]" >data/README.txt
speedrun prepare --data data --out out "${TINY[@]}" >log 2>&1; rc=$?
tail -3 log; [ "$rc" = 0 ] && grep -q "3 .gz" log; verdict $? "exit $rc, the three .gz files are named"
