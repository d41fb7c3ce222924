"""Inception with random weights: only the arithmetic is compared."""

from __future__ import annotations

import pytest
import pytorch_fid.inception
import torch
import torchvision

StateDict = dict[str, torch.Tensor]


def random_weights() -> StateDict:
    """Random weights under pytorch-fid's own names, scaled so that activations neither vanish nor explode.

    Some layers lack num_batches_tracked, as files of old versions of torch do.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(torchvision.models.Inception3, "load_state_dict", lambda *_: None)
        names = pytorch_fid.inception.fid_inception_v3().state_dict()
    drawn = torch.Generator().manual_seed(0)
    for name, value in names.items():
        if value.ndim == 4:
            value.normal_(std=(2 / value[0].numel()) ** 0.5, generator=drawn)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5, generator=drawn)
        elif name.endswith(("bn.bias", "running_mean")):
            value.normal_(std=0.2, generator=drawn)
    return {
        name: value for name, value in names.items() if not name.startswith("Mixed_7c") or "num_batches" not in name
    }
