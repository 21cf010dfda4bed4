"""What is left of a run: a folder with run.json, Parquet, JUnit, Markdown, plots and one HTML page."""
