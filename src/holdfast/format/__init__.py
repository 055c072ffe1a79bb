"""The vocabulary on disk: pure values and the bytes that they become. No torch, no I/O."""
