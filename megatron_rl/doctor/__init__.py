"""The doctor: what of this machine, its software and its servers would spoil a run, found before the first GPU-hour.

A check is a function from a `Visit` to findings, one file a kind; `examine.CHECKS` lists them. Nothing here imports torch into
the program that reports: what needs it runs in processes of its own, with a time limit (`apart`), so that a machine on which
torch does not even load is told what is wrong with it.
"""
