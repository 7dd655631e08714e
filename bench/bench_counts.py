"""Kneser-Ney losses at every context length: ours beside plain dictionaries, in one run on the same text.

Run `python bench/bench_counts.py` (add --json for one line of JSON). The plain way is what one writes first: a dictionary from context to
next token to count for each length, a set of preceding tokens for each n-gram, and the recursion target by target. Ours is
`ctxnb.experiments.counts.predict`: a sort of integers for each length. Both give the same probabilities, which is checked (to 1e-10).

Text is State of the Union addresses as bytes, the targets are those of the training experiment. Time is measured in this process, the two ways in
alternation, as the ratio of the best times. Peak memory is what Python's allocator and numpy hold at most, by tracemalloc, in a run of its own. Exits with 1
below 5 x in time or if ours needs more memory.

Measured on one core of a Xeon with AVX-512, other jobs beside it: 3.03 s and 0.055 s, 55 x (56 x and 59 x in other runs); 269 MB and 13 MB, 21 x; with
--tokens 400000 --longest 12: 21.4 s and 0.41 s, 52 x; 2,062 MB and 52 MB, 40 x.
"""

import argparse
import json
import sys
import time
import tracemalloc
from collections import Counter, defaultdict

import numpy as np

from ctxnb.experiments.counts import FALLBACK_DISCOUNTS, predict
from ctxnb.text.tokens import token_store
from ctxnb.text.windows import draw_targets, subset


def plain_discounts(counts) -> list[float]:
    """Discounts of counts 0, 1, 2, and 3 or more, estimated from the n-grams of one length."""
    n = [sum(1 for count in counts if count == i) for i in range(5)]
    found = [0.0]
    for i, fallback in zip((1, 2, 3), FALLBACK_DISCOUNTS):
        estimate = i - (i + 1) * n[1] / (n[1] + 2 * n[2]) * n[i + 1] / n[i] if n[i] and n[1] + n[2] else -1
        found.append(estimate if 0 < estimate <= i else fallback)
    return found


class PlainKneserNey:
    """Models of every context length up to `longest`, from dictionaries.

    Args:
        pieces: token lists; no n-gram crosses from one to the next.
        vocab_size: V.
        longest: largest context length.
    """

    def __init__(self, pieces: list[list[int]], vocab_size: int, longest: int):
        self.vocab_size = vocab_size
        plain = [defaultdict(Counter) for _ in range(longest + 1)]
        before = [defaultdict(lambda: defaultdict(set)) for _ in range(longest + 1)]
        for piece in pieces:
            for i, token in enumerate(piece):
                for l in range(min(i, longest) + 1):
                    context = tuple(piece[i - l : i])
                    plain[l][context][token] += 1
                    if i > l:
                        before[l][context][token].add(piece[i - l - 1])
        self.plain = plain
        self.continuation = [
            {context: {token: len(found) for token, found in after.items()} for context, after in level.items()} for level in before
        ]
        self.off = {
            id(tables): [plain_discounts([count for after in level.values() for count in after.values()]) for level in tables]
            for tables in (self.plain, self.continuation)
        }

    def _mixed(self, tables: list, context: tuple, token: int, lower: float) -> float:
        after, off = tables[len(context)].get(context), self.off[id(tables)][len(context)]
        if not after:
            return lower
        count, total = after.get(token, 0), sum(after.values())
        freed = sum(off[min(c, 3)] for c in after.values())
        return (count - off[min(count, 3)] + freed * lower) / total

    def probabilities(self, window: list[int]) -> list[float]:
        """Probability of the last token given the l = 0, 1, ... tokens before it, of which there must be enough."""
        *visible, token = window
        lower, found = 1 / self.vocab_size, []
        for l in range(len(visible) + 1):
            context = tuple(visible[len(visible) - l :])
            found.append(self._mixed(self.plain, context, token, lower))
            lower = self._mixed(self.continuation, context, token, lower)
        return found


def plain(tokens: np.ndarray, lengths: np.ndarray, windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """[L + 1, M] probabilities, by dictionaries."""
    pieces = [piece.tolist() for piece in np.split(tokens, np.cumsum(lengths)[:-1])]
    model = PlainKneserNey(pieces, vocab_size, windows.shape[1] - 1)
    return np.array([model.probabilities(window) for window in windows.tolist()]).T


def ours(tokens: np.ndarray, lengths: np.ndarray, windows: np.ndarray, vocab_size: int) -> np.ndarray:
    """The same by the library."""
    return predict(tokens, lengths, windows, vocab_size).kneser_ney


def peak(way, *inputs) -> int:
    tracemalloc.start()
    way(*inputs)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return highest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--longest", type=int, default=8, help="largest context length")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    store = token_store(corpus="sotu", tokenizer="bytes")
    data = subset(store, arguments.tokens, seed=0, segment_tokens=2048)
    tokens = np.concatenate([data.tokens[s : s + n] for s, n in zip(data.starts, data.lengths)]).astype(np.int64)
    windows = draw_targets(store, "test", max_context=128, per_document=128).windows(store, arguments.longest)
    inputs, ways, seconds, said = (tokens, data.lengths, windows, store.vocab_size), {"plain": plain, "ours": ours}, {}, {}
    for _ in range(arguments.repeats):
        for name, way in ways.items():
            start = time.perf_counter()
            said[name] = way(*inputs)
            seconds[name] = min(time.perf_counter() - start, seconds.get(name, np.inf))
    np.testing.assert_allclose(said["ours"], said["plain"], rtol=1e-10)
    memory = {name: peak(way, *inputs) for name, way in ways.items()}
    figures = {
        "seconds": seconds, "time_ratio": seconds["plain"] / seconds["ours"], "peak_bytes": memory, "memory_ratio": memory["plain"] / memory["ours"],
        "tokens_x_lengths_per_s": arguments.tokens * (arguments.longest + 1) / seconds["ours"],
    }  # fmt: skip
    if arguments.json:
        print(json.dumps(figures))
    else:
        print(f"D = {arguments.tokens:,} bytes, l = 0 to {arguments.longest}, {len(windows):,} targets: plain {seconds['plain']:.2f} s, "
              f"ours {seconds['ours']:.3f} s: {figures['time_ratio']:.0f} x ({figures['tokens_x_lengths_per_s'] / 1e6:.1f} M tokens x lengths/s)")
        print(f"peak memory: plain {memory['plain'] / 1e6:,.0f} MB, ours {memory['ours'] / 1e6:,.0f} MB: {figures['memory_ratio']:.1f} x")
    return int(figures["time_ratio"] < 5 or figures["memory_ratio"] < 1)


if __name__ == "__main__":
    sys.exit(main())
