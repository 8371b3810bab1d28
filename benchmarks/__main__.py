"""``make bench``: all of them."""

from benchmarks import attention, latent, metrics, sampling, step
from benchmarks.measure import machine

print(machine(), flush=True)
for benchmark in (attention, step, latent, sampling, metrics):
    benchmark.main()
