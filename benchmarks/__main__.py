"""``make bench``: all of them."""

from benchmarks import attention, latent, sampling, step
from benchmarks.measure import machine

print(machine(), flush=True)
for benchmark in (attention, step, latent, sampling):
    benchmark.main()
