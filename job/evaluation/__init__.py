"""CORE: its bundle, prompts, batches, scores, the ledger of answers; models of the Hugging Face hub.

In: a model, a bundle. Out: a sealed ledger and its score. It may not know how the model was trained.
"""
