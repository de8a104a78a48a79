"""`diptych quickstart`: from the documents of this machine to a context report."""
