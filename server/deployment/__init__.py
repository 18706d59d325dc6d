"""A server's deployment: its folder, certificates, the files that start it, its checks, and its use of Flower's CLI."""
