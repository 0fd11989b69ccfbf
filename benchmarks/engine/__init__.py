"""vLLM's engine and server, with dense backends and with QUEST, alternating."""
