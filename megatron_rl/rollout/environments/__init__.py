"""Environments that come with the package. Your own are named by their dotted path."""
