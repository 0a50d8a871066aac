"""Memory of a step, counted by torch's profiler, without memory kept by the C library."""

from itertools import accumulate

from torch.profiler import ProfilerActivity, profile


def allocations(step):
    """Bytes of CPU tensors after each allocation and release of `step`, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    changes.sort(key=lambda event: event.start_ns())
    return list(accumulate(change.nbytes() for change in changes))


def added_peak(step):
    """Most bytes of CPU tensors that `step` holds at once, beyond those that lived before it.

    A step that frees tensors which it did not allocate itself makes the figure too small.
    """
    return max([0, *allocations(step)])
