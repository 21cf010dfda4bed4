"""Generated protocol buffer messages and stubs (`make proto`); never edited by hand."""
