"""Prompt tuning: The Power of Scale for Parameter-Efficient Prompt Tuning (Lester et al. 2021, arXiv:2104.08691).

Trained embeddings stand before the sequence. They see only each other, so their keys and values are the same for every
sequence, and are computed once for all rows of a batch.
"""

from torch import Tensor, nn

from app.config.methods import PromptConfig
from app.methods.prefix import check_length, draw_words, record
from app.models.attention import KeysValues
from app.models.decoder import Decoder, Prefix

NO_MERGE = "no weights of a plain model put embeddings before a sequence; serve the delta"


class TrainedPrompt(Prefix):
    """`embeddings` [length, width] in the place of the first tokens'."""

    def __init__(self, embeddings: Tensor) -> None:
        super().__init__()
        self.length = embeddings.shape[0]
        self.embeddings = nn.Parameter(embeddings)

    def forward(self, decoder: Decoder) -> list[KeysValues]:
        return record(decoder, self.embeddings)


def apply(model: Decoder, config: PromptConfig) -> None:
    """Put a prompt before every sequence, in place; it starts as words drawn from the vocabulary, as in the paper.

    Raises:
        UserError: the context has no room for it.
    """
    check_length(model, config.length)
    model.prefix = TrainedPrompt(draw_words(model, config.length))
