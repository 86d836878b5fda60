"""Benchmarks of cuattn beside its peers: `python -m bench --help` lists the parts.

Method. Inputs are standard normal, rotated through more than three times the L2 cache where they would otherwise fit it.
The contenders of a case run in interleaved rounds, so that clocks and temperature treat all of them alike; a number is the
median over the rounds. A round is timed with CUDA events behind a kernel that keeps the GPU busy until the host has queued
the round's calls: forward rows are GPU time, and host time has its own part. FLOPs come from the masks' own count of
visible pairs. The bound of a case is the larger of FLOPs / rate of a large matrix product and bytes / read bandwidth, both
measured on the same GPU (ceilings.py).

Backward rows are the gradients alone: out and lse are there, and a peer's graph, from a forward before. A peer runs through
torch.autograd.grad with its graph kept. FLOPs are 2.5 times those of the forward.
"""
