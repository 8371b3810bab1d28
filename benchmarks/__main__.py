"""``make bench``: all of them."""

from benchmarks import attention, latent, memory, metrics, sampling, step
from benchmarks.measure import machine

print(machine(), flush=True)
for benchmark in (attention, step, memory, latent, sampling, metrics):
    benchmark.main()
