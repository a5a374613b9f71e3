#!/usr/bin/env bash
# The mirror is the folder that is mirrored, or in it: refused, by whatever name, before anything is written.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
mkdir out elsewhere
ln -s out link
ln -s ../out elsewhere/link
bad=0
refused() { # refused BUCKET OUT
    speedrun pretrain --data text.jsonl --out "$2" --bucket "$1" --run-id r "${TINY[@]}" >log 2>&1
    code=$?
    [ $code = 2 ] && [ "$(wc -l <log)" = 1 ] || { bad=1; echo "--bucket $1 --out $2: exit $code: $(tail -n 1 log)"; }
}
refused out out
refused ./out "$WORK/out"
refused out/mirror out
refused "$WORK/out/runs/r" out
refused link out
refused elsewhere/link/x out
refused out link
refused ./new ./new
refused . runs/mine
[ -z "$(find out elsewhere -type f)" ] && [ ! -e new ] && [ ! -e runs ] || { bad=1; echo "something was written"; }
verdict $bad "a bucket in its own run"
