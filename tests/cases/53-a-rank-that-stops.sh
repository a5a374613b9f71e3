#!/usr/bin/env bash
# One of two ranks stops for ever (SIGSTOP, as a GPU that hangs): the run ends by itself, with 75, and names that rank and not the one that waited for it.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
prose text.jsonl
speedrun run --ranks 2 --preset smoke --data text.jsonl --out out --run-id r "${TINY[@]}" -o train.device_batch_size=2 \
    -o train.steps=4000 -o train.silence_seconds=10 >log 2>&1 &
run=$!
until grep -qs '"kind": "train.step"' out/runs/r/events/1.jsonl; do kill -0 $run 2>/dev/null || break; sleep 0.2; done
for process in $(pgrep -f "job.run.rank pretrain"); do
    tr '\0' '\n' <"/proc/$process/environ" | grep -qx RANK=1 && [ "$(readlink "/proc/$process/cwd")" = "$WORK" ] && kill -STOP "$process"
done
wait $run
code=$?
last=$(tail -n 1 log)
echo "$last"
[ $code = 75 ] && [[ $last == "speedrun: rank 1 of pretrain fell silent (it last said: "* ]]
verdict $? "exit code $code"
