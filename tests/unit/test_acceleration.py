"""Compiled blocks, kernels of the attention, batches on their way to the device."""

import pytest
import torch

from tests.tiny import tiny_config
from uvit_dist.acceleration import attention_kernel, compile_blocks, on_device
from uvit_dist.config import SpeedConfig
from uvit_dist.data.batch import Batch, RowsPool
from uvit_dist.data.latents import Provenance
from uvit_dist.errors import ConfigError
from uvit_dist.models.uvit import UViT

CPU = torch.device("cpu")
GPU = torch.cuda.is_available()


def network(use_checkpoint=False):
    torch.manual_seed(0)
    return UViT(8, 2, 4, 32, 2, 2, num_classes=3, use_checkpoint=use_checkpoint)


def forward_backward(net):
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([0, 2])
    loss = net(x, torch.tensor([1.0, 500.0]), labels).square().mean()
    net.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def test_an_attention_kernel_is_used_and_one_that_is_not_there_is_told(tmp_path):
    def kernel(name):
        return attention_kernel(tiny_config(tmp_path, tmp_path / "run", f"speed.attention={name}"), CPU)

    results = []
    for name in ("auto", "flash", "math"):
        with kernel(name)(), torch.profiler.profile() as profile:
            results.append(forward_backward(network()))
        names = {event.name for event in profile.events()}
        assert any("flash" in name for name in names) == (name != "math")
    assert torch.allclose(results[1][1], results[2][1], rtol=1e-4, atol=1e-7)
    assert torch.equal(results[0][1], results[1][1]), "torch's choice on a CPU"
    for name in ("cudnn", "efficient"):
        with pytest.raises(ConfigError, match=rf"speed\.attention {name}: no such kernel here for heads of 16"):
            kernel(name)


def test_graphs_need_a_gpu():
    with pytest.raises(ConfigError, match=r"speed\.cuda_graphs needs a GPU"):
        compile_blocks(network(), SpeedConfig(compile=True, cuda_graphs=True), CPU)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # torch's own
@pytest.mark.parametrize("use_checkpoint", [False, True, "selective"])
def test_compiled_blocks_compute_the_same_and_keep_less(use_checkpoint):
    def kept_bytes(net):
        seen = {}
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}

        def keep(tensor):
            if tensor.untyped_storage().data_ptr() not in weights:
                seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            net(torch.randn(2, 4, 8, 8), torch.tensor([1.0, 500.0]), torch.tensor([0, 2])).sum()
        return sum(seen.values())

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()  # of the case before
    plain, compiled = network(use_checkpoint), network(use_checkpoint)
    keys = list(compiled.state_dict())
    compile_blocks(compiled, SpeedConfig(compile=True), CPU)
    (loss, gradients), (other, others) = forward_backward(plain), forward_backward(compiled)
    assert list(compiled.state_dict()) == keys
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert other.item() == pytest.approx(loss.item(), rel=1e-6)
    assert (others - gradients).norm() <= 1e-6 * gradients.norm()
    everything, alike = kept_bytes(network()), kept_bytes(plain)
    told = f"{kept_bytes(compiled)} of {everything} bytes, {alike} if not compiled"
    assert kept_bytes(compiled) <= alike, told


def batch(count=4):
    made = Provenance(kind="moments", dtype="float16", shape=(8, 4, 4), source="drawn", image_size=32, crop="none",
                      mirror=False, classes=3, samples=count)  # fmt: skip
    data, _ = RowsPool(made, pinned=GPU).take(count).tensors()
    data.copy_(torch.randn(data.shape, generator=torch.Generator().manual_seed(0)))
    return Batch(3, 0, torch.arange(count), torch.arange(count) % 3, data)


def test_on_a_cpu_a_batch_stays_where_it_is():
    one = batch()
    moved = on_device(one, CPU, prefetch=True)
    assert (moved.data.data_ptr(), moved.step) == (one.data.data_ptr(), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_a_batch_is_copied_to_the_gpu_beside_its_work():
    device, one = torch.device("cuda", 0), batch(512)
    assert one.data.is_pinned()
    work = torch.randn(4096, 4096, device=device)
    on_device(one, device, prefetch=True)
    for _ in range(20):
        work = work @ work / 64
    moved, copied = on_device(one, device, prefetch=True), torch.cuda.Event()
    assert not torch.cuda.current_stream().query(), "the host has waited for nothing"
    copied.record()
    copied.synchronize()
    for ours, theirs in ((one.data, moved.data), (one.ids, moved.ids), (one.labels, moved.labels)):
        assert torch.equal(ours, theirs.cpu())
