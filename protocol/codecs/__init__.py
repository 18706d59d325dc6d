"""Wire quantization: how named tensors become few bytes, and what a receiver accepts.

One algorithm, one file. `base.py` says what each of them offers, `build.py` knows the family.
"""

__all__: list[str] = []
