"""Training: data, losses, the step and the loop around it."""
