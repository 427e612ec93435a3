"""minillm: how large language models are trained, each technique built from scratch."""

__version__ = "0.1.0"
