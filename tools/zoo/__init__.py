"""The page of the model zoo and the packaging of weights."""
