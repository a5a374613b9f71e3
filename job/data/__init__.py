"""From text to rows: sources, tokenizer, packing, the prepared set, reading it.

In: documents of a corpus. Out: sealed folders of token rows, and batches of them. It may not know of models or ranks.
"""
