"""Which test proves which golden file: all of them are held, none is forgotten."""

import ast

import pytest

from tests.golden_values import GOLDEN
from tests.tiny import ROOT

PROVED_BY = {
    "uvit_class_cond.npz": "test_uvit.py::test_forward_equals_the_official_network",
    "uvit_uncond_conv.npz": "test_uvit.py::test_forward_equals_the_official_network",
    "uvit_text_cond.npz": "test_uvit.py::test_forward_equals_the_official_network",
    "uvit_mlp_time_qkv_bias.npz": "test_uvit.py::test_forward_equals_the_official_network",
    "presets.json": "test_presets.py::test_the_network_is_the_published_one",
    "vae_state_dict.json": "test_autoencoder.py::test_stable_diffusion_golden",
    "vae.npz": "test_autoencoder.py::test_stable_diffusion_golden",
    "schedules.npz": "test_schedule.py::test_discrete_schedule_is_the_golden_one",
    "dpm_solver_pp_discrete_7.npz": "test_solvers.py::test_dpm_solver_pp_is_the_golden_one",
    "dpm_solver_pp_discrete_20.npz": "test_solvers.py::test_dpm_solver_pp_is_the_golden_one",
    "dpm_solver_pp_discrete_50.npz": "test_solvers.py::test_dpm_solver_pp_is_the_golden_one",
    "dpm_solver_vpsde_8.npz": "test_solvers.py::test_dpm_solver_is_the_golden_one",
    "dpm_solver_vpsde_20.npz": "test_solvers.py::test_dpm_solver_is_the_golden_one",
    "dpm_solver_vpsde_50.npz": "test_solvers.py::test_dpm_solver_is_the_golden_one",
    "euler_maruyama_sde_20.npz": "test_solvers.py::test_euler_maruyama_is_the_golden_one",
    "euler_maruyama_ode_20.npz": "test_solvers.py::test_euler_maruyama_is_the_golden_one",
    "frechet_full_rank.npz": "test_fid.py::test_frechet_full_rank_is_the_golden_one",
    "frechet_rank_deficient.npz": "test_fid.py::test_frechet_rank_deficient_is_exact_and_near_the_golden_one",
    "crops.npz": "test_data_tools.py::test_crops_are_the_official_ones_of_crops_npz",
    "to_uint8.npz": "test_data_tools.py::test_uint8_is_what_an_image_writer_stores",
}
"""Golden file → the test that holds it at its tolerance."""


def test_no_golden_file_is_forgotten():
    assert set(PROVED_BY) == {path.name for path in GOLDEN.iterdir()} - {"README.md"}


@pytest.mark.parametrize("test", sorted(set(PROVED_BY.values())))
def test_the_tests_are_there(test):
    module, function = test.split("::")
    tree = ast.parse((ROOT / "tests" / "unit" / module).read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
