"""What a run is made of: options, step, optimizer, checkpoints, log, processes."""
