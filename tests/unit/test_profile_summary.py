"""The page of a trace, of small traces written out by hand in the form in which torch's profiler writes them."""

from uvit_dist.profile_summary import merged, summary, within

HOST, GPU = {"pid": 1, "tid": 1}, {"pid": 0, "tid": 7}


def event(cat, name, start, end, **where):
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, **(where or HOST)}


def rows(page):
    """First cell → the others, of all tables."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {first: rest for first, *rest in cells}


def test_intervals():
    assert merged([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert within([(0, 4), (5, 9)], [(1, 2), (3, 6), (8, 20)]) == [(1, 2), (3, 4), (5, 6), (8, 9)]


def gpu_trace():
    """Two steps of 1,000 µs: of each, 600 of kernels, 200 of NCCL, half of it beside them, 100 of waiting for data."""
    out = [{"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "python"}}]
    for number in range(2):
        begin = 10_000 * number
        out += [
            event("user_annotation", f"step {number}", begin, begin + 1000),
            event("user_annotation", "data wait", begin, begin + 100),
            event("user_annotation", "agree", begin + 700, begin + 990),
            event("cpu_op", "aten::item", begin + 710, begin + 900),
            event("cpu_op", "aten::_local_scalar_dense", begin + 711, begin + 899),
            event("cuda_runtime", "cudaStreamSynchronize", begin + 720, begin + 890),
            event("cuda_runtime", "cudaLaunchKernel", begin + 120, begin + 130),
            event("kernel", "gemm", begin + 150, begin + 450, **GPU),
            event("kernel", "gemm", begin + 450, begin + 650, **GPU),
            event("kernel", "adam", begin + 800, begin + 900, **GPU),
            event("kernel", "ncclDevKernel_AllReduce", begin + 550, begin + 750, pid=0, tid=8),
            event("gpu_user_annotation", "agree", begin + 700, begin + 900, **GPU),
        ]
    return {"traceEvents": [*out, event("kernel", "between", 5000, 6000, **GPU)]}


def test_a_gpu_s_time_is_split_into_compute_communication_data_and_host():
    page = summary(gpu_trace(), "Steps 0 to 1, rank 0")
    found = rows(page)
    assert page.startswith("# Steps 0 to 1, rank 0\n")
    assert "2 steps on one GPU, 1.00 ms each" in page
    assert found["compute"] == ["0.600", "60.0%"]
    assert found["communication"] == ["0.100", "10.0%"], "what lies beside compute is not counted twice"
    assert found["data wait"] == ["0.100", "1"], "the part of the host's table, which comes last"
    assert "| data wait | 0.100 | 10.0% |" in page
    assert found["host"] == ["0.200", "20.0%"]
    assert "0.200 ms per step in all; 0.100 ms of that lie beside compute" in page
    assert found["gemm"] == ["0.500", "2"]
    assert found["ncclDevKernel_AllReduce"] == ["0.200", "1"]
    assert "between" not in found, "outside the steps"
    assert "1 times in a step" in page
    assert found["cudaStreamSynchronize"] == ["aten::_local_scalar_dense in aten::item", "1"]


def test_a_step_that_waits_for_nothing_says_so():
    events = [e for e in gpu_trace()["traceEvents"] if e["name"] != "cudaStreamSynchronize"]
    assert summary({"traceEvents": events}, "x").rstrip().endswith("Nowhere.")


def test_on_a_cpu_operations_are_the_compute_and_their_own_time_is_told():
    events = [
        event("user_annotation", "step 4", 0, 1000),
        event("user_annotation", "data wait", 0, 200),
        event("cpu_op", "aten::linear", 200, 600),
        event("cpu_op", "aten::addmm", 250, 550),
        event("user_annotation", "gloo:all_reduce", 600, 900, pid=1, tid=2),
        event("cpu_op", "c10d::allreduce_", 600, 650),
    ]
    page = summary({"traceEvents": events}, "x")
    found = rows(page)
    assert (found["compute"], found["communication"]) == (["0.400", "40.0%"], ["0.300", "30.0%"])
    assert (found["aten::addmm"][0], found["aten::linear"][0]) == ("0.300", "0.100")
    assert found["host"] == ["0.100", "10.0%"]
    assert "There is no GPU here." in page
