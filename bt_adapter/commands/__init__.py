"""The commands of ``bt-adapter``: one file each, with its options and what runs it. They import nothing heavy."""
