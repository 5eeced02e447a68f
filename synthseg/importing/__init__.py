"""Label maps of others: found in a folder or downloaded, understood, and made into templates and recipes."""
