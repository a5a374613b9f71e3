#!/usr/bin/env bash
# Parquet as other tools write it: large_string, string_view, dictionary, all-null column, zero rows, zero row groups, codecs, page v2, column twice, list, bytes, nested `text`. Wanted: read, or one sentence that names file and type.
. "$(cd "$(dirname "$0")" && pwd)/lib.sh"
cat > go.py <<'P'
import pyarrow as pa, pyarrow.parquet as pq, pathlib
from job.data.local import open_local
from job.errors import SpeedrunError
t = ["some text", None, "", "more \u00e9 text"] * 50
def table(kind): return pa.table({"text": pa.array(t).cast(kind), "x": list(range(200))})
cases = {"large": table(pa.large_string()), "view": table(pa.string_view()), "dict": pa.table({"text": pa.array(t).dictionary_encode()}),
 "null": pa.table({"text": pa.nulls(5)}), "bytes": table(pa.binary()), "list": pa.table({"text": [["a"], ["b"]]}),
 "struct": pa.table({"text": [{"text": "a"}, {"text": "b"}]}), "nested": pa.table({"meta": [{"text": "wrong"}] * 200, "text": t}), "empty": pa.table({"text": pa.array([], pa.string())}),
 "twice": pa.Table.from_arrays([pa.array(t), pa.array(t)], names=["text", "text"]), "case": pa.table({"Text": t})}
written = {k: (v, {}) for k, v in cases.items()}
for codec in ("snappy", "zstd", "brotli", "gzip", "lz4", "none"): written[codec] = (table(pa.string()), {"compression": codec, "data_page_version": "2.0", "row_group_size": 7})
written["delta"] = (table(pa.string()), {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}})
bad = 0
for name, (tab, options) in written.items():
    file = pathlib.Path(f"{name}.parquet")
    try:
        pq.write_table(tab, file, **options)
        if name == "empty":
            pq.ParquetWriter("nogroups.parquet", tab.schema).close()
            assert not [x for s in open_local(("nogroups.parquet",)).shards for x in s.texts()]
        got = [x for s in open_local((str(file),)).shards for x in s.texts()]
        right = got == (t if name != "empty" else [])
        print(name, "read" if right else f"READ WRONG {got[:3]}"); bad |= not right
    except SpeedrunError as e: print(name, "sentence:", str(e)[:150])
    except Exception as e: print(name, "TRACEBACK", type(e).__name__, str(e)[:100]); bad = 1
raise SystemExit(bad)
P
nice -n 10 "$PYTHON" go.py >log 2>&1; rc=$?; cat log; verdict $rc "exit $rc"
