"""Peak memory of a step, counted by torch's profiler, without memory kept by the C library."""

from torch.profiler import ProfilerActivity, profile


def added_peak(step):
    """Most bytes of CPU tensors that `step` holds at once, beyond those that lived before it.

    A step that frees tensors which it did not allocate itself makes the figure too small.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    events = profiler.profiler.kineto_results.events()
    changes = [event for event in events if event.name() == "[memory]"]
    held = 0
    peak = 0
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak
