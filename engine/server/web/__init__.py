"""What people and HTTP clients see: the OpenAI-compatible API and the console, over the same calls as gRPC."""
