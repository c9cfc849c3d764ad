"""Programs that a model wrote, run where they can do no harm.

    runner.Sandbox   here, in the sampler: starts a keeper for each run and reads what it tells
    keeper           a process of its own, trusted: builds the walls, starts the program behind them, watches it
    walls, new_root, syscalls, kernel    what the kernel offers, through ctypes
    harness          the first lines that run behind the walls, in the program's own interpreter
    probe            which walls stand on this machine, found by running at them

`keeper` and what it imports use the standard library alone: it is started bare, a few times a second.
"""
