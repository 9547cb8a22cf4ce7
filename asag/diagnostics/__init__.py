"""Tools that look into a training: overfit check, replay of a step, profilers."""
