"""The environment variables that clients read: names only, so that nothing has to be loaded to know them."""

CLIENT_TLS_CA = "LORAPLEX_CLIENT_TLS_CA"  # a file, or "system"
CLIENT_TLS_CERTIFICATE = "LORAPLEX_CLIENT_TLS_CERTIFICATE"
CLIENT_TLS_KEY = "LORAPLEX_CLIENT_TLS_KEY"
API_KEY = "LORAPLEX_API_KEY"
API_KEY_FILE = "LORAPLEX_API_KEY_FILE"
SERVER = "LORAPLEX_SERVER"
