"""Fuzz every decoder of bytes from the network, or replay what earlier runs kept.

    python tests/fuzz/fuzz.py --seconds 300     # guided by coverage, with atheris (pip install -e ".[fuzz]")
    python tests/fuzz/fuzz.py --replay          # the corpus alone; needs nothing but what the tests need

Each target runs in a process of its own, whose address space may grow by a fixed amount, and in which an input may take
ten seconds. What reaches new code or another outcome is kept in `corpus/TARGET`, the smallest inputs first. A finding
ends its target with the input in `--findings`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT, CORPUS = HERE.parents[1], HERE / "corpus"
MOST_MEMORY = 256 << 20
"""Bytes that decoding may add to the process. No message of a target may grow beyond 64 KiB; torch and its threads take
a part of this for themselves."""
MOST_TRACED = 4 << 20
"""Bytes that one replayed input may allocate in Python and numpy; the largest layouts take 16 KB."""
MOST_INPUT, INPUT_S = 16384, 10


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together")
    parser.add_argument("--replay", action="store_true", help="run the corpus alone")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--target", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    sys.path[:0] = [str(HERE), str(ROOT)]
    if options.target and not options.replay:
        return _fuzz(options.target, options.seconds, options.work, options.findings)
    import targets

    if options.replay:
        for name in [options.target] if options.target else targets.TARGETS:
            inputs = _inputs(options.corpus / name)
            _replay(name, inputs)
            print(f"{name}: {len(inputs)} inputs", flush=True)  # noqa: T201
        return 0
    return _campaign(list(targets.TARGETS), options)


def _campaign(names: Sequence[str], options: argparse.Namespace) -> int:
    """Fuzz one target after the other, and keep what was learned."""
    failed: list[str] = []
    options.findings.mkdir(parents=True, exist_ok=True)
    share = max(options.seconds // len(names), 1)
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            command = [sys.executable, __file__, "--target", name, "--seconds", str(share), "--work", str(work)]
            command += ["--findings", str(options.findings.resolve()), "--corpus", str(options.corpus)]
            for data in _starting(name, options.corpus):
                _store(work, data)
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if done.returncode:
                failed.append(name)
                print(done.stdout[-1000:], done.stderr[-3000:], sep="\n")  # noqa: T201
            kept = _smallest(name, _inputs(work))
        for old in (options.corpus / name).glob("*"):
            old.unlink()
        for data in kept:
            _store(options.corpus / name, data)
        runs = re.search(r"Done (\d+) runs", done.stderr)
        print(f"{name}: {runs[1] if runs else '?'} runs, {len(kept)} inputs kept", flush=True)  # noqa: T201
    if failed:
        print(f"findings in {options.findings}: {', '.join(failed)}")  # noqa: T201
    return bool(failed)


def _starting(name: str, corpus: Path) -> Iterable[bytes]:
    import targets

    return [*targets.seeds(name), *_inputs(corpus / name)]


def _fuzz(name: str, seconds: int, work: Path, findings: Path) -> int:
    """Fuzz one target in this process, which ends with the campaign."""
    import atheris

    with atheris.instrument_imports(include=["protocol"]):
        import targets
    _warm_up(name)
    _limit_memory()

    def once(data: bytes) -> None:
        targets.run(name, data)

    options = [f"-max_total_time={seconds}", f"-timeout={INPUT_S}", f"-max_len={MOST_INPUT}", "-rss_limit_mb=0"]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={findings}/{name}-", str(work)], once)
    atheris.Fuzz()
    return 0


def _replay(name: str, inputs: Sequence[bytes]) -> None:
    """Run inputs under the limits.

    Raises:
        AssertionError: an input takes too long, or too much memory, or decodes to what was not asked for.
    """
    import targets

    _warm_up(name)
    unlimited = _limit_memory()
    before = signal.signal(signal.SIGALRM, _too_slow)
    tracemalloc.start()
    try:
        for data in inputs:
            tracemalloc.reset_peak()
            held = tracemalloc.get_traced_memory()[0]
            signal.alarm(INPUT_S)
            targets.run(name, data)
            signal.alarm(0)
            peak = tracemalloc.get_traced_memory()[1] - held
            assert peak < MOST_TRACED, f"{name}: {peak} bytes for an input of {len(data)}"
    finally:
        signal.alarm(0)
        tracemalloc.stop()
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


def _warm_up(name: str) -> None:
    """Let models, tables and threads be made, which are no part of one input's work."""
    import targets

    for data in targets.seeds(name):
        targets.run(name, data)


def _limit_memory() -> tuple[int, int]:
    """Let the address space grow by `MOST_MEMORY` from now on; return the limits that held before."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + MOST_MEMORY, before[1]))
    return before


def _too_slow(_signal: int, _frame: FrameType | None) -> None:
    raise AssertionError(f"an input takes more than {INPUT_S} s")


def _smallest(name: str, inputs: Iterable[bytes]) -> list[bytes]:
    """Return inputs that together reach every line pair of `protocol` and every outcome that all of them reach."""
    kept: list[bytes] = []
    known: set[Any] = set()
    for data in sorted(set(inputs), key=lambda each: (len(each), each)):
        reached = _reached(name, data)
        if not reached <= known:
            known |= reached
            kept.append(data)
    return kept


def _reached(name: str, data: bytes) -> set[Any]:
    import targets

    pairs: set[Any] = set()
    inside = str(ROOT / "protocol")

    def trace(frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(inside):
            return None
        last = [frame.f_lineno]

        def lines(inner: FrameType, kind: str, _given: Any) -> Any:
            if kind == "line":
                pairs.add((inner.f_code.co_filename, last[0], inner.f_lineno))
                last[0] = inner.f_lineno
            return lines

        return lines

    sys.settrace(trace)
    try:
        outcome = targets.run(name, data)
    except Exception as error:
        outcome = f"finding: {type(error).__name__}"
    finally:
        sys.settrace(None)
    return pairs | {outcome}


def _inputs(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("*")) if path.is_file()]


def _store(folder: Path, data: bytes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


if __name__ == "__main__":
    sys.exit(main())
