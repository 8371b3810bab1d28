"""``make bench``: all of them."""

from benchmarks import attention, metrics, sampling, step
from benchmarks.measure import machine

print(machine(), flush=True)
for benchmark in (attention, step, sampling, metrics):
    benchmark.main()
