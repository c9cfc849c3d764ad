"""How alike trainer and servers compute: the same tokens scored by both, the difference measured, and its cause named."""
