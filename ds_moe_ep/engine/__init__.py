"""The inference job: reads prompts, spreads them over ranks, generates or scores, writes results.

Nothing is imported here, so that reading prompts does not cost an import of torch.
"""
