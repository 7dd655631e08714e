"""Time and memory of the lag covariance: `python bench/bench_horizon.py [TOKENS] [LAGS]`.

The prose corpus as GPT-2 tokens (V = 50,257), up to 12 M tokens of its documents, 64 lags from 1 to 1,024. Prints the time on the clock, the
processor time (which a busy machine does not stretch), and the peak memory of the process, text included.

Measured on two idle cores of an AMD EPYC: 11.98 M tokens, 64 lags from 1 to 1,024: 114 s on the clock, 185 s of processor, 0.89 GB.
"""

import resource
import sys
import time

import numpy as np

from ctxnb.stats.lagged import fit_decay, lag_norms
from ctxnb.text.tokens import token_store


def main(most: int = 12_000_000, count: int = 64) -> None:
    store = token_store("prose", "gpt2")
    documents = int(np.searchsorted(np.asarray(store.offsets), most, side="right")) - 1
    tokens, lengths = np.asarray(store.tokens[: store.offsets[documents]]), np.asarray(store.lengths[:documents])
    spaced = (np.unique(np.geomspace(1, 1024, points).astype(int)) for points in range(count, 1025))
    lags = next(lags for lags in spaced if len(lags) >= count)
    clock, processor = time.perf_counter(), time.process_time()
    norms = lag_norms(tokens, lengths, store.vocab_size, lags)
    decay = fit_decay(norms)
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB on Linux
    print(f"{len(tokens) / 1e6:.2f} M tokens, V = {store.vocab_size:,}, {len(lags)} lags from {lags[0]} to {lags[-1]}: {clock:.0f} s on the clock, "
          f"{processor:.0f} s of processor, {peak:.2f} GB; beta {decay.beta:.2f} {decay.refused}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
