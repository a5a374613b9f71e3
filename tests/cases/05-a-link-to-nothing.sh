#!/usr/bin/env bash
# A dangling symbolic link among the shards (a download cache that is half there). Wanted: an error or a warning that names it, not a quietly smaller corpus.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
mkdir data; prose data/a.jsonl; ln -s /nowhere/blob data/b.jsonl
speedrun prepare --data data --out out "${TINY[@]}" >log 2>&1; rc=$?
tail -3 log; grep -q "b.jsonl" log; verdict $? "exit $rc, b.jsonl is named: $(grep -c b.jsonl log)"
