"""OpenAI's HTTP API over one service."""
