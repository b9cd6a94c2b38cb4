"""From the naive kernel to Hopper's, rung by rung: README.md."""
