"""What keeps a run's checkpoints usable: which one to load, checksums, retention, room on the disk.

folder      the tracker file, the iter_* folders, and whether one of them is whole
checksums   a digest of every file of a checkpoint, in Megatron's own format
choice      the checkpoint a run goes on from, the same on every rank
retention   which checkpoints go, and how they go without a moment in which half of one looks like a whole one
space       whether there is room for one more
keeper      all of that while Megatron trains
"""
