"""Raw files -> documents: which files a source means, and one file for each format of them."""
