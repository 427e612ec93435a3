"""Use of a trained model: text generation."""

from minillm.inference.generate import generate, stream
from minillm.inference.sampling import candidates, sample

__all__ = ["candidates", "generate", "sample", "stream"]
