"""What works here, what does not, and what to type: ``python -m uvit_dist.doctor``.

Facts are read by one function and judged by another, which tests call with facts of their own. What needs torch, a
driver or a server runs in child processes (``probes``), each with a time limit: the doctor itself never hangs.
"""
