"""Which steps are left out, against a list and a median in plain Python."""

import json
import math
import statistics

import torch

from diffit.training.guard import ENOUGH, SPIKE, WINDOW, Guard


def norms(count):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(count, generator=generator).exp()
    values[::17] *= 200
    values[5] = math.nan
    values[40] = math.inf
    return values


def test_it_is_a_running_median_of_the_steps_that_were_taken():
    guard, slots = Guard(torch.device("cpu"), spikes=True), [None] * WINDOW
    for i, norm in enumerate(norms(3 * WINDOW)):
        known = [value for value in slots if value is not None]
        # Of an even number of values torch takes the lower middle one.
        spike = len(known) >= ENOUGH and float(norm) > SPIKE * statistics.median_low(known)
        expected = not math.isfinite(norm) or spike
        assert bool(guard.skips(norm)) == expected, i
        if not expected:
            slots[i % WINDOW] = float(norm)


def test_a_level_that_rises_slowly_is_no_spike():
    guard = Guard(torch.device("cpu"), spikes=True)
    assert not any(guard.skips(torch.tensor(1.05**i)) for i in range(500))


def test_what_it_remembers_survives_strict_json():
    ours, theirs = (Guard(torch.device("cpu"), spikes=True) for _ in range(2))
    values = norms(100)
    for norm in values[:30]:
        ours.skips(norm)
    theirs.load_state_dict(json.loads(json.dumps(ours.state_dict(), allow_nan=False)))
    assert [bool(ours.skips(norm)) for norm in values[30:]] == [bool(theirs.skips(norm)) for norm in values[30:]]
