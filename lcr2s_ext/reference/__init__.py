"""The operators in plain PyTorch: oracle of the tests, fallback, the text to read first."""
