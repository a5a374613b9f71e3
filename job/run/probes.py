"""What a run will meet on this machine, looked at once: the facts that job/machine/gpu_checks.py and node_checks.py
judge.

Nothing here decides anything. What fails is a sentence among the facts, what nobody says is None. Without torch but for
the speed probe's own processes (job/run/speed_probe.py), and the version of CUDA that torch is built for.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import secrets
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from job.addresses import request, whole_address
from job.data.hub import DATASETS, endpoint, headers, recorded_identity
from job.data.identity import set_folder, set_inputs
from job.errors import SpeedrunError
from job.evaluation.fetch import kept_archive
from job.machine import container, nvidia_smi
from job.machine.gpu_checks import GpuFacts
from job.machine.host import printed
from job.machine.node_checks import NodeFacts
from job.recipe.config import Recipe
from job.recipe.derive import derive
from job.run.preflight import uses_compat
from job.run.wandb_client import is_off
from job.run.wandb_process import has_key
from job.store.sealed import MANIFEST, is_sealed, open_sealed, sealing
from job.store.stores import FolderStore, Store, pull_sealed, push_sealed, stored_manifest

T = TypeVar("T")

HERE = "on this disk"

ANSWER_SECONDS = 10.0
"""that a server has to answer"""
CHECKPOINT_BYTES = {True: 128 << 20, False: 32 << 20}
"""of the one that is written and read: with GPUs two parts of an upload"""


def gpu_facts(run: nvidia_smi.Run = printed, environment: Mapping[str, str] = os.environ) -> GpuFacts | None:
    """Of those GPUs that CUDA_VISIBLE_DEVICES lets through; None where nvidia-smi cannot be asked."""
    import torch

    listing = nvidia_smi.ask(run)
    if listing is None:
        return None
    visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = {int(each) for each in visible if each.strip().isdigit()}
    gpus = tuple(gpu for gpu in listing.gpus if not chosen or gpu.index in chosen)
    on_bus = 0 if chosen or container.inside() else len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
    return GpuFacts(
        gpus=gpus,
        on_bus=on_bus,
        driver=listing.driver,
        driver_cuda=None if uses_compat(environment) else listing.cuda,
        torch_cuda=torch.version.cuda,
    )


def node_facts(
    recipe: Recipe,
    out: Path,
    store: Store | None,
    *,
    bucket_refused: str = "",
    on_gpus: bool,
    environment: Mapping[str, str] = os.environ,
) -> NodeFacts:
    """Of the disk of `out`, the bucket and what the run would fetch. `bucket_refused`: why there is no `store`."""
    place = next(each for each in (out.absolute(), *out.absolute().parents) if each.is_dir())
    with ThreadPoolExecutor() as pool:
        checkpoint = pool.submit(checkpoint_path, place, store, CHECKPOINT_BYTES[on_gpus])
        text = pool.submit(about_text, recipe, out, store)
        bundle = pool.submit(about_bundle, recipe.eval.core_bundle, out)
        wandb = pool.submit(about_wandb, environment)
        clock = pool.submit(lambda: _or_none(store.clock_ahead) if store else None)
    speed, failed = checkpoint.result()
    prepared, hub_failed = text.result()
    temporary = tempfile.gettempdir()
    return NodeFacts(
        on_gpus=on_gpus,
        container=container.inside(),
        shared_memory=container.shared_memory(),
        temporary=temporary,
        temporary_exec=not os.statvfs(temporary).f_flag & os.ST_NOEXEC,
        disk=str(place),
        disk_free=shutil.disk_usage(place).free,
        disk_speed=speed,
        checkpoint_failed=failed,
        bucket=store.url if store else "",
        bucket_refused=bucket_refused,
        clock_ahead=clock.result(),
        credentials_left=store.credentials_left() if store else None,
        dataset=recipe.data.source if recipe.data.source in DATASETS else "",
        prepared=prepared,
        hub_failed=hub_failed,
        bundle=recipe.eval.core_bundle,
        bundle_failed=bundle.result(),
        **wandb.result(),
    )


def checkpoint_path(place: Path, store: Store | None, size: int) -> tuple[float | None, str]:
    """The way of a checkpoint, once: `size` bytes written below `place`, sealed, sent to the `store`, fetched, read.

    Bytes/s that went to the disk, and why it failed ("" where it did not). Nothing is left anywhere.
    """
    folder = f".probe-{secrets.token_hex(8)}"
    key, block, speed = f"{folder}/checkpoint", os.urandom(min(size, 16 << 20)), None
    try:
        with tempfile.TemporaryDirectory(prefix=".speedrun-", dir=place) as scratch:
            written, fetched = Path(scratch) / "written", Path(scratch) / "fetched"
            with sealing(written, kind="probe", made_from={}) as unsealed, open(unsealed.path / "file", "wb") as file:
                began = time.perf_counter()
                for _ in range(size // len(block)):
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
                speed = size / (time.perf_counter() - began)
            if store:
                push_sealed(store, key, written)
                pull_sealed(store, key, fetched, kind="probe")
            open_sealed(fetched if store else written, kind="probe", verify=True)
    except SpeedrunError as error:
        return speed, str(error)
    except OSError as error:
        return speed, f"{place} cannot be written ({error.strerror}); choose another --out, or make room there"
    finally:
        if isinstance(store, FolderStore):
            shutil.rmtree(store.root / folder, ignore_errors=True)
        elif store:
            _or_none(lambda: store.delete([f"{key}/file", f"{key}/{MANIFEST}"]))
    return speed, ""


def about_text(recipe: Recipe, out: Path, store: Store | None) -> tuple[str, str | None]:
    """Where the prepared set of a named dataset is, with the rows of this run ("": nowhere); and why the hub does not
    give its text ("" where it does, None where it need not)."""
    name = recipe.data.source
    if name not in DATASETS:
        return "", None
    if place := _or_none(lambda: prepared_place(recipe, out, store)):
        return place, None
    if any((out / "text" / name).glob("*/*.parquet")):
        return "", None
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "", "HF_HUB_OFFLINE is set"
    return "", unreachable(f"{endpoint()}/api/datasets/{DATASETS[name].repo}/revision/main", headers())


def prepared_place(recipe: Recipe, out: Path, store: Store | None) -> str:
    text = recorded_identity(recipe.data.source, out / "text", store)
    if text is None:
        return ""
    key = f"{set_folder(set_inputs(recipe.data, recipe.model.seq_len, text))}/set"
    here = is_sealed(out / key)
    if here:
        facts = open_sealed(out / key, kind="prepared").facts
    elif store and (manifest := stored_manifest(store, key)):
        facts = manifest["facts"]
    else:
        return ""
    whole = len(facts["files"]) == DATASETS[recipe.data.source].count - 1
    return (HERE if here else "in the bucket") if whole or facts["train_rows"] >= derive(recipe).rows else ""


def about_bundle(bundle: str, out: Path) -> str:
    """Why the CORE bundle that the recipe names is not to be had; "" where it is, or where none is named."""
    if not bundle.startswith(("http://", "https://")):
        return "" if not bundle or Path(bundle).exists() else "no such file or folder"
    return "" if kept_archive(bundle, out / "bundles").is_file() else unreachable(whole_address(bundle))


def about_wandb(environment: Mapping[str, str]) -> dict[str, Any]:
    """The fields of NodeFacts that are about it."""
    if is_off():
        return {}
    server, asked = environment.get("WANDB_BASE_URL", "https://api.wandb.ai"), environment.get("WANDB_MODE", "")
    if asked in ("offline", "dryrun") or not has_key(server):
        return {"wandb": "offline", "wandb_asked": asked == "online"}
    failed = unreachable(server)
    return {"wandb": "online", "wandb_failed": "" if failed.startswith("HTTP 4") else failed}


def unreachable(url: str, headers: Mapping[str, str] = MappingProxyType({})) -> str:
    """Why `url` gives nothing, in a few words; "" where it begins to. No server that it redirects to gets `headers`."""
    try:
        urllib.request.urlopen(request(url, headers), timeout=ANSWER_SECONDS).close()
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, http.client.HTTPException, ValueError) as error:
        return str(getattr(error, "reason", error)) or type(error).__name__
    return ""


def _or_none(ask: Callable[[], T]) -> T | None:
    """What `ask` says; None where the store does not."""
    with contextlib.suppress(SpeedrunError):
        return ask()
    return None
