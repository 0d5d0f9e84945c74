"""The HTTP gateway: OpenAI and SGLang routes in front of the engine. Imports neither torch nor transformers."""
