"""The `lemo finetune` and `lemo evaluate` jobs: run folders, checkpoints, logs, plots."""
