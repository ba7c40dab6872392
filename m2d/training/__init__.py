"""Training: losses, the step, the loop of one worker and the driver."""
