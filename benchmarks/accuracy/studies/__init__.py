"""Questions that the grid does not answer, each with a command of its own."""
