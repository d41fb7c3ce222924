"""Networks on a CPU: for inference, linear layers by oneDNN."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.utils.weak import WeakTensorKeyDictionary

from uvit_dist.models.uvit import Mlp

_PACKED = WeakTensorKeyDictionary()
"""Weights in oneDNN's layout, by the weight, and which state of it that was; gone with the weight."""


class PackedLinear(nn.Linear):
    """A linear layer for inference in fp32, with GELU behind it or not, by oneDNN with the weight in its own layout.

    The layout is made at the first use of a weight, by whichever layer, and again after the weight has changed. It
    takes as much memory as the weight. Where gradients are wanted, and in another dtype, it is the linear layer itself.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """input: (…, in). Returns (…, out)."""
        fp32 = input.dtype == self.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if torch.is_grad_enabled() or not fp32:
            output = super().forward(input)
            return gelu(output) if self.gelu else output
        after, kind = ("gelu", "none") if self.gelu else ("none", "")  # exact: with erf, not its approximation
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, _packed(self.weight), self.bias, after, [], kind)
        return product


def _packed(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's layout."""
    state = (weight.data_ptr(), weight._version)
    if weight not in _PACKED or _PACKED[weight][0] != state:
        _PACKED[weight] = state, torch.ops.mkldnn._reorder_linear_weight(weight)
    packed: Tensor = _PACKED[weight][1]
    return packed


def for_inference(network: nn.Module) -> nn.Module:
    """The network as it is best run here. On a CPU a twin of it, which shares its weights; elsewhere itself."""
    weights = [*network.parameters(), *network.buffers()]
    if (
        not weights
        or any(w.device.type != "cpu" for w in weights)
        or not hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return network
    twin = copy.deepcopy(network, {id(weight): weight for weight in weights})
    for parent in list(twin.modules()):
        with_gelu = type(parent) is Mlp
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                setattr(parent, name, PackedLinear(child, gelu=with_gelu and name == "fc1"))
        if with_gelu:
            parent.act = nn.Identity()
    return twin
