"""From the encodings of one or two texts to what a model is fed: first truncation, then the template.

Truncation has to know how many tokens the template is going to add, and the template also goes around each stretch that
overflowed. Padding comes last, over a whole batch (`padding`).
"""

from __future__ import annotations

from minillm.tokenizers.encoding import Encoding
from minillm.tokenizers.template import Template
from minillm.tokenizers.truncation import Truncation

NOTHING_ADDED = Template()


def prepare(
    first: Encoding,
    second: Encoding | None = None,
    *,
    template: Template | None = None,
    truncation: Truncation | None = None,
) -> Encoding:
    """One encoding of a text, or of a pair.

    Args:
        first, second: What `Tokenizer.encode_with_offsets` says of each text; nothing has been added yet.
        template: What goes around them; None: nothing, and the second text gets the type id 1.
        truncation: How they are made to fit; None leaves them as long as they are.

    Raises:
        ValueError: Truncation cannot make the texts fit, see `Truncation.apply`.
    """
    template = template or NOTHING_ADDED
    if truncation is not None:
        first, second = truncation.apply(first, second, template.n_added(pair=second is not None))
    return template.apply(first, second)
