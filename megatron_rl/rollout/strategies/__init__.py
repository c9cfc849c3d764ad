"""How a prompt becomes groups of samples: one file a strategy. What learns from them does not know which it was."""
