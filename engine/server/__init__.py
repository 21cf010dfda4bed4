"""The gRPC services, what every call goes through, and the HTTP side port."""
