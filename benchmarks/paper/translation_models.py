"""The two models of the translation experiment behind one interface: encode a source, decode after a prefix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.paper.parallel_text import PAD, Batch


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    width: int  # of embeddings and layers
    layers: int  # of the encoder, and of the decoder
    inner: int = 0  # width of the feed-forward layers (Transformer)
    heads: int = 1  # of the attention (Transformer)
    shared: bool = True  # one matrix for both embeddings and the output layer instead of three
    dropout: float = 0.1


class Encoded(NamedTuple):
    """What a decoder needs of a source."""

    memory: Tensor  # float32 [sentences, source length, width]
    padding: Tensor  # bool [sentences, source length], True where there is no token
    # of the encoder's recurrence at each sentence's end, each [layers, sentences, width]; empty for a Transformer
    state: tuple[Tensor, ...] = ()

    def select(self, kept: Tensor) -> Encoded:
        """Of the sentences where ``kept`` (bool [sentences]) is True."""
        return Encoded(self.memory[kept], self.padding[kept], tuple(part[:, kept] for part in self.state))


class Translator(nn.Module):
    """Embeddings and output layer around an encoder and a decoder. Glorot initialisation of all matrices."""

    def __init__(self, shape: Shape, pieces: int) -> None:
        super().__init__()
        self.width = shape.width
        self.dropout = nn.Dropout(shape.dropout)
        self.source_embedding = nn.Embedding(pieces, shape.width)
        self.target_embedding = self.source_embedding if shape.shared else nn.Embedding(pieces, shape.width)
        self.output = nn.Linear(shape.width, pieces)
        if shape.shared:
            self.output.weight = self.source_embedding.weight
        self._add_layers(shape)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def _add_layers(self, shape: Shape) -> None:
        raise NotImplementedError

    def encode(self, source: Tensor) -> Encoded:
        """Of int64 [sentences, source length]."""
        raise NotImplementedError

    def decode(self, encoded: Encoded, prefix: Tensor) -> Tensor:
        """Float32 [sentences, length, width]: at each place of ``prefix`` (int64 [sentences, length]) what predicts
        the next token through :attr:`output`; it depends on no later place."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> Tensor:
        """Logits, float32 [sentences, length, pieces], for all places of the target but the first."""
        return self.output(self.decode(self.encode(batch.source), batch.target[:, :-1]))

    def loss(self, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy of the target's tokens in nats, padding left out."""
        logits, wanted = self(batch).flatten(0, 1), batch.target[:, 1:].flatten()
        return F.cross_entropy(logits, wanted, ignore_index=PAD, label_smoothing=label_smoothing)


class Transformer(Translator):
    """Vaswani et al. 2017 with layer norms before the sub-layers and one after each stack."""

    def _add_layers(self, shape: Shape) -> None:
        settings = {"dropout": shape.dropout, "batch_first": True, "norm_first": True}
        sizes = (shape.width, shape.heads, shape.inner)
        encoder = nn.TransformerEncoderLayer(*sizes, **settings)
        decoder = nn.TransformerDecoderLayer(*sizes, **settings)
        norms = (nn.LayerNorm(shape.width), nn.LayerNorm(shape.width))
        self.encoder = nn.TransformerEncoder(encoder, shape.layers, norms[0], enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(decoder, shape.layers, norms[1])

    def encode(self, source: Tensor) -> Encoded:
        padding = source == PAD
        embedded = self._embed(self.source_embedding, source)
        return Encoded(self.encoder(embedded, src_key_padding_mask=padding), padding)

    def decode(self, encoded: Encoded, prefix: Tensor) -> Tensor:
        length = prefix.shape[1]
        later = torch.ones(length, length, dtype=torch.bool, device=prefix.device).triu(1)
        embedded = self._embed(self.target_embedding, prefix)
        # Padding is at the end of a prefix, so no token sees it: `later` suffices.
        return self.decoder(
            embedded, encoded.memory, tgt_mask=later, tgt_is_causal=True, memory_key_padding_mask=encoded.padding
        )

    def _embed(self, embedding: nn.Embedding, tokens: Tensor) -> Tensor:
        places = position_encoding(tokens.shape[1], self.width).to(tokens.device)
        return self.dropout(embedding(tokens) * math.sqrt(self.width) + places)


def position_encoding(length: int, width: int) -> Tensor:
    """Float32 [length, width]: sines in the even columns, cosines in the odd ones (Vaswani et al. 2017, 3.5)."""
    angles = torch.arange(length)[:, None] * 10_000 ** (-torch.arange(0, width, 2) / width)
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class AttentionLSTM(Translator):
    """Stacked LSTMs, the decoder started from the encoder's end, with global attention (Luong et al. 2015, "general",
    without input feeding). Embeddings are scaled as the Transformer's: Glorot's alone are too small to learn from."""

    def _add_layers(self, shape: Shape) -> None:
        between = shape.dropout if shape.layers > 1 else 0.0
        self.encoder, self.decoder = (
            nn.LSTM(shape.width, shape.width, shape.layers, batch_first=True, dropout=between) for _ in range(2)
        )
        self.score = nn.Linear(shape.width, shape.width, bias=False)
        self.combine = nn.Linear(2 * shape.width, shape.width, bias=False)

    def encode(self, source: Tensor) -> Encoded:
        padding = source == PAD
        embedded = self.dropout(self.source_embedding(source) * math.sqrt(self.width))
        lengths = (~padding).sum(dim=1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
        outputs, state = self.encoder(packed)
        memory, _ = nn.utils.rnn.pad_packed_sequence(outputs, batch_first=True, total_length=source.shape[1])
        return Encoded(memory, padding, state)

    def decode(self, encoded: Encoded, prefix: Tensor) -> Tensor:
        embedded = self.dropout(self.target_embedding(prefix) * math.sqrt(self.width))
        hidden, _ = self.decoder(embedded, encoded.state)
        scores = self.score(hidden) @ encoded.memory.transpose(1, 2)
        weights = scores.masked_fill(encoded.padding[:, None], -math.inf).softmax(dim=2)
        context = torch.cat([weights @ encoded.memory, hidden], dim=2)
        return self.dropout(torch.tanh(self.combine(context)))


MODELS = {"transformer": Transformer, "lstm": AttentionLSTM}
