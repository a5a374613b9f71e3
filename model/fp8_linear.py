"""The linear layer in fp8: torchao's, tensorwise and dynamic, with what training a GPT needs beside it (`model/fp8.py`
explains)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear as TorchaoLinear
from torchao.float8.float8_linear_utils import swap_linear_layers

from model.fp8_tensor import E4M3, Quantised, quantise


class Float8Linear(TorchaoLinear):
    """x W^T in fp8; in the dtype of x where gradients are off."""

    _kept: tuple[tuple[int, int], Quantised] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x)
        return F.linear(x, self.weight.to(x.dtype))

    @torch.no_grad()
    def quantised(self) -> Quantised:
        """The weight in e4m3, made when the weight has changed since the last call and kept until it changes again.

        Every change in place counts a tensor's version up (the optimizer's update, a loaded checkpoint): nobody has to
        tell.
        """
        state = (id(self.weight), self.weight._version)
        if self._kept is None or self._kept[0] != state:
            rows, inverse_scale = quantise(self.weight, E4M3)
            self._kept = (state, Quantised(rows, rows.t().contiguous(), inverse_scale))
        return self._kept[1]


def convert_to_float8(model: nn.Module, names: set[str]) -> None:
    """Replace the linear layers of these names by fp8 ones on the same parameters."""
    config = Float8LinearConfig()
    convert_to_float8_training(
        nn.Module(), config=config
    )  # of no layer: what it does is to mend the compiler's fp8 stores
    swap_linear_layers(
        model, lambda layer: Float8Linear.from_float(layer, config), module_filter_fn=lambda _, name: name in names
    )
