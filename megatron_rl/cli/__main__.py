"""`python -m megatron_rl.cli`, which is what launchers start on every rank."""

from megatron_rl.cli import main

main()
