"""What is read from outside and written to disk: JSON, batches of data, checkpoints, models of others."""
