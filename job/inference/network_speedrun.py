"""The network of this folder's weights, whole: PyTorch and nothing else.

A pre-norm transformer without biases or gains. What is unusual: "smear" adds a gated part of the previous token's
embedding; every block sees the embedding again; every second layer adds a value embedding, looked up by the token, to
v; most layers look back over a short window; "backout" subtracts a part of the middle of the stream at the end; logits
are softcapped.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

SMEAR_CHANNELS = 24


def norm(x):
    return F.rms_norm(x, (x.size(-1),))


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(config.width, config.width) for _ in range(4))
        self.gate_channels, self.gate_limit = config.ve_gate_channels, config.ve_gate_limit
        if layer in config.value_embed_layers:
            self.ve_gate = linear(self.gate_channels, config.heads)
        self.layer, self.window = layer, config.windows[layer]
        self.shape = (config.heads, config.head_dim)
        self.scale = config.qk_scale**2 / math.sqrt(config.head_dim)

    def forward(self, x, value_embed, rotary, distance, real, cache):
        """x (B, T, width); distance (T, S) from each query back to each column; real (B, S) or None: no padding."""
        q, k, v = (project(x).unflatten(-1, self.shape) for project in (self.q, self.k, self.v))  # (B, T, H, D)
        if value_embed is not None:
            gate = self.gate_limit * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))
            v = v + gate.unsqueeze(-1) * value_embed.view_as(v)
        q, k, v = (y.transpose(1, 2) for y in (norm(rotary(q)), norm(rotary(k)), v))  # (B, H, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        distance = distance[:, -k.size(2) :]  # a cache may keep no more than the window
        seen = (distance >= 0) & (distance <= self.window)
        if real is not None:  # padding sees itself, lest it become NaN
            seen = seen & real[:, None, None, -k.size(2) :] | (distance == 0)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
        return self.o(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.up, self.down = linear(config.width, 4 * config.width), linear(4 * config.width, config.width)

    def forward(self, x):
        return self.down(F.relu(self.up(x)).square())


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn, self.mlp = Attention(config, layer), MLP(config)

    def forward(self, x, *context):
        x = x + self.attn(norm(x), *context)
        return x + self.mlp(norm(x))


class Network(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        rows, width, depth = config.padded_vocab, config.width, config.depth
        self.wte = nn.Embedding(rows, width)
        self.value_embeds = nn.ModuleDict({str(i): nn.Embedding(rows, width) for i in config.value_embed_layers})
        self.blocks = nn.ModuleList(Block(config, i) for i in range(depth))
        self.head = linear(width, rows)
        self.resid_lambdas = nn.Parameter(torch.empty(depth))
        self.x0_lambdas = nn.Parameter(torch.empty(depth))
        if config.smear:
            self.smear_gate, self.smear_lambda = linear(SMEAR_CHANNELS, 1), nn.Parameter(torch.empty(()))
        if config.backout:
            self.backout_lambda = nn.Parameter(torch.empty(()))

    def forward(self, ids, real=None, cache=None, past=0):
        """ids (B, T), the columns from `past` on -> states (B, T, width) after the final norm.

        real: (B, past + T), 0 for padding. cache: anything with transformers' `update(keys, values, layer)`; smear
        keeps the embeddings there as one layer more.
        """
        B, T = ids.shape
        columns = torch.arange(past + T, device=ids.device)
        distance = columns[past:, None] - columns
        positions = columns.expand(B, -1)
        if real is not None:
            real = real.bool()
            positions = real.cumsum(-1).sub(1).clamp(min=0)
        x = norm(self.wte(ids))
        rotary = self._rotary(positions[:, past:], x)
        if self.config.smear:
            x = self._smear(x, real, cache)
        x0 = x
        for i, block in enumerate(self.blocks):
            value_embed = self.value_embeds[str(i)](ids) if str(i) in self.value_embeds else None
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            x = block(x, value_embed, rotary, distance, real, cache)
            if i == self.config.depth // 2:
                middle = x
        return norm(x - self.backout_lambda * middle if self.config.backout else x)

    def logits(self, hidden):
        cap = self.config.softcap
        return cap * torch.tanh(self.head(hidden)[..., : self.config.vocab_size].float() / cap)

    def _smear(self, x, real, cache):
        T = x.size(1)
        embeddings = x
        if cache is not None:
            embeddings = cache.update(x.unsqueeze(1), x[:, None, :, :1], self.config.depth)[0].squeeze(1)
        previous = F.pad(embeddings, (0, 0, 1, 0))[:, -T - 1 : -1]
        if real is not None:
            previous = previous * F.pad(real, (1, 0))[:, -T - 1 : -1, None]
        return x + self.smear_lambda * torch.sigmoid(self.smear_gate(x[..., :SMEAR_CHANNELS])) * previous

    def _rotary(self, positions, like):
        """A function that turns heads (B, T, H, D) by the angles of their positions (B, T)."""
        D = self.config.head_dim
        channel = torch.arange(0, D, 2, dtype=torch.float32, device=like.device)
        angle = positions.unsqueeze(-1) * (1.0 / self.config.rope_base ** (channel / D))  # (B, T, D / 2)
        cos, sin = (f(angle).to(like.dtype).unsqueeze(2) for f in (torch.cos, torch.sin))

        def rotate(x):
            a, b = x.chunk(2, dim=-1)
            return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)

        return rotate
