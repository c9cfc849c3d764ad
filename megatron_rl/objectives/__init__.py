"""What a policy is asked to become. Pure tensors: this package imports torch alone."""
