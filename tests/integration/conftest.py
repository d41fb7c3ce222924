"""Shards and a reference of the digits, made once for all tests of whole jobs."""

import pytest
import torch

from data_tools import precompute_latents
from data_tools.fid_reference import write_reference
from data_tools.sources import DigitsSource
from tests.integration.slurm_fixtures import cluster, slurm_cluster, start, whole  # noqa: F401 - fixtures
from tests.tiny import tiny_config


class FewDigits(DigitsSource):
    def __init__(self):
        super().__init__()
        self.keys, self.labels = self.keys[:120], self.labels[:120]


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data")
    config = tiny_config(directory, directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(precompute_latents, "open_images", lambda _: FewDigits())
        precompute_latents.precompute(config, torch.device("cpu"))
    write_reference(config)
    return directory
