"""Many scans in one run: which files are made of each, what is done already, tables and reports of all."""
