"""A model as a folder that `transformers` loads, and that is compared with the model before it is sealed.

    config.json  generation_config.json  model.safetensors  modeling_speedrun.py  network_speedrun.py
    tokenizer.json  tokenizer_config.json  tokenizer/  README.md (the model card)  manifest.json

Tensors go from the source's files to the new one each by itself, in the dtype in which training kept them. Then the
file is read back: each tensor must have the source's bits, and the network of `network_speedrun.py`, which shares no
line with ours, must give the logits and the greedy continuation that `model/gpt.py` gives. The two are built one
after the other, so memory holds one copy of the model in fp32. That network is plain torch, so that this check needs no
transformers, which the image does not have; the same file is all that transformers adds its generate() to.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from job.errors import DataError, UsageError, first_line
from job.inference import network_speedrun
from job.inference.card import write_card
from job.inference.hf_tokenizer import write_tokenizer
from job.inference.sources import EXPORT, NETWORK, SHAPE_KEYS, Source
from job.store.sealed import MANIFEST, Sealed, open_sealed, read_manifest, sealing
from job.train.checkpoint import write_tensors
from model.config import GPTConfig
from model.generate import Sampling, generate

VERSION = 1
TOLERANCE = 1e-4
"""by which a logit in fp32 may differ"""
GREEDY = 16
"""tokens of the greedy continuation that is compared"""


def export(source: Source, target: Path, license: str, progress: Callable[[str], None] = lambda _: None) -> Sealed:
    """Seal the model as `target`; DataError when what was written does not give back what was read."""
    shapes = source.shapes()
    with sealing(target, kind=EXPORT, made_from={**source.made_from, "export": VERSION}) as folder:
        path = folder.path
        progress("writing tensors")
        entry = write_tensors(path / "model.safetensors", _Tensors(source, shapes))
        _write_config(path, source)
        write_tokenizer(path, source.tokenizer, source.config.seq_len)
        progress("comparing")
        checked = _compare(source, shapes, path)
        parameters = sum(shape.numel() for shape in shapes.values())
        write_card(path, source, parameters, license, checked)
        folder.facts |= {"bytes": entry["size"], "parameters": parameters, "checked": checked}
    return open_sealed(target, kind=EXPORT, verify=False)


def check_target(target: Path) -> None:
    """UsageError where `target`, a folder that somebody named, has anything but an earlier export, to be replaced."""
    with contextlib.suppress(OSError):
        if not any(target.iterdir()):
            return
    with contextlib.suppress(DataError, OSError):
        if read_manifest((target / MANIFEST).read_bytes(), target, "")["kind"] == EXPORT:
            return
    if target.exists():
        raise UsageError(f"{target} is there and is no export, and is not replaced; give another folder with --to")


class _Tensors(Mapping[str, Tensor]):
    """A source's tensors under the export's names, read when they are asked for."""

    def __init__(self, source: Source, shapes: Mapping[str, torch.Size]) -> None:
        self._source, self._shapes = source, shapes

    def __getitem__(self, name: str) -> Tensor:
        ours = name.removeprefix(NETWORK)
        return self._source.tensor(ours, self._shapes[ours]).contiguous()

    def __iter__(self) -> Iterator[str]:
        return (NETWORK + name for name in self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


def _write_config(folder: Path, source: Source) -> None:
    config, tokenizer = source.config, source.tokenizer
    bos, pad = tokenizer.bos_id, tokenizer.vocab_size - 1
    tokens = {"bos_token_id": bos, "eos_token_id": bos, "pad_token_id": pad}  # a document ends where the next begins
    short = min(config.windows)
    document = {
        "model_type": "gpt2-speedrun",
        "architectures": ["SpeedrunForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_speedrun.SpeedrunConfig",
            "AutoModelForCausalLM": "modeling_speedrun.SpeedrunForCausalLM",
        },
        "dtype": "float32",
        **tokens,
        "tie_word_embeddings": False,
        "use_cache": True,
        **{key: getattr(config, key) for key in SHAPE_KEYS},
        # what follows from those
        "heads": config.heads,
        "padded_vocab": config.padded_vocab,
        "windows": config.windows,
        "value_embed_layers": config.value_embed_layers,
        # transformers' names of them; its windows count the token itself
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "max_position_embeddings": config.seq_len,
        "sliding_window": short + 1,
        "layer_types": ["sliding_attention" if w == short else "full_attention" for w in config.windows],
    }
    _write_json(folder / "config.json", document)
    _write_json(folder / "generation_config.json", {**tokens, "do_sample": False})
    for module in ("modeling_speedrun.py", "network_speedrun.py"):
        shutil.copyfile(Path(__file__).with_name(module), folder / module)


def _write_json(file: Path, document: dict[str, Any]) -> None:
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _compare(source: Source, shapes: Mapping[str, torch.Size], folder: Path) -> dict[str, Any]:
    """What was compared and by how much it differed; DataError for any other bits, logits or greedy text."""
    _compare_bits(source, shapes, folder)
    config = source.config
    length = min(config.seq_len, min(config.windows) + 64)
    ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    begun = ids[:, : min(8, length)]
    logits, greedy = _of_ours(source, ids, begun)
    if not logits.isfinite().all():
        raise DataError(f"{source.where}: the model's logits are no numbers, its training diverged; export another")
    theirs, text = _of_network(folder, config, ids, begun)
    worst = (logits - theirs).abs().max().item()
    if not worst <= TOLERANCE:
        raise DataError(f"{folder}: logits differ by {worst:.2g} from those of {source.where}; this is a bug of ours")
    if greedy != text:
        raise DataError(f"{folder}: greedy text differs from that of {source.where}; this is a bug of ours")
    return {"tokens": length, "logits": f"{worst:.1e}", "greedy": GREEDY}


def _compare_bits(source: Source, shapes: Mapping[str, torch.Size], folder: Path) -> None:
    """By itself, so that the file is no longer mapped when the networks are built."""
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        for name, tensor in _Tensors(source, shapes).items():
            written = file.get_tensor(name)
            if written.dtype != tensor.dtype or not torch.equal(_bits(written), _bits(tensor)):
                raise DataError(f"{folder}: {name} does not have the bits of {source.where}; export it again")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _of_ours(source: Source, ids: Tensor, begun: Tensor) -> tuple[Tensor, list[int]]:
    model = source.model()
    with torch.inference_mode():
        logits = model.logits(ids)
    return logits, [token for (token,) in generate(model, begun.tolist(), GREEDY, Sampling(temperature=0))]


@torch.inference_mode()
def _of_network(folder: Path, config: GPTConfig, ids: Tensor, begun: Tensor) -> tuple[Tensor, list[int]]:
    network = load_network(folder, config)
    logits = network.logits(network(ids))
    cache, past, greedy = _Cache(), 0, []
    for _ in range(GREEDY):
        last = network.logits(network(begun, cache=cache, past=past)[:, -1])
        past += begun.size(1)
        begun = last.argmax(dim=-1, keepdim=True)
        greedy.append(int(begun))
    return logits, greedy


def load_network(folder: Path, config: GPTConfig) -> Any:
    """The export's own network with the export's weights, in fp32."""
    with torch.device("meta"):
        network = network_speedrun.Network(config)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        weights = {name.removeprefix(NETWORK): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    network.load_state_dict(weights, assign=True)
    return network.eval()


class _Cache:
    """Keys and values of every layer, all of them."""

    def __init__(self) -> None:
        self._layers: dict[int, list[Tensor]] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int) -> list[Tensor]:
        kept = self._layers.get(layer, [keys[:, :, :0], values[:, :, :0]])
        self._layers[layer] = [torch.cat(pair, dim=2) for pair in zip(kept, (keys, values), strict=True)]
        return self._layers[layer]


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload an export, privately where the repository is new; its address. UsageError without a token."""
    import httpx2
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HFValidationError

    if not get_token():
        raise UsageError(f"--hub {repository} needs a token: set HF_TOKEN to one that may write")
    api = HfApi()
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        return str(api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of gpt2-speedrun"))
    except (httpx2.HTTPError, httpx2.InvalidURL, HFValidationError, OSError) as error:
        raise UsageError(f"--hub {repository} was refused ({first_line(error)}); the folder is {folder}") from None
