"""Sweeps: the points of the values that are given, each a valid configuration; a table that says what it is of."""

import pytest

from tests.tiny import DEMO
from uvit_dist.config_yaml import load_config
from uvit_dist.errors import ConfigError
from uvit_dist.evaluation import sweep


def asked(*arguments):
    config = load_config(DEMO, sweep.overrides_of(arguments))
    return [(p.sample.solver, p.sample.steps, p.sample.cfg_scale) for p in sweep.points(config)]


def test_all_combinations_are_points_and_what_is_not_swept_stays():
    assert asked("cfg_scale=0,0.2", "steps=10,20") == [
        ("dpm_solver_pp", 10, 0.0), ("dpm_solver_pp", 20, 0.0), ("dpm_solver_pp", 10, 0.2), ("dpm_solver_pp", 20, 0.2),
    ]  # fmt: skip
    assert asked("solver=dpm_solver_pp,dpm_solver") == [("dpm_solver_pp", 20, 1.5), ("dpm_solver", 20, 1.5)]
    assert asked("steps=30", "sample.cfg_scale=1") == [("dpm_solver_pp", 30, 1.0)], "an override among them is one"
    assert asked() == [("dpm_solver_pp", 20, 1.5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cfgscale=1"], "cfgscale: no such key"),
        (["cfg_scale=-1,0"], r"cfg_scale \[-1.0, 0.0\] must be 0 or more"),
        (["steps=1"], r"steps \[1\] must be above 1"),
        (["solver=heun"], "evaluate.sweep.solver.0"),
        (["solver=euler_maruyama_ode"], "sample.solver euler_maruyama_ode needs diffusion.schedule vpsde"),
        (["cfg_scale=0,1", "diffusion.null_label=null", "diffusion.label_dropout=0", "sample.cfg_scale=0"],
         "sample.cfg_scale 1.0 needs diffusion.null_label"),
        (["steps=10,20", "evaluate.small_samples=20"], "small_samples and sweep exclude each other"),
    ],
)  # fmt: skip
def test_a_point_that_cannot_be_is_told_before_any_is_done(arguments, message):
    with pytest.raises(ConfigError, match=message):
        asked(*arguments)


def test_the_table_marks_the_lowest_distance_and_says_of_what_it_is():
    def record(scale, fid):
        return {"feature_space": "inception", "fid": fid, "recall": 0.5, "samples": 10_000, "weights": "ema", "step": 7,
                "cfg_scale": scale, "solver": "dpm_solver", "solver_steps": 50, "sample_precision": "fp32", "seed": 1,
                "reference": "r.npz", "seconds": 1.5, "fid_real_halves": 0.1}  # fmt: skip

    lines = sweep.table([record(0.0, 9.31), record(0.4, 3.4)]).splitlines()
    assert lines[0] == "10000 images, ema weights of step 7, fp32, seed 1, against r.npz"
    assert lines[2] == "| solver | solver_steps | cfg_scale | fid | recall |"
    assert lines[4:] == [
        "| dpm_solver | 50 | 0.0 | 9.3100 | 0.5000 |",
        "| dpm_solver | 50 | 0.4 | **3.4000** | 0.5000 |",
    ]
