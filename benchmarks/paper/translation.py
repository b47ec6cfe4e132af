"""The paper's translation experiment, English to German: Transformer and LSTM, uncompressed against sketched.

In one process the workers are simulated, equal to real ranks step by step; on real ranks:
``launch/mpirun.sh -n 4 -- python -m benchmarks.paper.translation --transport mpi …``. See benchmarks/paper/README.md.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.paper.command_line import (
    add_device,
    add_workers,
    connect,
    experiment_parser,
    given,
    is_simulated,
    parse,
    says_plainly,
)
from benchmarks.paper.experiment import Session
from benchmarks.paper.model_exchange import Workers, count_of
from benchmarks.paper.model_training import ModelTraining
from benchmarks.paper.parallel_text import BatchStream, TokenPairs, Vocabulary, load_corpus, make_vocabulary
from benchmarks.paper.translating import bleu, mean_loss, translate
from benchmarks.paper.translation_models import MODELS, Translator
from benchmarks.paper.translation_recipes import LABEL_SMOOTHING, METHODS, RECIPES, Recipe
from hvd_sketch import Transport

LONGEST = 100  # tokens of a training sentence
MEASUREMENTS = 15  # of a run's validation loss


@dataclass(frozen=True)
class Texts:
    """What to train on and what to be judged by."""

    vocabulary: Vocabulary
    train: TokenPairs
    valid: TokenPairs
    test: TokenPairs
    references: list[str]


@dataclass(frozen=True)
class Task:
    """What to train: fixed for a run."""

    model: str
    method: str
    recipe: Recipe
    texts: Texts
    seed: int  # of the weights, the order of sentences, dropout and the hashes
    device: torch.device

    def make_model(self) -> Translator:
        """With the same weights for every method and on every rank."""
        torch.manual_seed(self.seed)
        return MODELS[self.model](self.recipe.shape, len(self.texts.vocabulary)).to(self.device)


class TranslationTraining(ModelTraining):
    """Of a task, between all workers. Communication: collective on real ranks."""

    def __init__(self, task: Task, workers: Workers) -> None:
        self._task, self._workers = task, count_of(workers)
        model, method = task.make_model(), METHODS[task.method]
        super().__init__(model, workers, method.exchange, task.recipe.config(method, model, task.seed))
        self._stream = BatchStream(task.texts.train, task.recipe.tokens, task.seed)

    def step(self) -> float:
        self._batches = self._stream.take(self._workers * self._task.recipe.accumulate)
        self.model.train()
        return super().step()

    def backward(self, worker: int) -> float:
        """The mean over all tokens of the worker's batches."""
        # One for every worker and step, wherever the worker runs and whatever was drawn before.
        dropout = np.random.SeedSequence([self._task.seed, self._done, worker])
        torch.manual_seed(int(dropout.generate_state(1, np.uint64)[0]))
        accumulate, texts = self._task.recipe.accumulate, self._task.texts
        own = self._batches[worker * accumulate : (worker + 1) * accumulate]
        loaded = [texts.train.batch(numbers).to(self._task.device) for numbers in own]
        tokens = sum(batch.tokens for batch in loaded)
        total = 0.0
        for batch in loaded:
            loss = self.model.loss(batch, LABEL_SMOOTHING) * (batch.tokens / tokens)
            loss.backward()
            total += float(loss.detach())
        return total

    def rate(self) -> float:
        return self._task.recipe.rate(self._done + 1)

    def measure(self) -> dict[str, float]:
        """Validation loss, in nats per token without label smoothing, and its perplexity; at the end BLEU too."""
        texts = self._task.texts
        loss = mean_loss(self.model, texts.valid)
        figures = {"valid_loss": loss, "valid_perplexity": float(np.exp(loss))}
        if self._done == self._task.recipe.steps:
            written = translate(self.model, texts.test, texts.vocabulary)
            figures["test_bleu"] = bleu(written, texts.references).score
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": self._stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._stream.load_state_dict(state["stream"])


def load_texts(data_dir: Path, cache_dir: Path, pieces: int, transport: Transport) -> Texts:
    """Rank 0 makes the vocabulary. Communication: collective."""
    corpus = load_corpus(data_dir)
    if transport.rank == 0:
        make_vocabulary(corpus.train, pieces, cache_dir)
    transport.barrier()
    vocabulary = make_vocabulary(corpus.train, pieces, cache_dir)
    train = TokenPairs(corpus.train, vocabulary, LONGEST)
    valid, test = TokenPairs(corpus.valid, vocabulary), TokenPairs(corpus.test, vocabulary)
    return Texts(vocabulary, train, valid, test, corpus.test.target)


def parse_arguments() -> argparse.Namespace:
    parser = experiment_parser(__doc__ or "")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="default: both")
    parser.add_argument("--methods", nargs="+", choices=tuple(METHODS), help="default: all that the transport can run")
    parser.add_argument("--steps", type=int, help="default: of the model at this scale")
    parser.add_argument("--tokens", type=int, help="of a batch; default: of the model at this scale")
    parser.add_argument("--pieces", type=int, help="of the vocabulary; default: of the model at this scale")
    parser.add_argument("--factor", type=float, help="of the learning rate; default: of the model at this scale")
    parser.add_argument("--momentum", type=float, help="inside the exchange, instead of the scale's")
    add_workers(parser)
    add_device(parser)
    parser.add_argument("--cache-dir", type=Path, help="for vocabularies (default: the folder of --json)")
    arguments = parse(parser, steps=1, tokens=LONGEST + 1, pieces=1, workers=2, factor=0)
    possible = [name for name, method in METHODS.items() if method.real or is_simulated(arguments)]
    arguments.methods = arguments.methods or possible
    if impossible := set(arguments.methods) - set(possible):
        parser.error(f"--methods {' '.join(impossible)}: exists in a simulation only, not with --transport")
    arguments.cache_dir = arguments.cache_dir or arguments.json.parent
    if not arguments.cache_dir.is_dir():
        parser.error(f"--cache-dir {arguments.cache_dir}: there is no such directory")
    return arguments


def chosen_recipe(arguments: argparse.Namespace, model: str) -> Recipe:
    """Of the scale, with what the arguments set otherwise."""
    own = given(arguments, "steps", "tokens", "pieces", "factor", "momentum")
    return replace(RECIPES[arguments.scale][model], **own)


@says_plainly
def main() -> None:
    arguments = parse_arguments()
    transport, workers = connect(arguments)
    recipes = {model: chosen_recipe(arguments, model) for model in arguments.models}
    sizes = {recipe.pieces for recipe in recipes.values()}
    texts = {size: load_texts(arguments.data_dir, arguments.cache_dir, size, transport) for size in sizes}
    settings = {"workers": count_of(workers), "label_smoothing": LABEL_SMOOTHING}
    settings |= {"bleu": bleu([""], [""]).signature, "decoding": "greedy"}
    settings["recipes"] = {model: asdict(recipe) for model, recipe in recipes.items()}
    session = Session(arguments, "translation", settings, transport)
    for model, seed, method in product(arguments.models, range(arguments.seeds), arguments.methods):
        recipe = recipes[model]
        task = Task(model, method, recipe, texts[recipe.pieces], seed, arguments.device)
        record_at = {round(recipe.steps * i / MEASUREMENTS) for i in range(1, MEASUREMENTS + 1)}
        labels = {"model": model, "method": method, "seed": seed}
        session.run(labels, partial(TranslationTraining, task, workers), recipe.steps, record_at)


if __name__ == "__main__":
    main()
