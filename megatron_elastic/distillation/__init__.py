"""Joint distillation: how one batch of text becomes a teacher's and every budget's microbatches."""
