"""Settings: declared (settings), read (load), checked as a whole (checks), shown (show). Imports neither torch nor megatron."""
