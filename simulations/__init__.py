"""Many sites on one machine: partitions, populations, runtimes, studies."""
