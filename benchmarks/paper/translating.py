"""What a translation model is worth: loss per token, and BLEU of what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.paper.parallel_text import BEGIN, END, PAD, TokenPairs, Vocabulary
from benchmarks.paper.translation_models import Translator

BATCH_TOKENS = 4096  # of a batch that is only read


@torch.no_grad()
def mean_loss(model: Translator, pairs: TokenPairs) -> float:
    """Cross-entropy per target token in nats, over all pairs; its exponential is the perplexity."""
    device = model.output.weight.device
    model.eval()
    batches = [pairs.batch(numbers).to(device) for numbers in pairs.cut(BATCH_TOKENS)]
    total = sum(float(model.loss(batch)) * batch.tokens for batch in batches)
    return total / sum(batch.tokens for batch in batches)


def translate(model: Translator, pairs: TokenPairs, vocabulary: Vocabulary) -> list[str]:
    """The model's greedy translation of every source sentence, in order, as plain text."""
    device = model.output.weight.device
    translations = [""] * len(pairs)
    for numbers in pairs.cut(BATCH_TOKENS):
        written = greedy(model, pairs.batch(numbers).source.to(device)).tolist()
        texts = vocabulary.decode([sentence[: sentence.index(END)] for sentence in written])
        for number, text in zip(numbers, texts, strict=True):
            translations[number] = text
    return translations


@torch.no_grad()
def greedy(model: Translator, source: Tensor) -> Tensor:
    """The most probable token after each prefix: int64 [sentences, length], each sentence with an END and then PAD.

    A sentence may become half as long again as the longest source, and ten tokens.
    """
    model.eval()
    longest = source.shape[1] * 3 // 2 + 10
    written = torch.full((len(source), 1 + longest), PAD, device=source.device)
    written[:, 0] = BEGIN
    encoded = model.encode(source)
    going_on = torch.arange(len(source), device=source.device)
    for length in range(1, longest):
        logits = model.output(model.decode(encoded, written[going_on, :length])[:, -1])
        logits[:, [PAD, BEGIN]] = -torch.inf
        token = logits.argmax(dim=1)
        written[going_on, length] = token
        going_on, encoded = going_on[token != END], encoded.select(token != END)
        if not len(going_on):
            break
    written[going_on, -1] = END
    return written[:, 1:]


class Bleu(NamedTuple):
    """Of 100, with the signature that says how it was counted."""

    score: float
    signature: str


def bleu(translations: Sequence[str], references: Sequence[str]) -> Bleu:
    """SacreBLEU on plain text, one reference per sentence (Post 2018)."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return Bleu(score, str(metric.get_signature()))
