"""Spectrum of 20,000 samples of 2,000 features: one streaming pass beside scikit-learn's PCA.

Run `python bench/bench_spectrum.py` (add --json for one line of JSON). Each method runs in its own process,
which makes the same float32 batches from the same seeds, so that peak memory is a property of the method.
Peak memory is the highest resident size above that just before the work, as the kernel reports it. Streaming
never holds more than a batch; PCA needs the whole array, which counts, since it is what the method asks for.
All leave the same eigenvalues, which is checked. Exits with 1 if streaming needs 3 covariances or more.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path

import numpy as np

METHODS = ("streaming", "pca_covariance_eigh", "pca_default")


def batches(n_samples: int, n_features: int, batch_rows: int = 500):
    """float32 batches with a decaying spectrum and a mean that is not zero, from fixed seeds."""
    scale = np.arange(1, n_features + 1, dtype=np.float32) ** -0.5
    for start in range(0, n_samples, batch_rows):
        rng = np.random.default_rng(start)
        rows = min(batch_rows, n_samples - start)
        yield rng.standard_normal((rows, n_features), dtype=np.float32) * scale + 1


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    """Highest resident memory of this process so far; kilobytes in Linux's ru_maxrss."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_streaming(n_samples: int, n_features: int) -> np.ndarray:
    from ctxnb.stats.spectrum import StreamingCovariance

    covariance = StreamingCovariance(n_features)
    for batch in batches(n_samples, n_features):
        covariance.update(batch)
    return covariance.eigenvalues()


def run_pca(n_samples: int, n_features: int, solver: str) -> np.ndarray:
    from sklearn.decomposition import PCA

    features = np.empty((n_samples, n_features), dtype=np.float64)
    row = 0
    for batch in batches(n_samples, n_features):
        features[row : row + len(batch)] = batch
        row += len(batch)
    return PCA(svd_solver=solver).fit(features).explained_variance_


def measure(method: str, n_samples: int, n_features: int, pipe) -> None:
    """Run one method in this (fresh) process and send its figures through `pipe`."""
    small = (100, 20)  # imports, thread pools and first-call allocations belong to the baseline
    work = {
        "streaming": run_streaming,
        "pca_covariance_eigh": lambda n, d: run_pca(n, d, "covariance_eigh"),
        "pca_default": lambda n, d: run_pca(n, d, "auto"),
    }[method]
    work(*small)
    np.linalg.eigvalsh(np.eye(200))
    baseline, start = resident_bytes(), time.perf_counter()
    values = work(n_samples, n_features)
    pipe.send((time.perf_counter() - start, peak_bytes() - baseline, values))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--features", type=int, default=2_000)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    context, results, spectra = multiprocessing.get_context("spawn"), {}, {}
    for method in arguments.methods:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=measure, args=(method, arguments.samples, arguments.features, send))
        process.start()
        send.close()
        seconds, memory, spectra[method] = receive.recv()
        process.join()
        results[method] = {
            "seconds": seconds,
            "peak_bytes": memory,
            "peak_over_covariance": memory / (8 * arguments.features**2),
        }
    if "streaming" in results:
        for method in results.keys() - {"streaming"}:
            np.testing.assert_allclose(spectra["streaming"], spectra[method], rtol=1e-9)
            ours = results["streaming"]
            results[method]["time_over_streaming"] = results[method]["seconds"] / ours["seconds"]
            results[method]["memory_over_streaming"] = results[method]["peak_bytes"] / ours["peak_bytes"]
    if arguments.json:
        print(json.dumps(results))
    else:
        for method, figures in results.items():
            print(
                f"{method:>20}: {figures['seconds']:6.1f} s, peak {figures['peak_bytes'] / 1e6:7.1f} MB "
                f"= {figures['peak_over_covariance']:.2f} covariances"
                + (
                    f"; {figures['time_over_streaming']:.1f} x the time "
                    f"and {figures['memory_over_streaming']:.1f} x "
                    "the memory of streaming"
                    if "time_over_streaming" in figures
                    else ""
                )
            )
    return int("streaming" in results and results["streaming"]["peak_over_covariance"] >= 3)


if __name__ == "__main__":
    sys.exit(main())
