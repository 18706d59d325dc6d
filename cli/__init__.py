"""The `cloister` command. Nothing here imports torch before it is needed, so `--help` is instant."""
