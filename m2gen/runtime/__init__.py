"""The Python that packages contain. It imports nothing of m2gen, and is copied under a header."""
