"""The GPT of the leaderboard: both published generations from one configuration.

The skeleton is a pre-norm transformer without biases or gains. What sets it apart, in the order in which a token meets
it:

* the embedding is normalised (RMS, no gain: all norms here are), then **smear** adds a gated part of the previous
  token's embedding to each token: a bigram for next to nothing. The result, x0, is kept;
* each block sees lambda_i x + mu_i x0: the residual stream is scaled, and the embedding is shown again at every depth;
* attention rotates q and k (**rotary**, half-split pairs, the whole head), THEN normalises them per head and scales
  both by `qk_scale`: logits are bounded by construction. Three layers of four look back over a short **window** only;
* every second layer adds a **value embedding** to v: a second table, looked up by the token itself, gated per head by
  the first few channels of the block's input. Half of all parameters live here and they cost no matrix product;
* the MLP is d -> 4d -> d with relu squared;
* **backout** subtracts a learned part of the mid-depth stream before the final norm: what only early layers needed
  leaves again;
* logits are softcapped, c tanh(z / c), in fp32.

Precision: master weights are fp32, and a linear layer casts its weight to the dtype of its input; there is no autocast.
The embedding tables are stored in the compute dtype, which thereby decides the dtype of the whole residual stream.

Weights are drawn by parameter *name*: every parameter has its own generator, seeded by a hash of (seed, name). No order
of creation, no number of processes and no other parameter can change them.

Sources: the leaderboard's documents and the history of its training program, February ("feb") and July 2026 ("head").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import attention
from model.config import SMEAR_CHANNELS, GPTConfig
from model.fp8_tensor import Quantised
from model.kv_cache import KVCache
from model.loss import capped_logits, cross_entropy, token_losses
from model.rotary import Rotary, rotate
from model.shared_prefix import SharedPrefix

Pair = tuple[Tensor, Tensor]
AttentionFn = Callable[[Tensor, Tensor, Tensor, int, float | None], Tensor]


def norm(x: Tensor) -> Tensor:
    """RMS norm over the last dimension, no gain, the framework's default epsilon."""
    return F.rms_norm(x, (x.size(-1),))


class Linear(nn.Linear):
    """x W^T without bias, the weight cast to x's dtype. Filled by `GPT.init_weights`, not on construction."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, bias=False)

    def reset_parameters(self) -> None:
        """Nothing: `GPT.init_weights` fills every parameter by name."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))

    def quantised(self) -> Quantised | None:
        """The weight in fp8, where the layer is an fp8 one (`model/fp8_linear.py`); here None."""
        return None


def apart(x: Tensor, *layers: nn.Module, of: Tensor | None = None) -> list[Tensor]:
    """The output of each layer for x. of: the rows whose weighted means x's rows are, where they are at hand."""
    return [layer(x) for layer in layers]


def relu_squared(x: Tensor, up: nn.Module, down: nn.Module) -> Tensor:
    """An MLP of two layers."""
    return down(F.relu(up(x)).square())


class Embedding(nn.Embedding):
    """A table of `rows` vectors in the compute dtype. Filled by `GPT.init_weights`, not on construction."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is: `GPT.init_weights` fills every parameter by name."""


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        d = config.width
        self.q, self.k, self.v, self.o = (Linear(d, d) for _ in range(4))
        self.gate_channels, self.gate_limit = config.ve_gate_channels, config.ve_gate_limit
        if layer in config.value_embed_layers:
            self.ve_gate = Linear(config.ve_gate_channels, config.heads)
        self.heads, self.head_dim, self.window = config.heads, config.head_dim, config.windows[layer]
        self.scale = config.qk_scale**2 / math.sqrt(config.head_dim)  # q and k times qk_scale each
        self.products: Callable[..., Sequence[Tensor]] = apart
        self.out_products: Callable[..., Sequence[Tensor]] = apart
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        value_embed: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        attention_fn: AttentionFn,
        positions: Tensor | None = None,
    ) -> Tensor:
        B, T, d = x.shape
        q, k, v = (
            projected.view(B, T, self.heads, self.head_dim)  # (B, T, H, D)
            for projected in self.products(x, self.q, self.k, self.v)
        )
        if value_embed is not None:
            gate = self.gate_limit * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # (B, T, H)
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k = self.norm(rotate(q, cos, sin)), self.norm(rotate(k, cos, sin))
        heads = attention_fn(q, k, v, self.window, self.scale)  # (B, T, H, D)
        of = None if value_embed is None else v
        return self.out_products(_at(heads.reshape(B, T, d), positions), self.o, of=of)[0]


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, 4 * config.width)
        self.down = Linear(4 * config.width, config.width)
        self.products: Callable[..., Tensor] = relu_squared

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x, self.up, self.down)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        x0: Tensor,
        lambdas: Pair,
        value_embed: Tensor | None,
        cos_sin: Pair,
        attention_fn: AttentionFn,
        positions: Tensor | None = None,
    ) -> Tensor:
        """x, x0 (B, T, width) -> (B, T, width), or (N, width) for the N `positions` of the flattened batch alone.

        lambdas: of x and x0, 0-d; cos_sin: `Rotary.tables`. Keys and values are made of all tokens in any case.
        """
        x = lambdas[0] * x + lambdas[1] * x0
        x = _at(x, positions) + self.attn(norm(x), value_embed, *cos_sin, attention_fn, positions)
        return x + self.mlp(norm(x))


def _at(x: Tensor, positions: Tensor | None) -> Tensor:
    """(B, T, C) -> the tokens at `positions` of B x T, (N, C); x itself without."""
    return x if positions is None else x.flatten(0, 1)[positions]


class GPT(nn.Module):
    """The model of `config`. May be built under `torch.device("meta")`; then `to_empty` and `init_weights`."""

    def __init__(self, config: GPTConfig, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        L, V, d = config.depth, config.padded_vocab, config.width
        self.wte = Embedding(V, d, dtype=compute_dtype)
        self.value_embeds = nn.ModuleDict(
            {str(i): Embedding(V, d, dtype=compute_dtype) for i in config.value_embed_layers}
        )
        self.blocks = nn.ModuleList(Block(config, i) for i in range(L))
        self.head = Linear(d, V)
        self.resid_lambdas = nn.Parameter(torch.empty(L))
        self.x0_lambdas = nn.Parameter(torch.empty(L))
        if config.smear:
            self.smear_gate = Linear(SMEAR_CHANNELS, 1)
            self.smear_lambda = nn.Parameter(torch.empty(()))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(()))
        self._rotary = Rotary(config.head_dim, config.rope_base, config.seq_len)
        self.compiled = False
        self.before_loss: Callable[[], None] | None = None

    def hidden(
        self,
        idx: Tensor,
        shared: SharedPrefix | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """idx (B, T) int64 -> (B, T, width) after the final norm, in the compute dtype. T may exceed config.seq_len.

        With `shared` each row is a prefix and its suffixes, and every token is what it would be in a row of its own
        sequence alone; with `cache` the tokens follow those that the cache has seen. With `positions`, (N,) int64 into
        B x T, their states alone, (N, width): the last block computes little else.
        """
        x = norm(self.wte(idx))  # (B, T, width)
        layout = cache or shared
        cos_sin = self._rotary.tables(cache.end if cache else idx.size(1), x)
        if layout is not None:
            cos_sin = layout.cos_sin(*cos_sin)
        attention_fn: AttentionFn = shared.attention if shared else attention
        if self.config.smear:
            x = self._smear(x, layout)
        x0 = middle = x
        last = self.config.depth - 1
        for i, block in enumerate(self.blocks):
            value_embed = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            lambdas = self.resid_lambdas[i], self.x0_lambdas[i]
            if cache is not None:
                attention_fn = cache.attention(i)
            x = block(x, x0, lambdas, value_embed, cos_sin, attention_fn, positions if i == last else None)
            if i == self.config.depth // 2:
                middle = x if i == last else _at(x, positions)
        if self.config.backout:
            x = x - self.backout_lambda * middle
        return norm(x)

    def _smear(self, x: Tensor, layout: SharedPrefix | KVCache | None) -> Tensor:
        """x (B, T, width) with a gated part of the token before each."""
        if layout is not None:
            gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS]))  # (B, T, 1)
            return x + gate * layout.previous_tokens(x)
        gate = self.smear_lambda * torch.sigmoid(self.smear_gate(x[:, 1:, :SMEAR_CHANNELS]))  # (B, T - 1, 1)
        return torch.cat([x[:, :1], x[:, 1:] + gate * x[:, :-1]], dim=1)

    def lm_head(self, hidden: Tensor) -> Tensor:
        """hidden (..., width) -> softcapped logits (..., vocab_size), fp32."""
        return capped_logits(hidden, self.head.weight, self.config.softcap, self.config.vocab_size)

    def logits(self, idx: Tensor) -> Tensor:
        """idx (B, T) -> softcapped logits (B, T, vocab_size), fp32: all of them at once, for short inputs."""
        return self.lm_head(self.hidden(idx))

    def loss(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token, fp32 scalar. idx, targets: (B, T) int64."""
        if self.before_loss and torch.is_grad_enabled():
            self.before_loss()
        hidden = self.hidden(idx).flatten(0, 1)
        return cross_entropy(
            hidden,
            self.head.weight,
            targets.flatten(),
            self.config.softcap,
            self.config.vocab_size,
            quantised=self.head.quantised(),
            compiled=self.compiled,
        )

    def compile_blocks(self) -> None:
        """Compile each block by itself, and the loss between its products; the first calls will take their time.

        By blocks, because gradients of a model compiled as one graph all come at its end (nothing could be sent
        meanwhile), and because blocks of one shape share their code. What looks up tables stays outside: its compiled
        gradient adds up in an order that differs from run to run on a CPU.
        """
        self.compiled = True
        for block in self.blocks:
            block.compile(fullgraph=True, dynamic=False, recompile_limit=64)

    def freeze(self) -> None:
        """No more training: linear weights are kept in the compute dtype, to which each use cast them (same bits)."""
        self.requires_grad_(False)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.data = layer.weight.data.to(self.wte.weight.dtype)

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """-log p(target) in nats (B, T) fp32, and the greedy next token (B, T) int64. idx, targets: (B, T) int64."""
        hidden = self.hidden(idx).flatten(0, 1)
        nll, greedy = token_losses(
            hidden, self.head.weight, targets.flatten(), self.config.softcap, self.config.vocab_size
        )
        return nll.view_as(targets), greedy.view_as(targets)

    def groups(self) -> dict[str, list[tuple[str, nn.Parameter]]]:
        """Every parameter once, by optimizer group; "smear_backout" only where the model has them."""
        groups: dict[str, list[tuple[str, nn.Parameter]]] = {}
        for name, parameter in self.named_parameters():
            groups.setdefault(_group_of(name), []).append((name, parameter))
        return groups

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter from its own generator, by `seed`, the parameter's name and the kind of device alone."""
        for name, parameter in self.named_parameters():
            generator = torch.Generator(device=parameter.device)
            generator.manual_seed(int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8]))
            wide = torch.empty_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
            parameter.copy_(self._draw(name, wide, generator))

    def _draw(self, name: str, out: Tensor, generator: torch.Generator) -> Tensor:
        """Fill `out` as the parameter `name` begins."""
        c = self.config
        bound = math.sqrt(3 / c.width)  # U(-bound, bound) has the standard deviation 1 / sqrt(width)
        group, layer = _group_of(name), name.split(".")[-2] if "." in name else name
        if group == "wte":
            return out.normal_(0.0, c.wte_std, generator=generator)
        if group == "head":
            return out.normal_(0.0, 0.001, generator=generator)
        if layer in ("o", "down", "smear_lambda"):  # a fresh block adds nothing to the stream
            return out.zero_()
        if layer in ("ve_gate", "smear_gate"):
            return out.uniform_(0.0, c.ve_gate_init if layer == "ve_gate" else 0.02, generator=generator)
        if layer == "backout_lambda":
            return out.fill_(0.2)
        if layer in ("resid_lambdas", "x0_lambdas"):
            first, last = c.resid_init if layer == "resid_lambdas" else c.x0_init
            return out.copy_(torch.linspace(first, last, c.depth, device=out.device))
        scale = bound * c.mlp_in_scale if layer == "up" else bound  # q, k, v, up and the value embeddings
        return out.uniform_(-scale, scale, generator=generator)


def _group_of(name: str) -> str:
    first = name.split(".")[0]
    if first == "blocks":
        return "matrices"
    return "smear_backout" if first.startswith(("smear", "backout")) else first
