#!/usr/bin/env bash
# The machine's clock is put right in mid-run, by an hour (its first NTP step, or a VM that was resumed). Wanted: the report's durations are those of a run whose clock stood right.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
prose text.jsonl
speedrun run --data text.jsonl --out out --run-id r "${TINY[@]}" >said 2>&1 || verdict 1 "the run failed: $(tail -1 said)"
speedrun report --run-id r --out out --json >before.json 2>said || verdict 1 "no report: $(tail -1 said)"
"$PYTHON" - <<'P'
import json, pathlib
file = pathlib.Path("out/runs/r/events/1.jsonl")
events = [json.loads(line) for line in file.read_text().splitlines()]
for event in events[: len(events) // 2]:
    event["t"] += 3600
file.write_text("".join(json.dumps(event) + "\n" for event in events))
P
speedrun report --run-id r --out out --json >after.json 2>said || verdict 1 "no report: $(tail -1 said)"
"$PYTHON" -c '
import json
before, after = (json.load(open(f"{name}.json")) for name in ("before", "after"))
raise SystemExit(any(before[part] != after[part] for part in ("clocks", "stages_s", "unusable_events")))'
verdict $? "clocks and stages before and after"
