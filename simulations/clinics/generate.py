"""Write the private records and the planted secrets of the synthetic clinics.

Run ``python -m simulations.clinics.generate --out DIR --seed 0``; the same seed gives the same bytes.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from simulations.clinics.private_records import private_rows

__all__ = ["RECORDS_NAME", "SECRETS_NAME", "as_jsonl", "generate", "main"]

RECORDS_NAME = "clinics.jsonl"
SECRETS_NAME = "clinics_secrets.jsonl"


def as_jsonl(rows: Iterable[Mapping[str, object]]) -> bytes:
    """Return the rows as compact JSON lines in UTF-8."""
    return "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows).encode()


def generate(out: Path, seed: int) -> tuple[Path, Path]:
    """Write both files into ``out`` and return their paths."""
    records, secrets = private_rows(seed)
    out.mkdir(parents=True, exist_ok=True)
    records_path, secrets_path = out / RECORDS_NAME, out / SECRETS_NAME
    records_path.write_bytes(as_jsonl(records))
    secrets_path.write_bytes(as_jsonl(secrets))
    return records_path, secrets_path


def main() -> None:
    """Run the generator from the command line."""
    parser = argparse.ArgumentParser(description="Generate the synthetic clinic records.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in generate(arguments.out, arguments.seed):
        sys.stdout.write(f"{path} {path.stat().st_size} bytes\n")


if __name__ == "__main__":
    main()
