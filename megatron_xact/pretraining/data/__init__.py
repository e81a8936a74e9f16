"""Text in, training data for Megatron out: documents -> byte-level BPE -> .bin/.idx, told by one data.json.

Start at `preprocess.prepare`; `cli` is `xact data`. Nothing is imported here, so that `--help` stays light.

    corpus, readers, hub   where text comes from, readable from any position on
    documents, tokenizer   what a record becomes; which side of the split it falls on
    workers, encoding      token ids by many processes, written in order, with a journal
    building, indexed      the folder that grows until it is whole; Megatron's file format
    inspection, blend      `xact data inspect`
    dali                   another loader of the same batches
"""
