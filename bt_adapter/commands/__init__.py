"""The commands of ``bt-adapter``: one file each, with its arguments and what runs them. Nothing heavy at import."""
