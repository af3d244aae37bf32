"""How well a model predicts a text, exactly: ``rmoe eval``."""
