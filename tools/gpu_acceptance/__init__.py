"""Does megatron-rl keep its promises on this machine's GPU? One command tries them part by part and prints a table.

    python -m tools.gpu_acceptance --smoke      every part at a tiny size, on whatever there is: finds what is missing
    python -m tools.gpu_acceptance              every part

docs/gpu.md says what each row means, and how to do it in pieces.
"""
