"""A package of kernels: the texts of its files, the folder that holds them, and the forms that others install."""
