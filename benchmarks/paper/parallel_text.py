"""Sentence pairs for the translation experiment: files, a joint subword vocabulary, batches of so many tokens."""

from __future__ import annotations

import gzip
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hvd_sketch.files import replaced

PAD, BEGIN, END, UNKNOWN = range(4)
LANGUAGES = ("en", "de")
FILES = (("train",), ("valid", "val"), ("test", "test_2016_flickr"))  # of WMT14, of Multi30k
MOST_SENTENCES = 2_000_000  # that a vocabulary is made from; WMT14 has 4.5 M pairs


@dataclass(frozen=True)
class Pairs:
    """Sentences and their translations, in the order of the files."""

    source: list[str]
    target: list[str]

    def __post_init__(self) -> None:
        if len(self.source) != len(self.target):
            raise ValueError(
                f"expected as many source as target sentences, got {len(self.source)} and {len(self.target)}: "
                "the two files of a part must be translations line by line"
            )


class Corpus(NamedTuple):
    """English to German."""

    train: Pairs
    valid: Pairs
    test: Pairs


def load_corpus(data_dir: Path) -> Corpus:
    """Multi30k or WMT14, whichever lies in ``data_dir``, gzipped or not.

    Raises:
        FileNotFoundError: a file is missing; the message names it and the official download.
        ValueError: a part's two files differ in length.
    """
    return Corpus(*(_read_part(data_dir, names) for names in FILES))


def _read_part(data_dir: Path, names: Sequence[str]) -> Pairs:
    for name in names:
        found = [_find(data_dir, f"{name}.{language}") for language in LANGUAGES]
        if all(found):
            return Pairs(*(_read_lines(path) for path in found if path))
    raise FileNotFoundError(
        f"{' or '.join(f'{name}.en and {name}.de' for name in names)} missing in {data_dir}: --data-dir needs "
        "Multi30k's train, val and test_2016_flickr (task 1, raw, https://github.com/multi30k/dataset), or train, "
        "valid and test of WMT14 as plain text (https://www.statmt.org/wmt14/translation-task.html: Europarl v7, "
        "Common Crawl, News Commentary; newstest2013; newstest2014), gzipped or not"
    )


def _find(data_dir: Path, name: str) -> Path | None:
    return next((path for path in (data_dir / name, data_dir / f"{name}.gz") if path.exists()), None)


def _read_lines(path: Path) -> list[str]:
    content = path.read_bytes()
    text = gzip.decompress(content) if path.suffix == ".gz" else content
    return [line.strip() for line in text.decode("utf-8").removesuffix("\n").split("\n")]  # not at U+2028 and its kin


Vocabulary = Any  # a SentencePieceProcessor: encodes and decodes lists of sentences


def make_vocabulary(pairs: Pairs, size: int, folder: Path) -> Vocabulary:
    """Byte pair encoding of both languages: :data:`PAD`, :data:`BEGIN`, :data:`END`, :data:`UNKNOWN`, pieces.

    Made from the training text, with exactly ``size`` entries, and kept in ``folder`` for the next call.

    Raises:
        ValueError: the text does not have so many pieces.
    """
    from sentencepiece import SentencePieceProcessor

    text = [*pairs.source, *pairs.target]
    digest = hashlib.sha256("\n".join([str(size), *text]).encode()).hexdigest()
    kept = folder / f"pieces-{size}-{digest[:16]}.model"
    if not kept.exists():
        with replaced(kept) as draft:
            draft.write_bytes(_train_pieces(text, size))
    return SentencePieceProcessor(model_proto=kept.read_bytes())


def _train_pieces(text: Sequence[str], size: int) -> bytes:
    from sentencepiece import SentencePieceTrainer, set_random_generator_seed

    set_random_generator_seed(0)
    model = io.BytesIO()
    ids = {"pad_id": PAD, "bos_id": BEGIN, "eos_id": END, "unk_id": UNKNOWN}
    sample = {"input_sentence_size": MOST_SENTENCES, "shuffle_input_sentence": len(text) > MOST_SENTENCES}
    kind = {"model_type": "bpe", "vocab_size": size, "character_coverage": 0.9999, "minloglevel": 2}
    try:
        SentencePieceTrainer.train(sentence_iterator=iter(text), model_writer=model, **kind, **ids, **sample)
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {size} pieces from {len(text)} sentences: {error}") from error
    return model.getvalue()


@dataclass(frozen=True)
class Batch:
    """Sentences padded with PAD at the end."""

    source: Tensor  # int64 [sentences, source length], each ending with END
    # int64 [sentences, 1 + target length], BEGIN … END: the model reads all but the last column and is to put out all
    # but the first
    target: Tensor

    @property
    def tokens(self) -> int:
        """To be put out."""
        return int((self.target[:, 1:] != PAD).sum())

    def to(self, device: torch.device) -> Batch:
        return Batch(self.source.to(device), self.target.to(device))


class TokenPairs:
    """Sentence pairs as tokens.

    Args:
        longest: pairs with more tokens on either side are left out, and empty ones; None: all are kept.
    """

    def __init__(self, pairs: Pairs, vocabulary: Vocabulary, longest: int | None = None) -> None:
        sides = (vocabulary.encode(pairs.source), vocabulary.encode(pairs.target))
        kept = [
            pair
            for pair in zip(*sides, strict=True)
            if longest is None or (min(map(len, pair)) > 0 and max(map(len, pair)) <= longest)
        ]
        self._source = [np.array([*source, END], dtype=np.int32) for source, _ in kept]
        self._target = [np.array([BEGIN, *target, END], dtype=np.int32) for _, target in kept]
        self._lengths = np.array([[len(s), len(t) - 1] for s, t in zip(self._source, self._target, strict=True)])

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, numbers: Sequence[int] | npt.NDArray[np.int64]) -> Batch:
        return Batch(_padded([self._source[i] for i in numbers]), _padded([self._target[i] for i in numbers]))

    def cut(self, tokens: int, draw: np.random.Generator | None = None) -> list[npt.NDArray[np.int64]]:
        """The numbers of the sentences of each batch; together every sentence once.

        Batches have sentences of like length: as many as keep (sentences · longest side) to ``tokens``, at least one.

        Args:
            draw: for the order of batches and of sentences of equal length; None: from short to long.
        """
        order = np.arange(len(self)) if draw is None else draw.permutation(len(self))
        lengths = self._lengths[order]
        ascending = np.lexsort((lengths.min(axis=1), lengths.max(axis=1)))
        starts, longest = [0], lengths.max(axis=1)[ascending].tolist()
        for place, length in enumerate(longest):
            if (place + 1 - starts[-1]) * length > tokens and place > starts[-1]:
                starts.append(place)
        batches = np.split(order[ascending], starts[1:])
        return batches if draw is None else [batches[i] for i in draw.permutation(len(batches))]


def _padded(sentences: Sequence[npt.NDArray[np.int32]]) -> Tensor:
    long = [torch.from_numpy(sentence).long() for sentence in sentences]
    return pad_sequence(long, batch_first=True, padding_value=PAD)


class BatchStream:
    """Batches of epoch after epoch, each cut anew: the same on all ranks, so that each can take its own.

    Args:
        tokens: see :meth:`TokenPairs.cut`.
        seed: of the order.
    """

    def __init__(self, pairs: TokenPairs, tokens: int, seed: int) -> None:
        self._pairs, self._tokens, self._seed = pairs, tokens, seed
        self._restart()

    def _restart(self) -> None:
        draws = (np.random.default_rng([self._seed, epoch]) for epoch in count())
        self._batches = chain.from_iterable(self._pairs.cut(self._tokens, draw) for draw in draws)
        self._taken = 0

    def take(self, number: int) -> list[npt.NDArray[np.int64]]:
        """The next batches, as numbers of sentences."""
        self._taken += number
        return list(islice(self._batches, number))

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._restart()
        self.take(state["taken"])
