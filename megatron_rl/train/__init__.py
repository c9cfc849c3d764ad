"""Training runs. So far: a supervised toy run that exercises the whole policy."""
