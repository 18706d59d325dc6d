"""What makes a promise true: sampling, clipping, noise, accounting and the ledger, bound together by one plan."""
