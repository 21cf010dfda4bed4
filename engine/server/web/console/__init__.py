"""The console: a page of static files, and the few calls that it makes."""
