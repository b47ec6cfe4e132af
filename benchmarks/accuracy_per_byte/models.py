"""The models beside those of :mod:`benchmarks.models`: two convolutional networks and a decoder-only transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

CONTEXT = 64  # characters
HEADS = 4
WIDTH = 96  # of the small transformer; the deviations of initial weights are for it


def small_cnn() -> nn.Module:
    """Of 32 x 32 colour images: 139,392 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 24, 5, 2, 2), nn.ReLU()),
        *(nn.Conv2d(24, 48, 3, 2, 1), nn.ReLU()),
        *(nn.Conv2d(48, 64, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(1024, 96), nn.ReLU(), nn.Linear(96, 10)),
    )


def large_cnn() -> nn.Module:
    """Of 32 x 32 colour images: 2.0 million parameters."""
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 5, 2, 2), nn.ReLU()),
        *(nn.Conv2d(32, 96, 3, 2, 1), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(96 * 64, 320), nn.ReLU(), nn.Linear(320, 10)),
    )


class Block(nn.Module):
    """Attention and a feed-forward part, each with a norm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(gelu(self.up(self.norm2(x))))

    def reset(self) -> None:
        """Draw the initial weights."""
        scale = (WIDTH / self.out.in_features) ** 0.5
        for linear, deviation in ((self.qkv, 0.05), (self.out, 0.025), (self.up, 0.05), (self.down, 0.025)):
            nn.init.normal_(linear.weight, std=deviation * scale)
            nn.init.zeros_(linear.bias)


class Transformer(nn.Module):
    """Predicts the next of each character: int64 [n, length] gives logits [n, length, characters].

    Args:
        characters: how many there are.
        width: of what stands for a character; a multiple of ``heads``.
        blocks, heads: how many.
        context: the greatest length.
    """

    def __init__(
        self, characters: int, width: int = WIDTH, blocks: int = 2, heads: int = HEADS, context: int = CONTEXT
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(torch.randn(context, width) * 0.02)
        own_blocks = [Block(width, heads) for _ in range(blocks)]
        self.blocks = nn.ModuleList(own_blocks)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)
        with torch.no_grad():
            self.embedding.weight.mul_(0.02)
        for block in own_blocks:
            block.reset()

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text) + self.positions[: text.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
