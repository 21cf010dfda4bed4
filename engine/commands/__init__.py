"""The commands of `loraplex`; `engine.cli` puts them together."""
