"""The network and its mathematics: pure torch, no files, no network, no command line, nothing of `job`."""
