"""From named text to sealed rows: sources, tokenizer, packing, and the batches read back."""
