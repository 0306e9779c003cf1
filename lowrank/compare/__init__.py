"""Full fine-tuning and low-rank adapters on one model, one text and the same seeds, measured: ``lowrank compare``."""
