#!/usr/bin/env bash
# A rank that dies of a signal as soon as it trains: twice "resume me", and then a code that nobody starts again on, saying who died of what.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
mkdir site
cat >site/sitecustomize.py <<'P'
import os
words = open("/proc/self/cmdline").read().split("\0")
if "pretrain" in words and os.environ.get("RANK") == "0":
    os.kill(os.getpid(), 11)
P
codes=""
for _ in 1 2 3 4; do
    PYTHONPATH=$PWD/site speedrun run --preset smoke --data text.jsonl --out out --run-id r "${TINY[@]}" >log 2>&1
    codes="$codes $?"
done
last=$(tail -n 1 log)
echo "$last"
[ "$codes" = " 75 75 15 15" ] && [[ $last == "speedrun: rank 0 of pretrain was killed by SIGSEGV, in the fourth attempt in a row"* ]]
verdict $? "exit codes$codes"
