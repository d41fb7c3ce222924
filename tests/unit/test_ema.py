from __future__ import annotations

import pytest
import torch

from uvit_dist.ema import IN_C_FROM, ema_decay_at, ema_update_, kernel


def test_decay_without_warmup_is_constant() -> None:
    assert [ema_decay_at(step, 0.9999, warmup=False) for step in (0, 1, 10**6)] == [0.9999] * 3


def test_decay_with_warmup_grows_to_the_constant() -> None:
    decays = [ema_decay_at(step, 0.9999, warmup=True) for step in (0, 1, 90, 10**4, 10**6)]
    assert decays[:3] == [1 / 10, 2 / 11, 91 / 100]
    assert decays == sorted(decays)
    assert decays[-1] == 0.9999


def test_update_follows_the_recurrence_in_place() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (5,), ()]
    ema = [torch.randn(shape, generator=generator) for shape in shapes]
    expected, addresses = [average.double() for average in ema], [average.data_ptr() for average in ema]
    for _ in range(50):
        masters = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
        ema_update_(ema, masters, 0.99)
        expected = [0.99 * e + 0.01 * m.detach().double() for e, m in zip(expected, masters, strict=True)]
    for average, exact in zip(ema, expected, strict=True):
        torch.testing.assert_close(average.double(), exact, rtol=0, atol=1e-6)
        assert not average.requires_grad
    assert [average.data_ptr() for average in ema] == addresses


def test_a_small_update_is_not_lost() -> None:
    ema, bf16 = [torch.ones(1)], torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        ema_update_(ema, [torch.full((1,), 2.0)], 0.9999)
        bf16.lerp_(torch.full((1,), 2.0, dtype=torch.bfloat16), 1e-4)
    assert ema[0].item() == pytest.approx(2 - 0.9999**100, rel=1e-5)
    assert bf16.item() == 1  # the control: why the average is fp32


@pytest.mark.parametrize("decay", [0.1, 0.9, 0.9999])  # 0.1: as at the first step of the warm-up
@pytest.mark.parametrize("size", [IN_C_FROM - 1, IN_C_FROM, 2 * IN_C_FROM + 12345])
def test_large_averages_are_what_pytorch_computes(size: int, decay: float) -> None:
    assert kernel() is not None, "there is no C compiler with OpenMP here"
    generator = torch.Generator().manual_seed(size)
    ema, master = (torch.randn(size + 1, generator=generator)[1:] for _ in range(2))  # at no line of the caches
    expected, state = torch.lerp(ema, master, 1 - decay), ema._version
    ema_update_([ema], [master], decay)
    assert torch.equal(ema, expected)
    assert ema._version > state, "what was made of the weights before is seen to be old"


def test_large_averages_with_strides_and_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    ema, master = (torch.randn(2, IN_C_FROM, generator=generator) for _ in range(2))
    strided, contiguous = ema.clone().t(), ema.clone()
    ema_update_([strided], [master.t()], 0.9)
    monkeypatch.setattr("uvit_dist.ema.kernel", lambda: None)
    ema_update_([contiguous], [master], 0.9)
    assert torch.equal(strided.t(), contiguous)
    assert torch.equal(contiguous, torch.lerp(ema, master, 1 - 0.9))


def test_no_weights_is_no_work() -> None:
    ema_update_([], [], 0.9999)


def test_other_precisions_and_lengths_are_refused() -> None:
    with pytest.raises(AssertionError, match="float32"):
        ema_update_([torch.ones(1)], [torch.ones(1, dtype=torch.bfloat16)], 0.9)
    with pytest.raises(AssertionError, match="1 averages of 2 weights"):
        ema_update_([torch.ones(1)], [torch.ones(1)] * 2, 0.9)
