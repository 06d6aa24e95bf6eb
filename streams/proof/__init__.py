"""The state, held against an independent computation over the recorded frames, the source events and the workers' disks."""
