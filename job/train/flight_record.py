"""What torch's flight recorder has of the last collectives, for the log of a rank that stands still."""

from __future__ import annotations

import json
import sys
from typing import Any

SHOWN = 8


def last_collectives() -> str:
    """One line for each of the newest, oldest first: its number, name, sizes and state; "" where there are none.

    With NCCL the recorder is NCCL's own (which has started and completed marks; no GPU has shown it here), else
    c10d's. Does not wait for a collective, and imports nothing.
    """
    dist: Any = sys.modules.get("torch.distributed")
    if not hasattr(dist, "is_initialized") or not dist.is_initialized():  # not there, or not yet all of it
        return ""
    c10d = sys.modules["torch._C._distributed_c10d"]
    dump: Any = getattr(c10d, "_dump_nccl_trace_json", None) if dist.get_backend() == "nccl" else None
    record = json.loads((dump or c10d._dump_fr_trace_json)(includeCollectives=True, onlyActive=False))
    lines = [
        f"collective {entry['collective_seq_id']} {entry['profiling_name']} {entry['input_sizes']}:"
        f" {'over' if entry['retired'] else entry['state']}"
        for entry in record.get("entries", [])[-SHOWN:]
    ]
    return "\n".join(lines)
