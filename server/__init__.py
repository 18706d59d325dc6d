"""The server of a federation: it sees updates and public statements, never records."""
