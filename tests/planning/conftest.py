import pytest


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """No variable of the user's decides what a configuration means."""
    for name in ("RMOE_DATA", "RMOE_TOKENIZER", "RMOE_CHECKPOINT", "RMOE_WORLD_SIZE", "RMOE_GPU_MEMORY"):
        monkeypatch.delenv(name, raising=False)
