"""What a policy is asked to become. Pure tensors: this package imports torch alone.

Four kinds of ideas, which combine freely where that makes sense: advantages (rewards to one number a sequence), surrogates
(log-probs and advantages to a loss), weights (detached factors of tokens or sequences) and penalties (on loss or reward).
`registry` knows all of them by name.
"""
