#!/usr/bin/env bash
# A pipe to a program that ends, a dropped ssh session: the run goes on.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
speedrun pretrain --data text.jsonl --out out --run-id r "${TINY[@]}" -v 2> >(head -n 3 >log)
code=$?
tail -n 1 out/runs/r/events/1.jsonl
[ $code = 0 ] && tail -n 1 out/runs/r/events/1.jsonl | grep -q '"reason": "done"'
verdict $? "exit code $code"
