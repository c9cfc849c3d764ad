"""Rules that settings, model and number of ranks must keep together. `config.checks` runs all of them."""
