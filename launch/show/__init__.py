"""What commands print of a corpus, of an encoder, and of the memory that its training needs."""
