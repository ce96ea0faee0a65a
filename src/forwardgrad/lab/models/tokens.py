"""Transformers over tokens: an encoder that reads a whole text (BERT), and a decoder that predicts every next token (GPT-2).

They are plain torch, so that every estimator and every engine takes them as they are. Attention is `scaled_dot_product_attention`
alone, and there is no dropout: a zeroth-order estimate compares losses, and the masks would be noise in them.

name       | a block; what is read out                                              | parameters
bert-6x384 | x ← norm(x + f(x)), GELU; a linear classifier of the mean over tokens  | 22.6 million, and the classifier
gpt-12x768 | x ← x + f(norm(x)), GELU by tanh; the products with all embeddings     | 124.4 million
gpt-4x128  | the same, with the vocabulary and the length of data such as movie-words | 1.3 million
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDING = 0  # the token id of places behind a text's end
WORDS = {"bert": 30_522, "gpt": 50_257}  # tokens that there are: BERT's uncased vocabulary, and GPT-2's
LONGEST = {"bert": 512, "gpt": 1024}  # tokens of a text at most
SPREAD = 0.02  # standard deviation of fresh weights, as BERT and GPT-2 have


class Attention(nn.Module):
    """Attention of several heads, between all places or from each place to those before it."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [n, length, width], mask [n, 1, 1, length] (True where a place may be looked at): [n, length, width]."""
        q, k, v = (part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.output(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class EncoderBlock(nn.Module):
    """A block of BERT: attention and two dense layers, each added to what it read and then normalised."""

    def __init__(self, width: int, inner: int, heads: int, eps: float) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads, causal=False), nn.LayerNorm(width, eps)
        self.inner, self.outer, self.norm2 = nn.Linear(width, inner), nn.Linear(inner, width), nn.LayerNorm(width, eps)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.outer(F.gelu(self.inner(x))))  # type: ignore[no-any-return]


class DecoderBlock(nn.Module):
    """A block of GPT-2: attention to what came before and two dense layers, each reading normalised values and added to them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=True)
        self.norm2, self.inner, self.outer = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.outer(F.gelu(self.inner(self.norm2(x)), approximate="tanh"))  # type: ignore[no-any-return]


def placed(tokens: Tensor) -> Tensor:
    """The place of every token, [n, length]: one row an example, so that estimators that move examples apart find them here too."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


class Bert(nn.Module):
    """Token ids [n, length], 0 behind a text's end, to scores [n, classes]: a linear read-out of the mean over a text's tokens.

    BERT's second kind of segment is left out; what its first adds to every token belongs to the positions.
    """

    def __init__(self, layers: int, width: int, heads: int, classes: int, *, eps: float = 1e-12) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS["bert"], width), nn.Embedding(LONGEST["bert"], width)
        self.norm = nn.LayerNorm(width, eps)
        self.blocks = nn.ModuleList(EncoderBlock(width, 4 * width, heads, eps) for _ in range(layers))
        self.classifier = nn.Linear(width, classes)
        self.apply(_begin)

    def features(self, tokens: Tensor) -> Tensor:
        """What the encoder knows of every text: the mean over its tokens, [n, width]."""
        there = tokens != PADDING
        x, mask = self.norm(self.words(tokens) + self.positions(placed(tokens))), there[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        weights = there.to(x.dtype).unsqueeze(-1)
        mean: Tensor = (x * weights).sum(1) / weights.sum(1)
        return mean

    def forward(self, tokens: Tensor) -> Tensor:
        return self.classifier(self.features(tokens))  # type: ignore[no-any-return]


class Gpt(nn.Module):
    """Token ids [n, length] to the scores of the token behind each, [n, length, words]; the read-out is the embedding's own matrix.

    With `behind` [n, length], the token that is behind each, it gives the mean cross-entropy instead. That is made a few places at a time,
    as the scores of all places are more numbers than anything else in the network. `words` is how many tokens there are, and `longest` how
    many a text has at most.
    """

    def __init__(self, layers: int, width: int, heads: int, words: int = WORDS["gpt"], longest: int = LONGEST["gpt"]) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(words, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(DecoderBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, words, bias=False)
        self.apply(_begin)
        self.readout.weight = self.words.weight

    def forward(self, tokens: Tensor, behind: Tensor | None = None) -> Tensor:
        x = self.words(tokens) + self.positions(placed(tokens))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if behind is None:
            return self.readout(x)  # type: ignore[no-any-return]
        parts = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(x.flatten(0, 1), self.readout.weight, behind.flatten(), options=parts)


def _begin(module: nn.Module) -> None:
    """Fresh weights as BERT's and GPT-2's: small normal numbers, and no bias."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=SPREAD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
