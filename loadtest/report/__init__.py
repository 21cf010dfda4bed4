"""What is left of a run: a folder with run.json, Parquet, JUnit, Markdown, plots and one HTML page.

write.py     writes the whole folder
document.py  run.json, which the rest is made from
parquet.py   every request as a row
texts.py     the verdict in words: terminal, Markdown, JUnit
compared.py  a comparison in words
searched.py  a search in words
plots.py     the plots of a run
curves.py    plots of several runs together
"""
