"""The bank: the joint between sampling and learning. Every finished group lies in it, durably, before anybody hears of it.

A folder: an append-only log of what is finished and not yet sealed, and one Parquet file a training step. `Bank` writes it,
one process at a time; `BankReader` reads it, any number of processes at any time. docs/bank.md describes the files. Nothing
here imports torch, and nothing is pickled.
"""
