"""What a run will need, worked out before it starts: sizes, legality, memory, time, traffic, disk; and a dry run."""
