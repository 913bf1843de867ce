"""Modules that put this package into other people's training code; each needs that code when it is called."""
