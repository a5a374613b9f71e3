#!/usr/bin/env bash
# A SOCKS proxy in the environment (ALL_PROXY), as lab networks have it: the named dataset cannot be asked for. Wanted: one sentence, exit 11.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
ALL_PROXY=socks5://127.0.0.1:9 all_proxy=socks5://127.0.0.1:9 speedrun prepare --preset run6 --out out >log 2>&1; rc=$?
tail -4 log; ! grep -q "^Traceback" log && [ $rc = 11 ]; verdict $? "exit $rc"
