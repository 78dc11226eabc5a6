"""nanochat: from raw text to a chat window in one small repo."""

__version__ = "0.1.0"
