"""Data on disk: readers, tokenizer, samplers, batches, augmentation and the generated corpus.

Everything here is imported when it is asked for; pillow, kornia and tokenizers belong to the `train` extra.
"""
