"""What a hop costs: the router against its replica asked directly, and against Ray Serve's own gRPC proxy."""
