"""Starting a run on a cluster: pure functions from settings to the script or manifest that does it.

`job` says what is started where; `slurm`, `torchrun` and `kubernetes` write it down. What runs in the end are the scripts of
`launch/` and the commands of `megatron-rl`: nothing here is executed.
"""
