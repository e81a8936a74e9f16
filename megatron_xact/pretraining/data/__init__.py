"""Text in, training data for Megatron out: documents -> byte-level BPE -> .bin/.idx, told by one data.json.

Start at `preprocess.prepare`; `cli` is `xact data`. Nothing is imported here, so that `--help` stays light.
"""
