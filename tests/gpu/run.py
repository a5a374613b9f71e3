"""`make gpu`: what ten minutes of one GPU can say.

    python tests/gpu/run.py --out DIR [--wheels DIR] [--only STEP ...] [--dry]

Writes DIR/gpu.json and DIR/gpu.md (card and stack first, then one part a step), DIR/log.txt and DIR/progress.jsonl;
both documents are written anew after every step, so that what was found stays whatever comes later.

The steps run in one child process, because they share the compiled model. Each has its own limit of seconds: at its
end the child is killed, the step says so, and a new child goes on behind it. A step that raises ends its child too:
nothing is measured on a device in an unknown state. `--budget` bounds the whole; a step for which no time is left
says that.

`--dry` takes tiny sizes, the CPU, and a compiler that generates no code: every step is executed, and no figure means
anything. Exit code: 0 if every step ran and all that it checks holds, 1 if not; without a GPU it is skipped, and says
so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]


@dataclasses.dataclass(frozen=True)
class Step:
    name: str
    where: str
    """module:function"""
    limit: int
    """seconds on a GPU, compiling included"""
    title: str


STEPS = (  # the first ones are what a rental that ends early should have seen; limits: about twice what an H100 took
    Step("products", "steps.kernels:products", 60, "fp8 products and loss against fp32"),
    Step("attention", "steps.kernels:attend", 60, "attention against the reference, and its time"),
    Step("compiled", "steps.training:compiled", 150, "the fp8 step: compiling, graphs, memory"),
    Step("steps", "steps.training:steps", 30, "steps: tokens a second, host against GPU"),
    Step("profile", "steps.profile:profiled", 20, "one micro-step by component"),
    Step("rates", "steps.kernels:rates", 20, "what the card gives: a copy, and each product"),
    Step("checkpoint", "steps.state:checkpoint", 30, "what a checkpoint costs training"),
    Step("tuned", "steps.training:tuned", 120, "a block under other settings of the compiler"),
    Step("levers", "steps.levers:levers", 240, "levers: their proof, and a block with and without each"),
    Step("forks", "steps.kernels:forks", 40, "CORE's masked forks with and without cuDNN"),
    Step("ranks", "steps.state:ranks", 60, "two ranks on the one device"),
    Step("resume", "steps.state:resume", 120, "exact resume"),
    Step("doubled", "steps.training:doubled", 120, "the step with twice the rows"),
    Step("plain", "steps.training:plain", 60, "the same step of plain torch modules"),
    Step("curves", "steps.training:curves", 180, "fp8 against bf16"),
)


def main(words: list[str] | None = None) -> int:
    options = parsed(words)
    options.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and with it the child
    prepare_stack(options)
    import torch

    if options.child is not None:
        return child(options)
    if not options.dry and not torch.cuda.is_available():
        print("skipped: torch sees no GPU here, and nothing was measured; --dry executes the steps on the CPU")
        return 0
    from job.machine.stack import describe_stack

    (options.out / "progress.jsonl").write_text("")
    (options.out / "log.txt").write_text("")
    document = {"stack": describe_stack(), "dry": options.dry, "adapted": options.adapted, "steps": []}
    began, wanted = time.monotonic(), [step for step in STEPS if not options.only or step.name in options.only]
    with tempfile.TemporaryDirectory(prefix="speedrun-gpu-compiled-", ignore_cleanup_errors=True) as compiled:
        options.compiled = Path(
            compiled
        )  # empty, or seconds of compiling would be those of loading what an earlier run compiled
        while wanted:
            wanted = run_child(wanted, options, document, began + options.budget)
    from table import summary

    print(summary(document))
    return int(any(step["outcome"] != "holds" for step in document["steps"]))


def parsed(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or ROOT / "out" / "gpu"),
        help="where the tables go [$OUT]",
    )
    parser.add_argument("--dry", action="store_true", help="tiny, on the CPU")
    parser.add_argument(
        "--only", action="append", choices=[step.name for step in STEPS], help="this step; may be repeated"
    )
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that this machine lacks")
    parser.add_argument("--budget", type=float, default=570, help="seconds for all steps together")
    parser.add_argument("--limit-factor", type=float, default=1.0, help="on every step's limit")
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--kernel", default="fa2", help=argparse.SUPPRESS)
    return parser.parse_args(words)


def prepare_stack(options: argparse.Namespace) -> None:
    from conftest import adapt, unpack

    options.adapted = []
    if options.wheels:
        of = zlib.crc32(str(options.wheels.resolve()).encode())
        into = Path(tempfile.gettempdir()) / f"speedrun-gpu-wheels-{sys.version_info[1]}-{of:x}"
        into.mkdir(exist_ok=True)
        options.adapted = [f"from wheels: {', '.join(unpack(options.wheels, into))}"]
    options.adapted += adapt()


def run_child(wanted: list[Step], options: argparse.Namespace, document: dict[str, Any], deadline: float) -> list[Step]:
    """Steps in one child until it ends or is ended; the steps that are left."""
    from bench import USED

    progress = options.out / "progress.jsonl"
    seen = progress.stat().st_size
    fa4 = any(step["name"] == "attention" and step.get("facts", {}).get(USED) == "fa4" for step in document["steps"])
    words = [
        sys.executable,
        __file__,
        "--out",
        str(options.out),
        "--kernel",
        "fa4" if fa4 else "fa2",
        *["--dry"] * options.dry,
    ]
    words += ["--wheels", str(options.wheels)] if options.wheels else []
    with open(options.out / "log.txt", "a") as log:
        process = subprocess.Popen(
            [*words, "--child", *(step.name for step in wanted)],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env=environment(options.compiled),
        )
    try:
        return follow(process, seen, wanted, options, document, deadline)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def follow(
    process: subprocess.Popen,
    seen: int,
    wanted: list[Step],
    options: argparse.Namespace,
    document: dict[str, Any],
    deadline: float,
) -> list[Step]:
    """What the child says, until it is over; the steps that are left."""
    progress, left, began, raised = options.out / "progress.jsonl", list(wanted), time.monotonic(), False
    while left and not raised:
        time.sleep(0.1)
        ended = process.poll() is not None
        with open(progress) as file:
            file.seek(seen)
            news = file.read()
        news = news[: news.rfind("\n") + 1]
        seen += len(news.encode())
        for line in news.splitlines():
            if "begins" in json.loads(line):
                began = time.monotonic()
            else:
                record(document, options.out, left.pop(0), json.loads(line))
                raised = document["steps"][-1]["outcome"].startswith("raised")
        if not left or raised:
            break
        limit = left[0].limit * options.limit_factor
        late, over = time.monotonic() - began > limit, time.monotonic() > deadline
        if ended or late or over:
            why = (
                "its process ended" if ended else f"stopped after {limit:.0f} s" if late else "no time was left for it"
            )
            for step in left if over else left[:1]:
                record(
                    document,
                    options.out,
                    step,
                    {"outcome": why, "seconds": round(time.monotonic() - began, 1) if not over else 0},
                )
            return [] if over else left[1:]
    return left


def environment(compiled: Path) -> dict[str, str]:
    """A child's: as a rank's, with the compilers' caches below `compiled`."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(compiled / "inductor"), "TRITON_CACHE_DIR": str(compiled / "triton")}
    return {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"} | os.environ | caches


def record(document: dict[str, Any], out: Path, step: Step, found: dict[str, Any]) -> None:
    """Add what a step found, and write both documents."""
    from table import page

    document["steps"].append({"name": step.name, "title": step.title, "limit": step.limit} | found)
    (out / "gpu.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "gpu.md").write_text(page(document))


def child(options: argparse.Namespace) -> int:
    """The steps named, one after the other; each answer is a line of progress.jsonl."""
    import importlib

    import torch

    from bench import DRY, Bench, Sizes, use_kernel

    if options.dry:
        quick_compiler()
    device = torch.device("cpu" if options.dry else "cuda")
    use_kernel(options.kernel)
    bench = Bench(device, DRY if options.dry else Sizes(), options.out)
    for step in (step for name in options.child for step in STEPS if step.name == name):
        say(options.out, {"begins": step.name})
        began = time.monotonic()
        module, function = step.where.split(":")
        try:
            result = getattr(importlib.import_module(module), function)(bench)
            outcome = "holds" if not result.wrong else "; ".join(result.wrong)
            found = {"outcome": outcome, "facts": result.facts, "tables": result.tables}
        except Exception as error:
            import traceback

            traceback.print_exc()
            found = {"outcome": f"raised {type(error).__name__}: {error}".splitlines()[0][:500]}
        say(options.out, found | {"seconds": round(time.monotonic() - began, 1)})
        if found["outcome"].startswith("raised"):
            return 1
    return 0


def quick_compiler() -> None:
    """Compiled means traced, differentiated and run as it is: a dry run is no test of the code generator."""
    import torch

    compiler = torch.compile

    def traced(*arguments, **options):
        return compiler(*arguments, **options | {"backend": "aot_eager"})

    torch.compile = traced


def say(out: Path, message: dict[str, Any]) -> None:
    with open(out / "progress.jsonl", "a") as file:
        file.write(json.dumps(message, default=str) + "\n")


if __name__ == "__main__":
    sys.exit(main())
