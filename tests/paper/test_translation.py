"""The translation experiment: nothing of the data is lost, padding is invisible, simulated and real ranks agree."""

from __future__ import annotations

import gzip
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.paper import translation_figure
from benchmarks.paper.parallel_text import (
    BEGIN,
    END,
    PAD,
    Batch,
    BatchStream,
    Pairs,
    TokenPairs,
    load_corpus,
    make_vocabulary,
)
from benchmarks.paper.translating import bleu, greedy, mean_loss, translate
from benchmarks.paper.translation import Task, Texts, TranslationTraining, load_texts
from benchmarks.paper.translation_models import MODELS, Shape
from benchmarks.paper.translation_recipes import FULL, METHODS, RECIPES, Recipe
from hvd_sketch import local_transports, sketched_dim
from hvd_sketch.transport import run_local
from tests.support.harness import run_command
from tests.support.paper import log_of_a_resumption

PIECES = 60
TINY = Recipe(
    Shape(width=32, layers=2, inner=64, heads=2),
    pieces=PIECES,
    tokens=120,
    accumulate=2,
    steps=6,
    warmup=4,
    factor=2.0,
)
WORDS = (("one", "eins"), ("two", "zwei"), ("red", "rot"), ("house", "Haus"), ("green", "grün"), ("tree", "Baum"))


def sentences(count: int, seed: int) -> Pairs:
    """Translated word by word."""
    draw = np.random.default_rng(seed)
    drawn = [draw.integers(0, len(WORDS), draw.integers(1, 12)) for _ in range(count)]
    english, german = ([" ".join(WORDS[i][side] for i in line) + "." for line in drawn] for side in (0, 1))
    return Pairs(english, german)


def write(path: Path, lines: list[str]) -> None:
    content = "".join(line + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Named as in Multi30k, gzipped."""
    folder = tmp_path_factory.mktemp("multi30k")
    for seed, (part, count) in enumerate((("train", 150), ("val", 20), ("test_2016_flickr", 15))):
        pairs = sentences(count, seed)
        write(folder / f"{part}.en.gz", pairs.source)
        write(folder / f"{part}.de.gz", pairs.target)
    return folder


@pytest.fixture(scope="module")
def texts(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Texts:
    return load_texts(data_dir, tmp_path_factory.mktemp("pieces"), PIECES, local_transports(1)[0])


def test_both_corpora_are_found_by_their_names(data_dir: Path, tmp_path: Path) -> None:
    multi30k = load_corpus(data_dir)
    assert multi30k.train == sentences(150, 0) and multi30k.test == sentences(15, 2)
    for part, pairs in (("train", multi30k.train), ("valid", multi30k.valid), ("test", multi30k.test)):
        write(tmp_path / f"{part}.en", pairs.source)
        write(tmp_path / f"{part}.de", pairs.target)
    assert load_corpus(tmp_path) == multi30k


def test_unfit_files_are_refused(data_dir: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.en", ["one", "two"])
    with pytest.raises(FileNotFoundError, match=r"train\.en and train\.de missing .*statmt\.org/wmt14"):
        load_corpus(tmp_path)
    write(tmp_path / "train.de", ["eins"])
    with pytest.raises(ValueError, match="got 2 and 1"):
        load_corpus(tmp_path)


def test_text_survives_the_vocabulary(texts: Texts, tmp_path: Path) -> None:
    pairs = sentences(40, 9)
    vocabulary = make_vocabulary(pairs, PIECES, tmp_path)
    (kept,) = tmp_path.iterdir()
    assert len(vocabulary) == PIECES
    tokens = vocabulary.encode(pairs.target)
    assert vocabulary.decode(tokens) == pairs.target
    assert min(map(min, tokens)) > END  # what PAD, BEGIN and END stand for does not come up in text
    written = kept.stat().st_mtime_ns
    assert make_vocabulary(pairs, PIECES, tmp_path).encode(pairs.target) == tokens
    assert kept.stat().st_mtime_ns == written


def test_too_small_a_text_for_a_vocabulary_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no vocabulary of 5000 pieces from 20 sentences"):
        make_vocabulary(sentences(10, 0), 5000, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_every_sentence_is_in_exactly_one_batch(texts: Texts, seed: int | None) -> None:
    draw = None if seed is None else np.random.default_rng(seed)
    batches = texts.train.cut(120, draw)
    assert sorted(np.concatenate(batches)) == list(range(150))
    padded = [max(batch.source.numel(), batch.target[:, 1:].numel()) for batch in map(texts.train.batch, batches)]
    assert max(padded) <= 120 and np.mean(padded) > 90


def test_an_epoch_ends_before_the_next_begins(texts: Texts) -> None:
    stream = BatchStream(texts.train, 120, seed=3)
    count = len(texts.train.cut(120, np.random.default_rng([3, 0])))
    first, second = stream.take(count), stream.take(5)
    assert sorted(np.concatenate(first)) == list(range(150))
    state, following = stream.state_dict(), stream.take(9)
    assert any(list(a) != list(b) for a, b in zip(first, second, strict=False))
    resumed = BatchStream(texts.train, 120, seed=3)
    resumed.load_state_dict(state)
    for batch, expected in zip(resumed.take(9), following, strict=True):
        assert list(batch) == list(expected)


def test_long_and_empty_pairs_are_left_out_of_training_only(texts: Texts) -> None:
    pairs = Pairs(["one", "", "two " * 60], ["eins", "zwei", "zwei"])
    assert [len(TokenPairs(pairs, texts.vocabulary, longest)) for longest in (50, None)] == [1, 3]


def model_of(name: str, pieces: int = PIECES) -> Any:
    torch.manual_seed(0)
    return MODELS[name](TINY.shape, pieces).eval()


def random_batch() -> Batch:
    """Four sentences of different lengths on both sides."""
    draw = torch.Generator().manual_seed(1)
    batch = Batch(torch.randint(4, PIECES, (4, 9), generator=draw), torch.randint(4, PIECES, (4, 8), generator=draw))
    batch.target[:, 0] = BEGIN
    for row, (source, target) in enumerate(((9, 3), (2, 8), (5, 5), (4, 7))):
        batch.source[row, source - 1], batch.target[row, target - 1] = END, END
        batch.source[row, source:], batch.target[row, target:] = PAD, PAD
    return batch


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_padding_does_not_change_the_loss(name: str, label_smoothing: float) -> None:
    """A batch's loss is the mean over the tokens of its sentences alone, and so is its gradient."""
    model, batch = model_of(name), random_batch()
    model.loss(batch, label_smoothing).backward()
    together = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    for source, target in zip(batch.source, batch.target, strict=True):
        alone = Batch(source[source != PAD][None], target[target != PAD][None])
        (model.loss(alone, label_smoothing) * alone.tokens / batch.tokens).backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, together[key], atol=1e-6), key
    assert together["source_embedding.weight"].any()


@pytest.mark.parametrize("name", MODELS)
def test_no_place_sees_a_later_one(name: str) -> None:
    model, batch = model_of(name), random_batch()
    encoded = model.encode(batch.source)
    whole = model.decode(encoded, batch.target)
    for length in range(1, 8):
        assert torch.allclose(model.decode(encoded, batch.target[:, :length]), whole[:, :length], atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_knows_its_sentences_has_bleu_100(name: str, texts: Texts) -> None:
    pairs = sentences(8, 5)
    known = TokenPairs(pairs, texts.vocabulary)
    torch.manual_seed(0)
    model = MODELS[name](Shape(width=48, layers=1, inner=48, heads=2, dropout=0.0), PIECES)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = known.batch(range(8))
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    assert mean_loss(model, known) < 0.05
    assert translate(model, known, texts.vocabulary) == pairs.target
    found = bleu(translate(model, known, texts.vocabulary), pairs.target)
    assert found.score == pytest.approx(100) and "tok:13a" in found.signature


def test_decoding_ends_even_where_the_model_never_ends() -> None:
    model = model_of("transformer")
    with torch.no_grad():
        model.output.bias[END] = -1e9
    written = greedy(model, random_batch().source)
    assert written.shape == (4, 9 * 3 // 2 + 10)
    assert (written == END).sum(dim=1).tolist() == [1] * 4 and (written[:, -1] == END).all()


def test_the_full_models_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in model(FULL.shape, FULL.pieces).parameters()) for name, model in MODELS.items()
        }
    assert sizes["transformer"] == pytest.approx(90e6, rel=0.02)
    assert sizes["lstm"] == pytest.approx(73e6, rel=0.02)


def test_the_rate_rises_and_falls_as_in_the_paper() -> None:
    rates = [FULL.rate(step) for step in (1, 8000, 16_000, 64_000)]
    peak = 1000 / (512 * 16_000) ** 0.5
    assert rates == pytest.approx([peak / 16_000, peak / 2, peak, peak / 2])


def test_each_method_compresses_as_it_says() -> None:
    for name, recipe in RECIPES["small"].items():
        model = MODELS[name](recipe.shape, recipe.pieces)
        dim = sketched_dim(model.parameters())
        ratios = {key: recipe.config(METHODS[key], model, 0).paper_compression_ratio(dim) for key in METHODS}
        assert ratios["sketched-20x"] == pytest.approx(20, rel=0.01)
        assert ratios["sketched-40x"] == pytest.approx(40, rel=0.01)


def task_of(texts: Texts, model: str, method: str) -> Task:
    return Task(model, method, TINY, texts, seed=1, device=torch.device("cpu"))


def after_steps(training: TranslationTraining, steps: int) -> tuple[list[float], list[torch.Tensor]]:
    losses = [training.step() for _ in range(steps)]
    return losses, [parameter.detach().clone() for parameter in training.model.parameters()]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.real])
def test_the_simulation_equals_real_exchanges(texts: Texts, model: str, method: str) -> None:
    """Losses, weights and bytes of three workers; between threads dropout shares one generator, so without."""
    recipe = replace(TINY, shape=replace(TINY.shape, dropout=0.0))
    task = replace(task_of(texts, model, method), recipe=recipe)
    in_one_process = TranslationTraining(task, 3)
    losses, weights = after_steps(in_one_process, 4)

    def rank_main(transport: Any) -> Any:
        training = TranslationTraining(task, transport)
        training.model.load_state_dict(start)
        return *after_steps(training, 4), training.traffic()

    start = task.make_model().state_dict()
    ranks = run_local(3, rank_main)
    for _, own_weights, traffic in ranks:
        assert all(torch.equal(own, expected) for own, expected in zip(own_weights, weights, strict=True))
        assert traffic == in_one_process.traffic()
    assert np.mean([own for own, _, _ in ranks], axis=0) == pytest.approx(losses)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_training_goes_on_to_the_bit(texts: Texts, model: str, method: str) -> None:
    """Through a file, as a checkpoint does, in the middle of an epoch, with dropout."""
    whole, broken = (TranslationTraining(task_of(texts, model, method), 2) for _ in range(2))
    losses, weights = after_steps(whole, 6)
    after_steps(broken, 3)
    file = io.BytesIO()
    torch.save(broken.state_dict(), file)
    file.seek(0)
    resumed = TranslationTraining(task_of(texts, model, method), 2)
    resumed.load_state_dict(torch.load(file))
    later, resumed_weights = after_steps(resumed, 3)
    assert later == losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(resumed_weights, weights, strict=True))
    assert resumed.measure() == whole.measure() and resumed.measure().keys() >= {"valid_loss", "test_bleu"}
    assert resumed.traffic() == whole.traffic()


@pytest.mark.multiprocess
def test_real_ranks_equal_the_simulation(data_dir: Path, tmp_path: Path) -> None:
    """Two ranks under mpirun, with dropout: every loss, BLEU and bytes of the two commands; then their figure."""
    arguments = ["--data-dir", str(data_dir), "--seeds", "1", "--pieces", str(PIECES), "--steps", "3"]
    command = [sys.executable, "-m", "benchmarks.paper.translation", *arguments, "--methods"]
    methods = [name for name, method in METHODS.items() if method.real]
    found = {}
    for transport, launcher in (("simulation", []), ("mpi", ["launch/mpirun.sh", "-n", "2", "--"])):
        file = tmp_path / f"{transport}.json"
        line = [*launcher, *command, *methods, "--json", str(file), "--workers", "2", "--transport", transport]
        status, output = run_command(line, timeout_s=150)
        assert status == 0, output
        found[transport] = [{**run, "seconds": 0} for run in json.loads(file.read_text())["runs"]]
    assert len(found["mpi"]) == 2 * len(methods) and found["mpi"] == found["simulation"]
    table = translation_figure.draw(found["mpi"], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert table.count("\n") == 1 + 2 * len(methods) and "| lstm | sketched-40x |" in table


@pytest.mark.multiprocess
def test_resuming_after_ctrl_c_gives_the_same_figures(data_dir: Path, tmp_path: Path) -> None:
    sizes = f"--seeds 1 --pieces {PIECES} --steps 40 --models transformer --methods sketched-20x --workers 2"
    base = [sys.executable, "-m", "benchmarks.paper.translation", "--data-dir", str(data_dir), *sizes.split()]
    log_of_a_resumption(base, tmp_path, '"step"')


def test_true_topk_is_refused_on_real_ranks(data_dir: Path, tmp_path: Path) -> None:
    arguments = ["--data-dir", str(data_dir), "--json", str(tmp_path / "x.json"), "--transport", "mpi"]
    command = [sys.executable, "-m", "benchmarks.paper.translation", *arguments, "--methods", "true-topk"]
    status, output = run_command(command, timeout_s=60)
    assert status == 2 and "--methods true-topk: exists in a simulation only" in output
