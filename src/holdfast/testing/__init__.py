"""The test kit, shipped for those who write stores of their own."""
