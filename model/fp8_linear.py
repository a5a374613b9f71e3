"""The linear layer in fp8: torchao's, tensorwise and dynamic, and what training a GPT needs beside (`model/fp8.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear
from torchao.float8.float8_linear_utils import swap_linear_layers

from model.fp8_tensor import E4M3, Copies, Quantised, quantise


class Float8Linear(TorchaoLinear):
    """x W^T in fp8; in the dtype of x where gradients are off."""

    _kept: Copies | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype))

    def quantised(self) -> Quantised:
        """The weight in e4m3, kept until the weight changes."""
        self._kept = self._kept or Copies()
        self._kept.refresh([self.weight], _head_copies)
        return self._kept.current


@torch.no_grad()
def _head_copies(weight: Tensor) -> Quantised:
    rows, inverse_scale = quantise(weight, E4M3)
    return Quantised(rows, rows.t().contiguous(), inverse_scale)


def convert_to_float8(model: nn.Module, names: set[str]) -> None:
    """Replace the linear layers of these names by fp8 ones on the same parameters."""
    config = Float8LinearConfig()
    convert_to_float8_training(nn.Module(), config=config)  # of no layer: it mends the compiler's fp8 stores
    swap_linear_layers(
        model, lambda layer: Float8Linear.from_float(layer, config), module_filter_fn=lambda _, name: name in names
    )
